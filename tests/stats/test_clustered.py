"""Standard errors, detectable effects, exact tests, intervals over runs: against numbers by hand and by others."""

import math

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy.stats import binom, norm, t
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar

from leeway.stats.contrasts import (
    items_needed,
    mcnemar,
    minimal_detectable_effect,
    seed_interval,
    standard_error,
    unscored_extremes,
)
from leeway.stats.pairing import Pairs


def pairs(
    value: list[float],
    base: list[float],
    clusters: list[int] | None = None,
    *,
    strata: list[int] | None = None,
    seeds: list[int] | None = None,
) -> Pairs:
    n = len(value)
    whole = [np.array(x or [0] * n, dtype=np.intp) for x in (strata, clusters or list(range(n)), seeds)]
    return Pairs(np.array(value, float), np.array(base, float), *whole, matched=np.ones(n, dtype=np.bool_))


def test_standard_error_by_hand():
    # differences 1 1 | 0 1 | 0 0 over three prompts, mean 0.5: residual sums 1, 0, −1 of 6 pairs;
    # √(3/2 · (1 + 0 + 1)/36) = √(1/12)
    found = standard_error(pairs([1, 1, 0, 1, 0, 0], [0] * 6, [0, 0, 1, 1, 2, 2]))
    assert found == pytest.approx(math.sqrt(1 / 12))


def test_standard_error_agrees_with_statsmodels_cluster_robust_ols():
    rng = np.random.default_rng(0)
    clusters = np.sort(rng.integers(0, 40, size=200))
    d = rng.normal(0.2, 1, size=200) + rng.normal(size=40)[clusters]
    fit = sm.OLS(d, np.ones(200)).fit(cov_type="cluster", cov_kwds={"groups": clusters})
    found = standard_error(pairs(list(d), [0.0] * 200, list(clusters)))
    assert found == pytest.approx(float(fit.bse[0]), rel=1e-9)


def test_standard_error_over_attacks_agrees_with_statsmodels_up_to_its_small_sample_factor():
    rng = np.random.default_rng(1)
    clusters, attacks = np.repeat(np.arange(50), 3), np.tile(np.arange(3), 50)
    d = rng.normal(size=150) + np.array([0.0, 0.5, 1.0])[attacks] + rng.normal(size=50)[clusters]
    kept = np.delete(np.arange(150), [1, 7, 40])  # attacks of unequal size
    d, clusters, attacks = d[kept], clusters[kept], attacks[kept]
    fit = sm.OLS(d, np.eye(3)[attacks]).fit(cov_type="cluster", cov_kwds={"groups": clusters})
    mean = np.full(3, 1 / 3)
    theirs = math.sqrt(mean @ fit.cov_params() @ mean / ((147 - 1) / (147 - 3)))
    assert standard_error(pairs(list(d), [0.0] * 147, list(clusters), strata=list(attacks))) == pytest.approx(theirs)


def test_clustering_and_pairing_both_matter():
    # Miller (2024, §4.2): pairing removes what base and checkpoint share; here they share nearly all
    rng = np.random.default_rng(2)
    hard = rng.normal(size=300)
    base, tuned = hard + 0.1 * rng.normal(size=300), hard + 0.1 * rng.normal(size=300)
    unpaired = math.sqrt(base.var(ddof=1) / 300 + tuned.var(ddof=1) / 300)
    assert standard_error(pairs(list(tuned), list(base))) < 0.2 * unpaired


@pytest.mark.parametrize("values", [[0.0] * 10, [1.0] * 10, [1.0]])
def test_no_standard_error_where_nothing_varies(values: list[float]):
    assert math.isnan(standard_error(pairs(values, [0.0] * len(values))))


def test_detectable_by_hand():
    # 101 prompts, se 0.02: t₀.₉₇₅ = 1.98397, t₀.₈₀ = 0.84523 with 100 degrees of freedom
    assert minimal_detectable_effect(0.02, 101, 30) == pytest.approx(0.02 * (1.98397 + 0.84523), abs=1e-6)
    assert minimal_detectable_effect(0.02, 101, 30) == pytest.approx(0.02 * float(t.ppf(0.975, 100) + t.ppf(0.8, 100)))


@pytest.mark.parametrize("n", [10, 100, 300])
def test_detectable_where_nothing_moved_is_what_lets_five_move(n: int):
    found = minimal_detectable_effect(float("nan"), n, 0)
    assert 0 < found < 1
    assert 1 - binom.cdf(4, n, found) == pytest.approx(0.80)
    assert minimal_detectable_effect(float("nan"), n, n) == found  # all moved alike: no error either
    assert minimal_detectable_effect(0.9, n, 2) == 1  # never more than all there is


def test_four_prompts_can_detect_nothing():
    assert math.isnan(minimal_detectable_effect(0.1, 4, 4))


