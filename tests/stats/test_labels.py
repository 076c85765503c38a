"""Judges against labels: rates worked by hand, limits, coverage, and groups that do not differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from leeway.stats.intervals import wilson
from leeway.stats.labels import RATES, LabelledSample, count_differences, differences, judge_rates, rates_by_group

Class = tuple[int, int, int, int]  # judged, answers, labelled, labelled true


def sample(**groups: Sequence[Class]) -> LabelledSample:
    names, truth, judged, weights = list[str](), list[float](), list[float](), list[float]()
    for name, classes in groups.items():
        for own, answers, labelled, true in classes:
            names += [name] * labelled
            truth += [1.0] * true + [0.0] * (labelled - true)
            judged += [float(own)] * labelled
            weights += [answers / labelled] * labelled
    return LabelledSample(names, np.array(truth), np.array(judged), np.array(weights), np.arange(len(names)))


def test_rates_by_hand() -> None:
    """Of 40 called harmful 3 of 4 labelled are, of 60 others 1 of 6: 30 hits, 10 misses, 50 and 10."""
    rates = judge_rates(sample(sft=[(1, 40, 4, 3), (0, 60, 6, 1)]))
    assert [rates[r][0] for r in RATES] == pytest.approx([0.8, 30 / 40, 50 / 60])
    l1, u0 = wilson(3, 4)[0], wilson(1, 6)[1]
    low = 0.8 - math.hypot(0.4 * (0.75 - l1), 0.6 * (u0 - 1 / 6))
    assert rates["agreement"][1] == pytest.approx(low)
    product, miss = 1 / 6 * 0.75, u0 * (2 / 6 - u0)
    hit = l1 * (1.5 - l1)
    ratio = (product + math.sqrt(product**2 - miss * hit)) / hit  # MOVER-R: the most misses for each hit
    assert rates["sensitivity"][1] == pytest.approx(1 / (1 + 60 / 40 * ratio))


def test_a_full_sample_is_a_plain_table() -> None:
    rates = judge_rates(sample(a=[(1, 10, 10, 8), (0, 20, 20, 2)]))
    assert [rates[r][0] for r in RATES] == pytest.approx([26 / 30, 8 / 10, 18 / 20])


def test_no_miss_among_few_of_many_says_little() -> None:
    rates = judge_rates(sample(a=[(1, 50, 50, 50), (0, 1000, 20, 0)]))
    value, low, high = rates["sensitivity"]
    assert (value, high) == (1.0, 1.0)
    assert low < 50 / (50 + 1000 * 0.1)  # up to one in ten of the 1,000 may be missed


def test_undefined_rates_and_unscored_answers() -> None:
    only = judge_rates(sample(a=[(0, 5, 5, 0)]))
    assert math.isnan(only["sensitivity"][0])
    assert only["agreement"][0] == 1
    some = sample(a=[(1, 2, 2, 2), (0, 2, 2, 0)])
    some.judged[0] = np.nan
    line = rates_by_group(some).iloc[0]
    assert (line["n"], line["unscored"]) == (3, 1)


def test_a_group_that_differs_is_found() -> None:
    data = sample(a=[(1, 200, 60, 55), (0, 200, 60, 3)], b=[(1, 200, 60, 55), (0, 200, 60, 40)])
    tests = count_differences(data)
    assert tests == 4
    found = differences(data, tests)
    shown = found[(found["low"] > 0) | (found["high"] < 0)]
    assert {("a", "sensitivity"), ("b", "sensitivity")} <= set(zip(shown["group"], shown["rate"], strict=True))
    own = found[(found["group"] == "a") & (found["rate"] == "sensitivity")].iloc[0]
    assert own["difference"] == pytest.approx(55 / 58 - 55 / 95)


@pytest.mark.slow
@pytest.mark.parametrize(
    "design", [(200, 800, 0.9, 0.02, 20, 40), (200, 800, 0.9, 0.1, 15, 15), (50, 1000, 0.8, 0.01, 10, 30)]
)
def test_coverage(design: tuple[int, int, float, float, int, int]) -> None:
    """95% limits cover the run's own rates in 93% of simulated sheets or more."""
    called, others, right, missed, n_called, n_others = design
    rng, covered = np.random.default_rng(0), {r: list[bool]() for r in RATES}
    for _ in range(1000):
        one, zero = rng.binomial(1, right, called), rng.binomial(1, missed, others)
        labelled = [int(rng.choice(t, n, replace=False).sum()) for t, n in ((one, n_called), (zero, n_others))]
        hits, misses = int(one.sum()), int(zero.sum())
        true = {"agreement": (hits + others - misses) / (called + others)}
        true |= {"sensitivity": hits / (hits + misses)}
        true |= {"specificity": (others - misses) / (others - misses + called - hits)}
        rates = judge_rates(sample(a=[(1, called, n_called, labelled[0]), (0, others, n_others, labelled[1])]))
        for r in RATES:
            covered[r].append(rates[r][1] <= true[r] <= rates[r][2])
    assert all(np.mean(c) > 0.93 for c in covered.values())


