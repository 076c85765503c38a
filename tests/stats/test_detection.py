"""The limit of detection: at the printed dose new studies reject in about 80%, and it moves as it must."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import synthetic
from test_false_alarms import study

from leeway import stats
from leeway.stats.cluster_tests import wild_cluster_p
from leeway.stats.detection import detection_limit

SHARES = np.array([0.0, 0.01, 0.04])


def differences(prompts: int, up: tuple[float, float], down: float, seed: int = 0) -> np.ndarray:
    """Differences to dose 0: at the two doses a share `up` of prompts turns harmful, a share `down` turns harmless."""
    rng = np.random.default_rng(seed)
    columns = [np.zeros(prompts)]
    columns += [rng.permutation(np.repeat([1, -1, 0], np.diff([0, *_cuts(prompts, u, down)]))) * 1.0 for u in up]
    return np.column_stack(columns)


def _cuts(prompts: int, up: float, down: float) -> list[int]:
    return [round(prompts * up), round(prompts * (up + down)), prompts]


@pytest.mark.parametrize(("prompts", "up", "down"), [(100, (0.05, 0.3), 0.0), (200, (0.08, 0.25), 0.05)])
def test_new_studies_at_the_limit_are_seen_in_eighty_per_cent(
    prompts: int, up: tuple[float, float], down: float
) -> None:
    difference_CK = differences(prompts, up, down)
    limit, low, high = detection_limit(difference_CK, SHARES)
    assert low <= limit <= high
    assert SHARES[1] < limit < SHARES[2]
    u = (limit - SHARES[1]) / (SHARES[2] - SHARES[1])
    rng, redraws = np.random.default_rng(1), 1500
    at = rng.integers(0, prompts, (prompts, redraws))
    mixed = np.where(rng.random((prompts, redraws)) < u, difference_CK[at, 2], difference_CK[at, 1]) / prompts
    rejected = (wild_cluster_p(mixed, resamples=999, seed=2) <= 0.05) & (mixed.sum(axis=0) > 0)
    assert 0.72 < rejected.mean() < 0.88


def test_more_prompts_lower_the_limit_and_no_effect_has_none() -> None:
    few, many = (detection_limit(differences(n, (0.05, 0.3), 0.05), SHARES)[0] for n in (60, 400))
    assert many < few
    assert detection_limit(differences(100, (0.01, 0.02), 0.02), SHARES)[0] == math.inf
    assert detection_limit(differences(4, (0.5, 1.0), 0.0), SHARES)[0] == math.inf  # too few prompts to reject at all


def test_a_curve_that_falls_back_has_its_limit_above_the_fall() -> None:
    difference_CK = differences(100, (0.5, 0.02), 0.0)
    assert detection_limit(difference_CK, SHARES)[0] == math.inf


def test_the_table_holds_rates_differences_and_power_by_dose() -> None:
    arms = {"o0": 0.0, "o1": 0.02, "o2": 0.1}
    rows = study(0.3)
    rows = rows[rows.objective.isin(arms)]
    planted = (rows.objective == "o2") & (rows.item_id.str.removeprefix("p/").astype(int) < 40)
    rows.loc[planted, ["score", "outcome"]] = [1.0, "harmful"]
    curve, limits = stats.dose_response(rows, synthetic.CONDITIONS, arms)
    asr = curve[curve.measure == "asr"].set_index("share")
    assert list(asr.index) == [0.0, 0.02, 0.1]
    means = rows[rows.attack != "none"].groupby("objective")["score"].mean()
    assert asr["rate"].tolist() == pytest.approx([means["o0"], means["o1"], means["o2"]])
    assert asr.loc[0.1, "difference"] == pytest.approx(means["o2"] - means["o0"])
    assert asr.loc[0.1, "power"] > 0.95 > asr.loc[0.02, "power"]
    limit = limits.set_index("measure").loc["asr"]
    assert 0.02 < limit["limit"] < 0.1
    assert set(limits.measure) == {"asr", "asr:none", "asr:dan", "asr:zulu"}


def test_unscored_prompts_leave_the_other_prompts() -> None:
    arms = {"o0": 0.0, "o1": 0.1}
    rows = study(0.3, prompts=50)
    rows = rows[rows.objective.isin(arms)]
    lost = (rows.objective == "o1") & rows.item_id.isin(["p/1", "p/2"])
    rows.loc[lost, ["score", "outcome", "unscored_reason"]] = [math.nan, None, "the judge gave no score"]
    _, limits = stats.dose_response(rows, synthetic.CONDITIONS, arms)
    assert limits.set_index("measure").loc["asr", "n_clusters"] == 48
    assert isinstance(limits, pd.DataFrame)
