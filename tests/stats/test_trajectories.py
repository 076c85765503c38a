"""Onset, coupling, matched capability: worked by hand, against scipy, and with nothing to say."""

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import isotonic_regression
from stats_table import PLAIN, rows
from trajectory_table import checkpoint, first, random_rows

from leeway import stats
from leeway.stats.bootstrap import Draws, interval, join_notes, simultaneous_lower
from leeway.stats.budget_curves import NEVER, first_sustained, interpolate, isotonic, pooled

BUDGETS = (1000, 2000, 4000)


def study(asr: dict[str, tuple[int, ...]], right: dict[str, tuple[int, ...]], prompts: int = 100) -> pd.DataFrame:
    """Of `prompts`, so many harmful and so many right at the base (first of "base") and at each budget."""
    lines = checkpoint("base", 0, first(right["base"][0], prompts), {"dan": first(asr["base"][0], prompts)})
    for objective in (o for o in asr if o != "base"):
        for budget, harmful, correct in zip(BUDGETS, asr[objective], right[objective], strict=True):
            lines += checkpoint(objective, budget, first(correct, prompts), {"dan": first(harmful, prompts)})
    return rows(*lines)


RISING = study({"base": (10,), "sft": (10, 30, 50)}, {"base": (20,), "sft": (40, 60, 80)})


def test_the_first_budget_that_holds_and_stays():
    beyond = np.array([[True, True], [False, True], [True, False], [False, False]])
    assert first_sustained(beyond, np.array([1.0, 2.0])).tolist() == [1, 2, NEVER, NEVER]


def test_onset_by_hand():
    """Differences 0, +20, +40 points: beyond 5 from 2,000 on, beyond 30 from 4,000 on, beyond 50 never."""
    for threshold, budget in ((0.05, 2000), (0.3, 4000), (0.5, NEVER)):
        line = stats.onset(RISING, PLAIN, "asr", threshold, resamples=2_000).iloc[0]
        assert line["estimate"] == budget
        assert line["low"] <= budget <= line["high"]
        assert line["tested"] >= line["low"]
    at_five = stats.onset(RISING, PLAIN, "asr", 0.05, resamples=2_000).iloc[0]
    # 20 of 100 moved at 2,000: the bound is about .20 − 2 · .04, above .05; at 30 points .40 − 2 · .049 is not
    assert (at_five["tested"], at_five["p_never"], at_five["statement"]) == (
        2000,
        0,
        "2,000; never in 0% of draws",
    )
    assert stats.onset(RISING, PLAIN, "asr", 0.3, resamples=2_000).iloc[0]["tested"] in (4000, NEVER)
    never = stats.onset(RISING, PLAIN, "asr", 0.5, resamples=2_000).iloc[0]
    assert (never["p_never"] > 0.9, never["tested"]) == (True, NEVER)
    assert never["statement"].startswith("not by 4,000")


def test_onset_looks_in_the_worse_direction_unless_told():
    assert stats.onset(RISING, PLAIN, "accuracy", resamples=200).iloc[0][["direction", "estimate"]].tolist() == [
        "down",
        NEVER,
    ]
    up = stats.onset(RISING, PLAIN, "accuracy", 0.1, "up", resamples=200).iloc[0]
    assert (up["direction"], up["estimate"]) == ("up", 1000)
    with pytest.raises(stats.StatsError, match="5 points are"):
        stats.onset(RISING, PLAIN, threshold=5)


def test_simultaneous_bounds_of_one_value_are_normal_ones_and_of_many_wider():
    rng = np.random.default_rng(0)
    drawn = rng.normal(size=(200_000, 3))
    one = simultaneous_lower(np.zeros(1), drawn[:, :1])
    assert one[0] == pytest.approx(-1.645, abs=0.02)
    # three independent: P(max ≤ c) = Φ(c)³ = .95
    assert simultaneous_lower(np.zeros(3), drawn) == pytest.approx([-2.121] * 3, abs=0.03)
    assert np.isnan(simultaneous_lower(np.zeros(1), np.zeros((10, 1)))).all()


