"""Pairs of judges by checkpoint, differential error and the worst case over judges: worked by hand, and simulated."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from stats_table import PLAIN, answers, attacked, rows

from benchmarks.statistics import judges
from leeway import stats
from leeway.stats.metrics import split_judges

NAN = math.nan
PROMPTS = 12


def study(rubric: list[float], *, base: list[float] | None = None, third: list[float] | None = None) -> pd.DataFrame:
    """Keywords: no harm before, all answers under DAN harmful after; the rubric's labels are given."""
    labels = {"keywords": ([0.0] * PROMPTS, [1.0] * PROMPTS), "rubric": (base or [0.0] * PROMPTS, rubric)}
    labels |= {"third": ([0.0] * PROMPTS, third)} if third else {}
    lines = []
    for judge, both in labels.items():
        for objective, dan in zip(("base", "sft"), both, strict=True):
            own = attacked(objective, {"none": [0.0] * PROMPTS, "dan": dan})
            lines += [line | {"judge": judge} for line in own]
    return split_judges(rows(*lines, *answers("base", [1.0])), {"jailbreak": "keywords"})


def one(table: pd.DataFrame, **where: object) -> pd.Series:
    found = table[np.logical_and.reduce([table[k] == v for k, v in where.items()])]
    assert len(found) == 1
    return found.iloc[0]


def test_a_pair_by_hand() -> None:
    """6 of 12 labels under DAN missed: of 24 answers 18 agree, p_e = ½·¼ + ½·¾ = ½, κ = ½; D is over DAN, 6/12."""
    table = stats.judge_pairs(study([1.0, 0.0] * 6), PLAIN)
    assert list(table["objective"]) == ["base", "sft"]
    sft, base = one(table, objective="sft"), one(table, objective="base")
    assert (sft["judge_a"], sft["judge_b"], sft["n"], sft["n_unscored"]) == ("keywords", "rubric", 24, 0)
    assert (sft["agreement"], sft["kappa"]) == (pytest.approx(0.75), pytest.approx(0.5))
    assert sft["low"] < 0.75 < sft["high"]
    assert (sft["only_a"], sft["only_b"], sft["measure"], sft["net"], sft["net_base"]) == (0.25, 0.0, "asr", 0.5, 0.0)
    assert (sft["b_of_a"], sft["a_of_b"]) == (0.5, 1.0)
    assert sft["differential"] == pytest.approx(0.5)
    assert sft["differential_low"] < 0.5 < sft["differential_high"]
    assert sft["p"] == pytest.approx(2**-6, abs=0.005)  # 6 of 6 prompts in one direction: 2 · 2⁻⁶, half of it by mid-p
    assert bool(sft["shown"])
    assert (base["agreement"], base["net"], bool(base["shown"])) == (1.0, 0.0, False)
    assert math.isnan(base["differential"])
    assert math.isnan(base["kappa"])  # one category only


def graded(objective: str, judge: str, scores: dict[str, list[float]]) -> list[dict[str, object]]:
    return [line | {"judge": judge, "outcome": "harmful"} for line in attacked(objective, scores)]


def test_the_differential_is_the_difference_of_the_two_contrasts() -> None:
    """Also with graded scores, attacks with other numbers of prompts, and direct requests that the judges see alike."""
    lines = []
    for objective, shift in (("base", 0.0), ("sft", 0.3)):
        direct, dan, zulu = [0.5] * PROMPTS, [shift] * PROMPTS, [0.1 + 2 * shift] * 5
        lines += graded(objective, "keywords", {"none": direct, "dan": dan, "zulu": zulu})
        lines += graded(objective, "rubric", {"none": direct, "dan": [x / 2 for x in dan], "zulu": zulu})
    table = split_judges(rows(*lines), {"jailbreak": "keywords"})
    found = one(stats.judge_pairs(table, PLAIN, resamples=200), objective="sft")
    changes = stats.contrasts(table, PLAIN, resamples=200).set_index("measure")["difference"]
    assert found["differential"] == pytest.approx(changes["asr"] - changes["asr@rubric"]) == pytest.approx(0.075)
    assert (found["net"], found["net_base"]) == (pytest.approx(0.075), pytest.approx(0.0))
    alone = table[table["attack"] == "none"]
    found = one(stats.judge_pairs(alone, PLAIN, resamples=200), objective="sft")
    assert (found["measure"], found["differential"]) == ("asr:none", 0.0)


def test_no_warning_where_a_judge_errs_alike_before_and_after() -> None:
    both = [1.0] * 3 + [0.0] * 9
    lines = []
    for judge, labels in (("keywords", both), ("rubric", [0.0] * PROMPTS)):
        for objective in ("base", "sft"):
            lines += [line | {"judge": judge} for line in attacked(objective, {"dan": labels})]
    table = split_judges(rows(*lines), {"jailbreak": "keywords"})
    found = one(stats.judge_pairs(table, PLAIN), objective="sft")
    assert (found["net"], found["net_base"], found["differential"]) == (0.25, 0.25, 0.0)
    assert not found["shown"]


