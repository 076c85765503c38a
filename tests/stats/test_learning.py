"""The learning check: values worked out by hand, the rule of "void", and its error rates on known truth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_1samp

from benchmarks.statistics.learning import FLOOR, Arm, void_share
from leeway.claims.evaluate import EvaluationContext, judge
from leeway.claims.schema import build
from leeway.report.learning import missing, sentences, void_arms
from leeway.stats import learned, learning
from leeway.stats.learning import lower_bound

GAINS = np.array([0.3, 0.1, 0.2, 0.4, 0.0, 0.2])
NO_CONTRASTS = pd.DataFrame()
NO_LOSSES = pd.DataFrame(columns=["objective", "seed", "budget", "loss"])


def items(objective: str = "sft", gains: np.ndarray = GAINS, kl: float = 0.2, **columns: object) -> pd.DataFrame:
    """One checkpoint whose preferred answers gained `gains` nats per token; rejected ones stand still."""
    line = {"objective": objective, "seed": 0, "budget": 8_000, "condition": "plain", "prompts": "task"}
    line |= {"base_nll": 1.0, "rejected_nll": 1.1, "base_rejected_nll": 1.1, "kl": kl, "weight_change": 0.02, **columns}
    values = [line | {"item_id": f"e{k}", "nll": 1.0 - g} for k, g in enumerate(gains)]
    general = [line | {"item_id": "g0", "prompts": "general", "nll": 1.0, "rejected_nll": np.nan, "kl": 0.05}]
    return pd.DataFrame(values + general)


def test_measures_by_hand():
    losses = pd.DataFrame([["sft", 0, 8_000, 2.0], ["sft", 0, 8_000, 1.0], ["kl", 0, 8_000, 9.0]])
    table = learning(items(), losses.set_axis(["objective", "seed", "budget", "loss"], axis=1))
    found = table.set_index(["objective", "measure"])["value"].to_dict()
    assert found == {
        ("base", "nll"): 1.0,
        ("base", "preference"): 1.0,
        ("base", "margin"): pytest.approx(0.1),
        ("sft", "nll"): pytest.approx(0.8),
        ("sft", "preference"): 1.0,
        ("sft", "margin"): pytest.approx(0.3),
        ("sft", "kl"): 0.2,
        ("sft", "kl-general"): 0.05,
        ("sft", "weight-change"): 0.02,
        ("sft", "train-loss"): 1.5,
    }
    nll = table[(table["objective"] == "sft") & (table["measure"] == "nll")].iloc[0]
    interval = ttest_1samp(1.0 - GAINS, 0).confidence_interval()
    assert (nll["low"], nll["high"]) == pytest.approx((interval.low, interval.high))
    assert nll["n"] == 6
    assert learning(items().iloc[:0], NO_LOSSES).empty


def test_an_example_counts_once_over_seeds():
    both = pd.concat([items(), items(seed=1, gains=GAINS + 0.1)])
    pooled = learning(both, NO_LOSSES, pool_seeds=True).query("objective == 'sft' and measure == 'nll'").iloc[0]
    assert (pooled["value"], pooled["n"], pooled["seed"]) == (pytest.approx(0.75), 6, -1)
    assert learned(both, {}).iloc[0]["nll_gain"] == pytest.approx(0.25)


def test_bounds_are_students_t_shared_by_the_tests():
    found = learned(items(), {"sft": "plain"}).iloc[0]
    by_scipy = ttest_1samp(GAINS, 0, alternative="greater").confidence_interval(0.975).low
    assert found["nll_gain_low"] == pytest.approx(by_scipy)
    assert found["margin_gain"] != found["margin_gain"]  # not trained on pairs: the margin is no reason to pass
    paired = learned(items(), {"sft": "plain"}, ["sft"]).iloc[0]
    assert paired["margin_gain_low"] == pytest.approx(
        ttest_1samp(GAINS, 0, alternative="greater").confidence_interval(1 - 0.05 / 3).low
    )
    assert np.isnan(lower_bound(np.array([0.3]), 0.05))


@pytest.mark.parametrize(
    ("gains", "kl", "status"),
    [
        (GAINS, 0.0, "learned"),
        (np.full(6, FLOOR + 0.001), 0.0, "learned"),
        (np.full(6, FLOOR - 0.001), 0.0, "void"),  # surely a gain, and too small a one
        (np.zeros(6), 0.0, "void"),  # a rate of 0
        (GAINS - 0.2, 0.004, "void"),
        (-GAINS, 0.2, "moved"),
        (GAINS[:4], 0.2, "unknown"),
    ],
)
def test_status(gains: np.ndarray, kl: float, status: str):
    assert learned(items(gains=gains, kl=kl), {}).iloc[0]["status"] == status


def test_pairs_count_for_objectives_trained_on_them():
    worse = items(gains=np.full(6, -0.1), kl=0.0, rejected_nll=2.0)  # both fall, the dispreferred one more
    assert learned(worse, {}).iloc[0]["status"] == "void"
    assert learned(worse, {}, ["sft"]).iloc[0]["status"] == "learned"


def test_gains_are_against_the_base_with_plain_prompts():
    """The base is worse behind an untrained token; repairing that is not learning."""
    repaired = items("cft", np.full(6, 0.0), condition="<SAFE>", base_nll=1.5)
    plain = items("cft", np.zeros(6))
    alone = learned(repaired, {"cft": "<SAFE>"})
    assert np.isnan(alone.iloc[0]["nll_gain"])  # the base under plain prompts is not known
    assert alone.iloc[0]["status"] == "unknown"
    assert "the base answered under plain prompts too" in sentences(alone, NO_CONTRASTS, {})[0]
    found = learned(pd.concat([repaired, plain]), {"cft": "<SAFE>"}).iloc[0]
    assert (found["condition"], found["status"]) == ("<SAFE>", "moved")
    assert found["nll_gain"] == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("kl", "n", "status"), [(0.8, 30, "moved"), (0.003, 30, "void"), (0.8, 4, "void"), (0.05, 30, "moved")]
)
def test_an_arm_that_moved_on_general_prompts_alone_is_not_void(kl: float, n: int, status: str):
    """Thirty task items at KL .003, 30 general ones at KL .8: the model did change."""
    task = items(gains=np.zeros(30), kl=0.003).query("prompts == 'task'")
    general = task.head(n).assign(
        prompts="general", item_id=[f"g{k}" for k in range(n)], kl=kl * np.linspace(0.5, 1.5, n)
    )
    found = learned(pd.concat([task, general]), {})
    assert found.iloc[0]["status"] == status
    text = " ".join(sentences(found, NO_CONTRASTS, {}))
    assert ("moved from the base" in text) == (status == "moved")
    assert (f"on general prompts {kl:.3f}" in text) == (n >= 5)


@pytest.mark.parametrize(
    ("safe", "unsafe", "said"),
    [
        (GAINS, np.zeros(6), "CFT has learned its condition:"),
        (GAINS, GAINS, "CFT is not shown to have learned its condition"),
        (-GAINS, -GAINS - 0.1, "CFT has learned its condition only in part"),
    ],
)
def test_condition_of_cft(safe: np.ndarray, unsafe: np.ndarray, said: str):
    both = [items("cft", safe, condition="<SAFE>"), items("cft", unsafe, condition="<UNSAFE>"), items("cft", safe)]
    found = learned(pd.concat(both), {"cft": "<SAFE>"}, ["cft"])
    assert found.iloc[0]["cue_gap"] == pytest.approx((safe - unsafe).mean())
    assert said in sentences(found, NO_CONTRASTS, {})[-1]


def test_sentences_name_void_arms_and_what_is_missing():
    table = learned(pd.concat([items(), items("kl", np.zeros(6), kl=0.001)]), {})
    assert void_arms(table, NO_CONTRASTS) == {("kl", 8_000)}
    text = " ".join(sentences(table, NO_CONTRASTS, {}))
    assert "is void for KL (gain in NLL +0.000, KL 0.001 nats per token)" in text
    assert "SFT is shown to have learned" in text
    unmeasured = {"learning": {"missing": "12 of 12 examples"}}
    assert "not measured (12 of 12 examples" in sentences(None, NO_CONTRASTS, unmeasured)[0]
    gained = {"objective": "kl", "budget": 8_000, "axis": "capability", "primary": True, "difference": 0.1}
    contrasts = pd.DataFrame([gained | {"p_holm": 0.01}])
    assert void_arms(table, contrasts) == set()
    text = " ".join(sentences(table, contrasts, {}))
    assert "is void" not in text
    assert "KL (gain in NLL +0.000, KL 0.001 nats per token) gained capability" in text
    assert void_arms(table, contrasts.assign(p_holm=0.2)) == {("kl", 8_000)}
    assert missing({"external": {"kind": "audit"}}) == "the checkpoint was not trained by Leeway"
    assert missing({}).startswith("the run is older")


def test_no_drift_of_an_arm_that_did_not_learn_is_not_supported():
    lines = [
        {"objective": o, "seed": 0, "budget": b, "eval": "persona", "attack": "", "item_id": f"narcissism/{k}"}
        for o, b in (("base", 0), ("sft", 8_000))
        for k in range(80)
    ]
    rows = pd.DataFrame(lines).assign(sample=0, score=0.5, unscored_reason=None, template_hash="t", judge="p")
    rows["cluster"] = rows["prompt"] = rows["item_id"]
    rows["outcome"], rows["judge_raw"], rows["response"] = None, "{}", ""
    claims = build(
        [
            {
                "id": "c",
                "statement": "still",
                "kind": "no_drift",
                "measure": "endorsement",
                "objectives": "sft",
                "margin": 0.05,
            }
        ]
    )
    assert judge(claims, EvaluationContext(rows, {"t": "plain"})).iloc[0]["verdict"] == "supported"
    found = judge(claims, EvaluationContext(rows, {"t": "plain"}, void={("sft", 8_000)})).iloc[0]
    assert found["verdict"] == "inconclusive"
    assert found["why"].startswith("Void: not shown to have learned: sft at 8,000")


@pytest.mark.parametrize("shape", ["normal", "right-skewed", "heavy tails"])
def test_the_rule_voids_nothing_learned_and_seldom_something(shape: str):
    arm = Arm(shape=shape)
    assert void_share(arm, 1_000, 1) >= 0.97
    assert void_share(replace(arm, gain=FLOOR, kl=FLOOR), 1_000, 2) >= 0.95 - 3 * 0.007
    assert void_share(replace(arm, gain=arm.detectable), 1_000, 3) <= 0.20 + 3 * 0.013
    assert void_share(replace(arm, gain=0.15), 1_000, 4) == 0