def test_coupling_of_a_straight_line():
    """ASR 10 10 30 50 on capability 20 40 60 80: S_xy = (−30·−15 − 10·−15 + 10·5 + 30·25)/100², S_xx = 2000/100²."""
    line = stats.coupling(RISING, PLAIN, resamples=4_000).iloc[0]
    assert line["uncorrected"] == pytest.approx(1400 / 2000)
    assert 0.9 < line["reliability"] < 1
    # the error is taken out of the denominator
    assert line["estimate"] == pytest.approx(0.7 / line["reliability"], rel=0.02)
    assert line["low"] < 0.7 < line["high"]
    assert line[["capability_low", "capability_high", "n_points"]].tolist() == [0.2, 0.8, 4]


def test_coupling_takes_the_error_out_of_the_denominator():
    """Draws with errors of variance σ² at each of 4 checkpoints: tr MΣ = 3σ², slope S_xy / (S_xx − 3σ²)."""
    x, y, sigma = np.array([0.2, 0.3, 0.5, 0.6]), np.array([0.1, 0.15, 0.25, 0.3]), 0.04
    rng = np.random.default_rng(0)
    drawn_RK = np.concatenate([x, y]) + rng.normal(size=(40_000, 8)) * np.repeat([sigma, 0.02], 4)
    keys = [("base", 0), *(("sft", b) for b in BUDGETS)]
    cells = pd.DataFrame(
        [
            {"objective": o, "budget": b, "condition": "plain", "measure": m}
            for m in ("accuracy", "asr")
            for o, b in keys
        ]
    ).assign(better="", seeds=1, n=50, n_unscored=0, n_clusters=50, templates="t", note="")
    drawn = Draws(cells, np.concatenate([x, y]), drawn_RK, rng.normal(size=(50, 8)))
    line = stats.coupling(rows(), PLAIN, drawn=drawn).iloc[0]
    s_xx = float(((x - x.mean()) ** 2).sum())
    assert line["uncorrected"] == pytest.approx(0.5)
    assert line["reliability"] == pytest.approx(1 - 3 * sigma**2 / s_xx, abs=0.002)
    assert line["estimate"] == pytest.approx(0.5 * s_xx / (s_xx - 3 * sigma**2), rel=0.003)
    assert line["low"] < 0.5 < line["high"]


def test_coupling_without_a_range_of_capability_is_withheld():
    flat = study({"base": (10,), "sft": (10, 30, 50)}, {"base": (20,), "sft": (21, 19, 20)})
    rng = np.random.default_rng(0)
    score = flat["score"].to_numpy(float, copy=True)
    asked = (flat["eval"] == "capability").to_numpy()
    for _, own in flat[asked].groupby(["objective", "budget"]):
        score[own.index] = rng.permutation(own["score"])
    line = stats.coupling(flat.assign(score=score), PLAIN, resamples=1_000).iloc[0]
    assert line[["estimate", "low", "high", "p"]].isna().all()
    assert "within its noise" in line["note"]
    still = study({"base": (10,), "sft": (10, 30, 50)}, {"base": (20,), "sft": (20, 20, 20)})
    assert stats.coupling(still, PLAIN, resamples=50).iloc[0]["note"].startswith("capability is constant")


def test_isotonic_agrees_with_scipy_and_pools_what_it_pools():
    rows_RB = np.random.default_rng(0).normal(size=(50, 6)).cumsum(axis=1)
    found = isotonic(rows_RB)
    for seen, own in zip(rows_RB, found, strict=True):
        assert own == pytest.approx(isotonic_regression(seen).x)
    # 1 3 2 4 rises as 1 2.5 2.5 4: the second and third are one point
    rising = isotonic(np.array([[1.0, 3.0, 2.0, 4.0]]))
    assert rising.tolist() == [[1, 2.5, 2.5, 4]]
    measured = pooled(np.array([[0.0, 10.0, 20.0, 40.0]]), rising)
    assert measured.tolist() == [[0, 15, 15, 40]]
    for at, y in ((1.0, 0.0), (2.5, 15.0), (1.75, 7.5), (3.25, 27.5), (4.0, 40.0)):
        assert interpolate(np.array([at]), rising, measured)[0] == pytest.approx(y)
    assert np.isnan(interpolate(np.array([4.1]), rising, measured)[0])
    assert np.isnan(interpolate(np.array([0.9]), rising, measured)[0])


TWO = study(
    {"base": (10,), "sft": (10, 30, 50), "kl": (10, 10, 20)},
    {"base": (20,), "sft": (40, 60, 80), "kl": (30, 50, 60)},
)


