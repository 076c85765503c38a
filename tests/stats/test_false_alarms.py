"""The false-alarm rate of a study's own tests: near nominal for valid tests, far above it for broken ones."""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd
import pytest
import synthetic

from leeway import stats
from leeway.stats.cluster_tests import wild_cluster, wild_cluster_p

OBJECTIVES = tuple(f"o{n}" for n in range(6))


def study(rate: float, prompts: int = 80, seed: int = 0) -> pd.DataFrame:
    """Rows of a base and six objectives, three attacks a prompt; every prompt has its own difficulty."""
    rng, found = np.random.default_rng(seed), []
    hard = rng.beta(2 * rate, 2 * (1 - rate), prompts) if 0 < rate < 1 else np.full(prompts, rate)
    for objective in ("base", *OBJECTIVES):
        for n, h in enumerate(hard):
            for attack in ("none", "dan", "zulu"):
                harmful = bool(rng.random() < h)
                line = {"objective": objective, "seed": 0, "budget": 0 if objective == "base" else 1000}
                line |= {"eval": "jailbreak", "attack": attack, "item_id": f"p/{n}", "cluster": f"c{n}", "sample": 0}
                line |= {"outcome": "harmful" if harmful else "refused", "score": float(harmful), "judge": "exact"}
                line |= {"unscored_reason": None, "template_hash": synthetic.PLAIN, "prompt": "?", "response": "!"}
                found.append(line | {"judge_raw": "", "adapter_hash": "", "new_tokens": 1})
    return pd.DataFrame(found)


def test_p_values_are_those_of_the_contrasts() -> None:
    rng = np.random.default_rng(3)
    sums_CM = rng.integers(-1, 2, (40, 7)) / 40
    tested = wild_cluster(sums_CM, np.full((40, 7), 1 / 40), resamples=2500, seed=4)
    assert wild_cluster_p(sums_CM, resamples=2500, seed=4).tolist() == tested.p.tolist()


@pytest.mark.parametrize("rate", [0.1, 0.4])
def test_without_drift_a_family_of_six_tests_keeps_five_per_cent(rate: float) -> None:
    table = stats.false_alarms(study(rate), synthetic.CONDITIONS, redraws=800).set_index("axis")
    assert table.loc["jailbreak", "tests"] == 6
    assert table.loc["jailbreak", "nominal"] == 0.05
    assert 0.015 < table.loc["jailbreak", "rate"] < 0.075  # 5% ± 3 standard errors; Holm is a little conservative
    assert table.loc["all", "rate"] == table.loc["jailbreak", "rate"]


def test_a_test_without_correction_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["leeway.stats.false_alarms"], "holm", lambda p: p)
    table = stats.false_alarms(study(0.4), synthetic.CONDITIONS).set_index("axis")
    assert table.loc["jailbreak", "low"] > 0.10


def test_several_axes_add_up_and_a_real_study_stays_below_the_sum() -> None:
    rows = synthetic.rows(("sft", "cft"), (1000, 2000), capability=60, prompts=60, items=60)
    table = stats.false_alarms(rows, synthetic.CONDITIONS).set_index("axis")
    assert set(table.index) == {"capability", "jailbreak", "persona", "all"}
    assert table.loc["all", "nominal"] == pytest.approx(0.15)
    assert table.loc["all", "alarms"] >= table.drop("all")["alarms"].max()
    assert table.loc["all", "low"] < table.loc["all", "nominal"]
    assert "trait" in stats.contrasts(rows, synthetic.CONDITIONS)["measure"].tolist()
    assert set(table["note"]) == {""}


def test_the_trait_is_redrawn_as_the_verdict_tests_it(record_property: pytest.RecordProperty) -> None:
    """60 Yes- and 20 No-keyed statements whose levels differ: drawn over both halves, no test would hold its level."""
    rows = synthetic.rows(("sft", "cft", "ip"), (1000,), items=80)
    rows = rows[rows["eval"] == "persona"].copy()
    number = rows["item_id"].map({item: n for n, item in enumerate(sorted(rows["item_id"].unique()))})
    rows = rows[number % 8 != 1]  # seven eighths: unequal halves
    rng = np.random.default_rng(1)
    keyed = rows["judge_raw"].str.contains('"Yes"')
    rows["score"] = 1 / (1 + np.exp(-(np.where(keyed, 2.0, -2.0) + rng.normal(0, 1, len(rows)))))
    table = stats.false_alarms(rows, synthetic.CONDITIONS, redraws=800).set_index("axis")
    assert table.loc["persona", "tests"] == 3
    record_property("measured", f"false alarms of the trait: {table.loc['persona', 'rate']:.1%} of 800 (nominal 5%)")
    assert 0.015 < table.loc["persona", "rate"] < 0.075
    assert table.loc["persona", "discordant"] > 0.9


def test_a_base_that_always_refuses_raises_no_alarm_and_says_why() -> None:
    table = stats.false_alarms(study(0.0), synthetic.CONDITIONS).set_index("axis")
    assert table.loc["jailbreak", "alarms"] == 0
    assert "no alarm is possible" in table.loc["jailbreak", "note"]


def test_the_same_seed_gives_the_same_table() -> None:
    rows = study(0.3, prompts=30)
    first, second = (stats.false_alarms(rows, synthetic.CONDITIONS, redraws=80) for _ in range(2))
    pd.testing.assert_frame_equal(first, second)
