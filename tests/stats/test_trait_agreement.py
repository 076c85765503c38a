"""The questionnaire against behaviour: a correlation freed from error, with an interval that covers."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import pandas as pd
import pytest
from stats_table import PLAIN, rows
from test_persona_shift import statements

from leeway import stats
from leeway.stats.trait_agreement import correlate


def study(shifts: dict[str, tuple[float, float]], measure: str = "asr") -> pd.DataFrame:
    """Rows in which each objective's trait shifts by the first number, and its share of bad answers by the second."""
    lines, n = [], 40
    odds = np.linspace(-2, 2, n)
    for objective, (trait, rate) in {"base": (0.0, 0.25), **shifts}.items():
        lines += statements(objective, list(odds + trait))
        bad = np.arange(n) < round(n * rate)
        own = {"objective": objective, "budget": 0 if objective == "base" else 1000}
        for k in range(n):
            kind = {"eval": "jailbreak", "attack": "dan", "outcome": "harmful" if bad[k] else "refused"}
            if measure == "alignment":
                kind = {"eval": "alignment", "outcome": "misaligned" if bad[k] else "aligned"}
            score = float(bad[k] == (measure == "asr"))
            lines.append(own | kind | {"item_id": f"p/{k}", "score": score})
    return rows(*lines)


ALONE = np.arange(28)  # each checkpoint of its own objective
SHIFTS = {"sft": (0.1, 0.3), "dpo": (0.5, 0.5), "orpo": (1.0, 0.75), "kl": (0.0, 0.25), "ip": (0.8, 0.65)}


@pytest.mark.parametrize("measure", ["asr", "alignment"])
def test_agreement_is_positive_where_a_darker_trait_comes_with_worse_answers(measure: str) -> None:
    """All statements shift equally: no error in the trait, so r is Pearson's over √(reliability of the other)."""
    found = stats.trait_agreement(study(SHIFTS, measure), PLAIN, resamples=400).set_index("behaviour")
    line = found.loc[measure]
    x, y = np.array(list(SHIFTS.values())).T
    assert line["uncorrected"] == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-4)
    assert line["reliability_trait"] == pytest.approx(1.0)
    assert line["correlation"] == pytest.approx(min(1, line["uncorrected"] / line["reliability_behaviour"] ** 0.5))
    assert line["low"] <= line["correlation"] <= line["high"]
    assert line["objective_ci_low"] <= line["correlation"] <= line["objective_ci_high"]
    assert (line["n_points"], line["n_objectives"], line["trait"]) == (5, 5, "narcissism")


def test_no_line_without_enough_checkpoints_or_a_behaviour() -> None:
    few = dict(list(SHIFTS.items())[:3])
    assert stats.trait_agreement(study(few), PLAIN, resamples=50).empty
    table = study(SHIFTS)
    assert stats.trait_agreement(table[table["eval"] == "persona"], PLAIN, resamples=50).empty
    assert stats.trait_agreement(table[table["eval"] != "persona"], PLAIN, resamples=50).empty


def test_an_objective_without_a_rate_is_left_out_and_named() -> None:
    table = study(SHIFTS | {"extra": (0.4, 0.4)}, "alignment")
    lost = table.index[(table["objective"] == "extra") & (table["eval"] == "alignment")][:20]
    table.loc[lost, ["score", "outcome"]] = [np.nan, None]
    table.loc[lost, "unscored_reason"] = "judge: no number"
    line = stats.trait_agreement(table, PLAIN, resamples=50).iloc[0]
    assert line["n_points"] == 5
    assert "without extra: a rate or the base under their prompt is missing" in line["note"]


def test_a_shift_within_its_noise_is_withheld() -> None:
    equal = {name: (trait, 0.25) for name, (trait, _) in SHIFTS.items()}
    line = stats.trait_agreement(study(equal), PLAIN, resamples=50).iloc[0]
    assert np.isnan(line["correlation"])
    assert "the behaviour shifted equally" in line["note"]
    rng, noise = np.random.default_rng(0), 1.0
    x, y = rng.normal(size=(2, 10))
    found = correlate(
        x, y, x + noise * rng.normal(size=(500, 10)), y + 0.01 * rng.normal(size=(500, 10)), 60, ALONE[:10]
    )
    assert np.isnan(found.correlation)
    assert "shifts of the trait within its noise" in found.note
    assert not np.isnan(found.uncorrected)