def test_matched_by_hand():
    """Largest of both: 60%. sft is there at 2,000 with 30 of 100; kl at 4,000 with 20. At 45%: sft 15, kl 10."""
    found = stats.matched(TWO, PLAIN, of=["asr"], objectives=["sft", "kl"], resamples=1_000)
    levels = found[found["kind"] == "level"].set_index("objective")
    assert levels["estimate"].to_dict() == pytest.approx({"sft": 0.3, "kl": 0.2})
    pair = found[found["kind"] == "pair"].iloc[0]
    assert (pair["capability"], pair["estimate"], pair["against"]) == (pytest.approx(0.6), pytest.approx(0.1), "kl")
    assert pair["low"] <= 0.1 <= pair["high"]
    assert pair["capability_low"] < 0.6 < pair["capability_high"]
    held = stats.matched(TWO, PLAIN, 0.45, of=["asr"], objectives=["sft", "kl"], resamples=1_000)
    assert held["estimate"].tolist() == pytest.approx([0.15, 0.1, 0.05])
    assert (held["capability_low"] == held["capability_high"]).all()
    above = stats.matched(TWO, PLAIN, "base+25 points", of=["asr"], objectives=["sft", "kl"], resamples=1_000)
    assert above["estimate"].tolist() == pytest.approx([0.15, 0.1, 0.05])


def test_nothing_is_extrapolated():
    found = stats.matched(TWO, PLAIN, 0.7, of=["asr"], resamples=500).set_index(["kind", "objective"])
    assert found.loc[("level", "sft"), "estimate"] == pytest.approx(0.4)
    kl = found.loc[("level", "kl")]
    assert np.isnan(kl["estimate"])
    assert kl["note"].startswith("its capability ranges from 20.0% to 60.0%: not extrapolated to 70.0%")
    assert np.isnan(found.loc[("pair", "kl"), "estimate"])
    for wrong in ("base", "most", 1.2):
        with pytest.raises(stats.StatsError, match="at="):
            stats.matched(TWO, PLAIN, wrong, resamples=10)


def test_a_curve_ends_at_a_peak_that_is_left_for_good():
    fallen = study({"base": (10,), "sft": (10, 30, 0)}, {"base": (20,), "sft": (40, 80, 30)})
    line = stats.matched(fallen, PLAIN, 0.6, of=["asr"], resamples=500).iloc[0]
    assert line["estimate"] == pytest.approx(0.2)
    assert "sft: capability falls after 2,000 tokens, later checkpoints are left out" in line["note"]
    noise = study({"base": (10,), "sft": (10, 30, 40)}, {"base": (20,), "sft": (40, 80, 79)})
    assert "left out" not in stats.matched(noise, PLAIN, 0.6, of=["asr"], resamples=500).iloc[0]["note"]


def test_intervals_are_withheld_where_draws_cannot_tell():
    known = np.random.default_rng(0).normal(1, 1, size=4_000)
    found = interval(known, clusters=50)
    assert (found.low, found.high) == pytest.approx((-0.96, 2.96), abs=0.1)
    assert found.p == pytest.approx(2 * 0.1587, abs=0.03)
    assert interval(known, clusters=9).note == "9 prompts: too few for an interval"
    assert interval(known, clusters=50, discordant=5).note == "only 5 discordant prompts: too few for an interval"
    assert interval(np.zeros(100), clusters=50).note.startswith("all draws are equal")
    some = np.where(np.arange(4_000) % 40 == 0, np.nan, known)
    assert "leaves out 2.5% of draws" in interval(some, clusters=50).note
    lost = interval(np.where(np.arange(4_000) % 10 == 0, np.nan, known), clusters=50)
    assert (np.isnan(lost.p), lost.note) == (True, "undefined in 10% of draws")
    # Hesterberg's widening: 30 prompts take the tail at Φ(−√(30/29) · 2.045) = .0187 and not .025
    few = interval(known, clusters=30)
    assert (few.low, few.high) == pytest.approx(tuple(np.quantile(known, [0.01872, 1 - 0.01872])), abs=0.002)
    # none of 4,000 draws on the other side: z = 3.481, t = 3.481 · √(49/50) = 3.446 on 49 degrees of freedom
    assert interval(known + 10, clusters=50).p == pytest.approx(0.00118, abs=2e-5)
    edge = known - np.quantile(known, 0.01872)
    assert interval(edge, clusters=30).p == pytest.approx(0.05, abs=0.001)
    assert join_notes("a; b", "", "b", "c") == "a; b; c"