def test_items_needed_by_hand():
    # 100 prompts, 0.02 ± 0.02 against 0.05: C' = 100 · ((1.6449 + 0.8416) · 0.02/0.03)² = 274.8
    assert items_needed(0.02, 0.02, 100, 0.05) == 175
    needed = 100 * ((norm.ppf(0.95) + norm.ppf(0.8)) * 0.02 / 0.03) ** 2
    assert math.ceil(needed) - 100 == 175
    assert items_needed(0.0, 0.001, 100, 0.05) == 0
    assert items_needed(0.05, 0.02, 100, 0.05) == math.inf
    # nothing moved: (1 − 0.05)^59 < 0.05 < (1 − 0.05)^58
    assert items_needed(0.0, float("nan"), 20, 0.05) == 39
    assert math.isnan(items_needed(float("nan"), 0.1, 20, 0.05))


@pytest.mark.parametrize(("up", "down"), [(9, 2), (6, 0), (0, 0), (3, 3), (1, 12)])
def test_mcnemar_agrees_with_statsmodels(up: int, down: int):
    value = [1.0] * up + [0.0] * down + [1.0] * 20 + [0.0] * 30
    base = [0.0] * up + [1.0] * down + [1.0] * 20 + [0.0] * 30
    theirs = statsmodels_mcnemar([[30, up], [down, 20]], exact=True).pvalue
    assert mcnemar(pairs(value, base)) == pytest.approx(min(float(theirs), 1.0))


def test_mcnemar_is_for_single_binaries():
    assert math.isnan(mcnemar(pairs([0.5, 1.0], [0.0, 0.0])))
    assert math.isnan(mcnemar(pairs([1.0, 1.0], [0.0, 0.0], [0, 0])))


def test_interval_over_runs_by_hand():
    # two seeds, three prompts; d = 1 0 0 and 1 1 1: D_s = 1/3, 1; V_run = Var(1/3, 1)/2 = 1/9; D = 2/3
    p = pairs([1, 0, 0, 1, 1, 1], [0] * 6, [0, 1, 2] * 2, seeds=[0, 0, 0, 1, 1, 1])
    se = standard_error(p)
    # the prompts' sums 2 1 1 of 6 pairs are 2/3 −1/3 −1/3 off their mean
    assert se**2 == pytest.approx(3 / 2 * ((1 / 9) ** 2 + 2 * (1 / 18) ** 2))
    # crossed residuals: seed 0: (2/3 −1/3 −1/3)/3, seed 1: 0; minus their means over seeds: ±(1/9 −1/18 −1/18)
    both = 2 * ((1 / 9) ** 2 + 2 * (1 / 18) ** 2) * 3 / (2 * 1 * 2)
    runs = max(1 / 9 - both, 0.5 / 9)
    half = math.sqrt(float(t.ppf(0.975, 2)) ** 2 * se**2 + float(t.ppf(0.975, 1)) ** 2 * runs)
    assert seed_interval(2 / 3, se, p) == (max(2 / 3 - half, -1), min(2 / 3 + half, 1))
    assert half > 1  # two runs of three prompts say next to nothing


def test_interval_over_runs_grows_with_their_spread_and_needs_two():
    rng = np.random.default_rng(0)
    clusters, seeds = list(np.tile(np.arange(200), 3)), list(np.repeat(np.arange(3), 200))
    alike = rng.random(600) < 0.3
    apart = rng.random(600) < np.repeat([0.1, 0.3, 0.5], 200)
    widths = []
    for drawn in (alike, apart):
        p = pairs(list(drawn.astype(float)), [0.0] * 600, clusters, seeds=seeds)
        low, high = seed_interval(float(drawn.mean()), standard_error(p), p)
        widths.append(high - low)
    assert widths[1] > 4 * widths[0]
    one = pairs([1.0, 0.0, 1.0], [0.0] * 3)
    assert all(math.isnan(x) for x in seed_interval(2 / 3, standard_error(one), one))


def test_extremes_by_hand():
    nan = float("nan")
    # 1, ?, 0 against 0, 0, ?: the best 1 1 0 − 0 0 0 = 2/3, the worst 1 0 0 − 0 0 1 = 0
    p = pairs([1, nan, 0], [0, 0, nan])
    assert unscored_extremes(p, 1, "higher") == pytest.approx((2 / 3, 0))
    assert unscored_extremes(p, 1, "lower") == pytest.approx((0, 2 / 3))
    assert unscored_extremes(p, 1, "") == pytest.approx((2 / 3, 0))
    assert unscored_extremes(p, 2, "higher") == pytest.approx((5 / 6, -1 / 2))  # a stratum that was not asked at all
    assert all(math.isnan(x) for x in unscored_extremes(p.subset(np.zeros(3, dtype=np.bool_)), 1, "higher"))


def test_the_clustered_error_is_what_resampling_prompts_finds():
    rng = np.random.default_rng(4)
    d = pd.DataFrame({"c": np.repeat(np.arange(80), 5), "d": (rng.random(400) < np.repeat(rng.random(80), 5)) * 1.0})
    sums = d.groupby("c")["d"].sum().to_numpy()
    draws = sums[rng.integers(0, 80, size=(4_000, 80))].sum(axis=1) / 400
    assert standard_error(pairs(list(d["d"]), [0.0] * 400, list(d["c"]))) == pytest.approx(draws.std(), rel=0.04)