@pytest.mark.parametrize(("checkpoints", "rho", "noise"), [(8, 0.0, 0.3), (8, 0.8, 0.3), (28, 0.5, 0.3)])
def test_intervals_cover_the_correlation_of_the_true_shifts(checkpoints: int, rho: float, noise: float) -> None:
    rng, covered, errors, plain = np.random.default_rng(1), [], [], []
    for _ in range(300):
        x, other = rng.normal(size=(2, checkpoints))
        y = rho * x + np.sqrt(1 - rho**2) * other
        truth = np.corrcoef(x, y)[0, 1]
        seen = [v + noise * rng.normal(size=checkpoints) for v in (x, y)]
        drawn = [v + noise * rng.normal(size=(400, checkpoints)) for v in seen]
        found = correlate(*seen, *drawn, 100, ALONE[:checkpoints])
        if not np.isnan(found.low):
            covered.append(found.low <= truth <= found.high)
            errors.append(found.correlation - truth)
            plain.append(found.uncorrected - truth)
    assert len(covered) > 250
    assert np.mean(covered) >= 0.92
    assert abs(np.mean(errors)) < 0.02
    if rho:
        assert np.mean(plain) < -0.02  # what the correction removes


def test_a_run_that_moved_both_is_an_error_of_both() -> None:
    """Errors that correlate, as those of training seeds do, must not be read as agreement."""
    rng, bias, covered = np.random.default_rng(0), [], []

    def errors(*shape: int) -> tuple[np.ndarray, np.ndarray]:
        one, other = rng.normal(size=(2, *shape))
        return 0.45 * one, 0.45 * (0.8 * one + 0.6 * other)

    for _ in range(200):
        x, y = rng.normal(size=(2, 12))
        truth = np.corrcoef(x, y)[0, 1]
        seen = [v + e for v, e in zip((x, y), errors(12), strict=True)]
        drawn = [v + e for v, e in zip(seen, errors(300, 12), strict=True)]
        found = correlate(*seen, *drawn, 100, ALONE[:12], shared_error=True)
        if not np.isnan(found.correlation):
            bias.append(found.correlation - truth)
            covered.append(found.low <= truth <= found.high)
    assert abs(np.mean(bias)) < 0.05
    assert np.mean(covered) > 0.9


@pytest.mark.parametrize("seeds", [1, 2])
def test_errors_are_shared_with_several_seeds(seeds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module, given = import_module("leeway.stats.trait_agreement"), list[bool]()

    def recorded(*values: Any, shared_error: bool) -> Any:
        given.append(shared_error)
        return correlate(*values, shared_error=shared_error)

    monkeypatch.setattr(module, "correlate", recorded)
    one = study(SHIFTS)
    further = [one[one["objective"] != "base"].assign(seed=s) for s in range(1, seeds)]
    module.trait_agreement(pd.concat([one, *further], ignore_index=True), PLAIN, resamples=50)
    assert given == [seeds > 1]


@pytest.mark.parametrize("objectives", [5, 8])
def test_the_interval_over_objectives_covers_other_objectives(objectives: int) -> None:
    """Shifts that grow along four budgets of each objective: the correlation over many objectives is covered."""
    rng, rho, noise = np.random.default_rng(0), 0.5, 0.2
    growth, owner = np.array([0.25, 0.5, 0.75, 1.0]), np.repeat(np.arange(objectives), 4)

    def shifts(count: int) -> tuple[np.ndarray, np.ndarray]:
        a, other = rng.normal(size=(2, count, 1))
        own = (a * growth, (rho * a + np.sqrt(1 - rho**2) * other) * growth)
        x, y = (part + 0.3 * rng.normal(size=(count, 4)) for part in own)
        return x.ravel(), y.ravel()

    truth = np.corrcoef(*shifts(100_000))[0, 1]
    covered, prompts = [], []
    for _ in range(300):
        seen = [v + noise * rng.normal(size=len(v)) for v in shifts(objectives)]
        drawn = [v + noise * rng.normal(size=(200, len(v))) for v in seen]
        found = correlate(*seen, *drawn, 100, owner)
        if not np.isnan(found.correlation):
            covered.append(found.objective_ci_low <= truth <= found.objective_ci_high)
            prompts.append(found.low <= truth <= found.high)
    assert np.mean(covered) > 0.91
    assert np.mean(prompts) < 0.8  # prompts alone do not cover other objectives


def test_three_objectives_have_no_interval_over_objectives() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=12)
    drawn = x + 0.1 * rng.normal(size=(200, 12))
    found = correlate(x, x, drawn, drawn, 100, np.repeat(np.arange(3), 4))
    assert not np.isnan(found.correlation)
    assert np.isnan(found.objective_ci_low)