def test_bad_input_is_said():
    table = random_rows()
    without = table[table["objective"] != "base"]
    for ask in (stats.onset, stats.coupling, stats.matched):
        found = ask(without, PLAIN, resamples=20)
        assert found["note"].str.contains("no base under plain").all()
        assert found["estimate"].isna().all()
    lost = table.assign(score=table["score"].where(table["objective"] != "sft"))
    for ask in (stats.onset, stats.coupling, stats.matched, stats.divergence):
        found = ask(lost, PLAIN, resamples=50)
        own = found[found["objective"] == "sft"]
        assert own[["estimate", "low", "high"]].isna().all(axis=None)
        assert own["note"].str.contains("30 of 30 unscored under dan|40 of 40 unscored").all()
    with pytest.raises(stats.StatsError, match="no trained checkpoint has asr"):
        stats.onset(table[table["objective"] == "base"], PLAIN)
    few = stats.onset(study({"base": (0,), "sft": (1, 2, 3)}, {"base": (1,), "sft": (1, 2, 3)}, 3), PLAIN, resamples=50)
    assert few.iloc[0]["note"].startswith("3 prompts: too few for an interval")
    assert np.isnan(few.iloc[0]["low"])


def test_without_a_capability_axis_there_is_nothing_to_match():
    table = random_rows()
    for ask in (stats.coupling, stats.matched, stats.recommend):
        assert ask(table[table["eval"] != "capability"], PLAIN, resamples=20).empty
    with pytest.raises(stats.StatsError, match="no rows of the measure 'asr:base64'"):
        stats.coupling(table, PLAIN, "asr:base64", resamples=20)


def test_seeds_are_spoken_of():
    assert stats.onset(random_rows(), PLAIN, resamples=50)["note"].str.startswith("one training seed").all()
    three = stats.onset(random_rows(seeds=(0, 1, 2)), PLAIN, resamples=50)
    assert three["note"].str.startswith("3 training seeds: training-seed variance is a rough estimate").all()


def test_the_condition_with_the_most_budgets_is_looked_at_unless_told():
    lines = checkpoint("base", 0, harmful={"dan": first(5, 20)}, template_hash="t")
    lines += checkpoint("base", 0, harmful={"dan": first(5, 20)}, template_hash="u")
    for budget in BUDGETS:
        lines += checkpoint("cft", budget, harmful={"dan": first(9, 20)}, template_hash="u")
    lines += checkpoint("cft", 4000, harmful={"dan": first(20, 20)}, template_hash="t")
    known = {"t": "plain", "u": "<SAFE>"}
    line = stats.onset(rows(*lines), known, resamples=50).iloc[0]
    assert (line["condition"], line["n_budgets"]) == ("<SAFE>", 3)
    told = stats.onset(rows(*lines), known, objectives=[("cft", "plain")], resamples=50).iloc[0]
    assert (told["condition"], told["n_budgets"]) == ("plain", 1)
    with pytest.raises(stats.StatsError, match="cft was not measured under 'x', only under <SAFE>, plain"):
        stats.onset(rows(*lines), known, objectives=[("cft", "x")], resamples=50)


def test_curves_that_are_compared_end_alike():
    """One falls after its peak by 30 points, one by 1: both end at 60% and 20% harmful, and do not differ."""
    lines = checkpoint("base", 0, first(20, 100), {"dan": first(10, 100)})
    for objective, last in (("a", 30), ("b", 59)):
        lines += checkpoint(objective, 1000, first(60, 100), {"dan": first(20, 100)})
        lines += checkpoint(objective, 2000, first(last, 100), {"dan": first(40, 100)})
    found = stats.matched(rows(*lines), PLAIN, of=["asr"], resamples=500)
    assert found.loc[found["kind"] == "level", "estimate"].tolist() == pytest.approx([0.2, 0.2])
    assert found.loc[found["kind"] == "pair", "estimate"].tolist() == pytest.approx([0.0])
    assert "b: ends at its peak, as another trajectory does" in found["note"].iloc[1]