@pytest.mark.slow
def test_equal_judges_are_rarely_told_apart() -> None:
    """Five groups with equal error rates and unequal shares of harm: false alarms in at most one sheet of twenty."""
    rng, alarms = np.random.default_rng(1), 0
    for _ in range(300):
        groups: dict[str, list[Class]] = {}
        for name in "abcde":
            truth = rng.binomial(1, rng.uniform(0.2, 0.6), 300)
            judged = np.where(truth == 1, rng.binomial(1, 0.85, 300), rng.binomial(1, 0.1, 300))
            own = [(j, truth[judged == j]) for j in (1, 0)]
            groups[name] = [(j, len(t), 20, int(rng.choice(t, 20, replace=False).sum())) for j, t in own]
        data = sample(**groups)
        found = differences(data, count_differences(data))
        alarms += bool(((found["low"] > 0) | (found["high"] < 0)).any())
    assert alarms <= 0.08 * 300  # 0.05 and three standard errors


def test_answers_to_one_prompt_are_one_cluster() -> None:
    """Copies of every answer add nothing, and errors that are all at one prompt are one piece of evidence."""
    one = sample(a=[(1, 40, 10, 8), (0, 60, 10, 1)])
    twice = [np.repeat(v, 2) for v in (one.truth, one.judged, one.weights / 2, one.prompts)]
    rates = judge_rates(LabelledSample(["a"] * 40, *twice))
    for name, value in judge_rates(one).items():
        assert rates[name] == pytest.approx(value)
    independent = judge_rates(replace(one, prompts=np.arange(20)))
    worse = judge_rates(replace(one, prompts=np.array([*range(8), 8, 8, 8, *range(11, 20)])))  # all errors at one
    assert worse["agreement"][1] < independent["agreement"][1]


def sheet(rng: np.random.Generator, prompts: int, checkpoints: int, labelled: int) -> tuple[LabelledSample, np.ndarray]:
    """Return a sheet whose prompts differ in harm and in the judge's errors, and the answers' truth and verdicts."""
    harm, error = rng.beta(0.5, 0.5, prompts), rng.beta(0.3, 1.2, prompts)
    truth = rng.random((checkpoints, prompts)) < harm
    judged = truth ^ (rng.random((checkpoints, prompts)) < error)
    every, prompt = np.stack([truth.ravel(), judged.ravel()]) * 1.0, np.tile(np.arange(prompts), checkpoints)
    classes = [np.flatnonzero(every[1] == j) for j in (0, 1)]
    drawn = [rng.choice(c, min(labelled // 2, len(c)), replace=False) for c in classes]
    weights = np.concatenate([np.full(len(d), len(c) / len(d)) for c, d in zip(classes, drawn, strict=True)])
    at = np.concatenate(drawn)
    return LabelledSample([""] * len(at), every[0, at], every[1, at], weights, prompt[at]), every


@pytest.mark.parametrize(("prompts", "labelled"), [(60, 200), (30, 200), (100, 100)])
def test_coverage_over_prompts(prompts: int, labelled: int) -> None:
    """A judge errs on some prompts at all 10 checkpoints. Independent answers would cover in 72% to 91%."""
    rng, covered, alone = np.random.default_rng(0), {r: list[bool]() for r in RATES}, list[bool]()
    population = sheet(np.random.default_rng(1), 200_000, 1, 100)[1]
    truth, judged = population
    true = {"agreement": (truth == judged).mean(), "sensitivity": judged[truth == 1].mean()}
    true["specificity"] = 1 - judged[truth == 0].mean()
    for _ in range(300):
        data = sheet(rng, prompts, 10, labelled)[0]
        rates = judge_rates(data)
        for r in RATES:
            covered[r].append(rates[r][1] <= true[r] <= rates[r][2])
        _, low, high = judge_rates(replace(data, prompts=np.arange(len(data.prompts))))["agreement"]
        alone.append(low <= true["agreement"] <= high)
    assert all(np.mean(c) > 0.9 for c in covered.values())
    assert np.mean(alone) < 0.92


@pytest.mark.parametrize("sampled", [(0.9, 0.95), (0.5, 0.5)])
def test_coverage_for_a_judge_that_the_sample_is_not_drawn_by(sampled: tuple[float, float]) -> None:
    """It misses half of what is harmful: with class sizes taken as known, the limits cover less than 80%."""
    rng, covered = np.random.default_rng(0), list[bool]()
    for _ in range(300):
        truth = rng.binomial(1, 0.5, 4000)
        first = rng.binomial(1, np.where(truth == 1, sampled[0], 1 - sampled[1]))
        other = rng.binomial(1, np.where(truth == 1, 0.5, 0.01))
        classes = [np.flatnonzero(first == j) for j in (0, 1)]
        at = np.concatenate([rng.choice(c, 100, replace=False) for c in classes])
        weights = np.repeat([len(c) / 100 for c in classes], 100)
        data = LabelledSample(["x"] * 200, truth[at] * 1.0, other[at] * 1.0, weights, at, known_sizes=False)
        _, low, high = judge_rates(data)["sensitivity"]
        covered.append(low <= other[truth == 1].mean() <= high)
    assert np.mean(covered) > 0.92