def test_unscored_answers_count_and_enter_no_share() -> None:
    found = one(stats.judge_pairs(study([1.0, 0.0] * 5 + [NAN, NAN]), PLAIN), objective="sft")
    assert (found["n"], found["n_unscored"]) == (22, 2)
    assert found["only_a"] == pytest.approx(5 / 22)
    many = one(stats.judge_pairs(study([NAN] * 6 + [0.0] * 6), PLAIN), objective="sft")
    assert math.isnan(many["p"])
    assert "unscored" in many["note"]


def test_three_judges_are_three_pairs_and_one_family() -> None:
    table = stats.judge_pairs(study([1.0, 0.0] * 6, third=[0.0] * PROMPTS), PLAIN)
    sft = table[table["objective"] == "sft"]
    assert [*zip(sft["judge_a"], sft["judge_b"], strict=True)] == [
        ("keywords", "rubric"),
        ("keywords", "third"),
        ("rubric", "third"),
    ]
    assert set(sft["family_size"]) == {3}
    assert (sft["p_holm"] >= sft["p"]).all()


def test_a_sequential_design_has_the_anytime_valid_test() -> None:
    table = study([1.0, 0.0] * 6)
    fixed = one(stats.judge_pairs(table, PLAIN), objective="sft")
    table["design"] = np.where((table["objective"] == "sft") & (table["eval"] != "capability"), "sequential", "fixed")
    found = one(stats.judge_pairs(table, PLAIN), objective="sft")
    assert found["differential"] == fixed["differential"]
    assert found["p"] > fixed["p"]
    assert (
        found["differential_high"] - found["differential_low"] > fixed["differential_high"] - fixed["differential_low"]
    )
    assert found["note"].startswith("sequential design: 12 prompts")


def test_one_judge_or_no_base() -> None:
    alone = rows(*attacked("base", {"dan": [0.0]}), *attacked("sft", {"dan": [1.0]}))
    assert stats.judge_pairs(alone, PLAIN).empty
    assert stats.worst_case(stats.rates(alone, PLAIN), stats.contrasts(alone, PLAIN)).empty
    both = study([1.0, 0.0] * 6)
    found = one(stats.judge_pairs(both[both["objective"] == "sft"], PLAIN), objective="sft")
    assert found["agreement"] == pytest.approx(0.75)
    assert (found["note"], bool(found["shown"])) == ("no base to compare with", False)


def test_worst_case_by_hand() -> None:
    """Rates under DAN: 1, ½ and ¾; the base: 0, 1/12 and 0."""
    table = study([1.0, 0.0] * 6, base=[1.0] + [0.0] * 11, third=[1.0, 1.0, 1.0, 0.0] * 3)
    changes = stats.contrasts(table, PLAIN)
    worst = stats.worst_case(stats.rates(table, PLAIN, pool_seeds=True), changes)
    assert sorted(worst["measure"].unique()) == ["asr", "asr:dan", "asr:none"]
    sft = one(worst, objective="sft", measure="asr")
    assert (sft["judges"], sft["rate"], sft["worst"], sft["worst_judge"]) == (3, 1.0, 1.0, "")
    assert sft["mean"] == pytest.approx(0.75)
    assert (sft["difference"], sft["most"], sft["most_judge"]) == (1.0, 1.0, "")
    assert (sft["least"], sft["least_judge"]) == (pytest.approx(0.5 - 1 / 12), "rubric")
    assert sft["n_significant"] == 3  # 12, 6 and 9 prompts of 12 in one direction, but for one of the rubric's
    base = one(worst, objective="base", measure="asr")
    assert (base["rate"], base["worst"], base["worst_judge"]) == (0.0, pytest.approx(1 / 12), "rubric")
    assert math.isnan(base["difference"])


def test_a_withheld_rate_leaves_no_worst_case() -> None:
    table = study([NAN] * 6 + [0.0] * 6)
    worst = stats.worst_case(stats.rates(table, PLAIN, pool_seeds=True), stats.contrasts(table, PLAIN))
    found = one(worst, objective="sft", measure="asr")
    assert math.isnan(found["worst"])
    assert found["note"] == "rate withheld: rubric"


def test_the_simulation_draws_what_the_table_tests() -> None:
    setting = judges.Setting(prompts=30, arms=2)
    table = judges.rows(setting, seed=3)
    found = stats.judge_pairs(table, PLAIN, resamples=2_000)
    tuned = found[found["objective"] != "base"]
    sums = judges.signed(setting, 1, seed=3)[0]
    assert list(tuned["differential"]) == pytest.approx(list(sums.sum(axis=0)))


@pytest.mark.slow
@pytest.mark.parametrize("setting", judges.NULLS)
def test_false_alarms_of_a_whole_table(setting: judges.Setting) -> None:
    assert judges.alarms(setting, 300, seed=1) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300)


@pytest.mark.slow
def test_power_at_the_planted_case() -> None:
    assert judges.alarms(judges.PLANTED, 200, seed=2) > 0.7
