"""Tests of a paired difference clustered by prompt: a wild cluster bootstrap of 0, and bounds for tests at a margin.

**Wild cluster bootstrap.** Each prompt (cluster) contributes d_c to the difference, its summed weighted differences,
and has weight w_c in it (Σ d_c = D, Σ w_c = 1). Under H0: difference = δ the sign of d_c − δ·w_c is a fair coin, for a
checkpoint and its base are then exchangeable prompt by prompt. With Rademacher signs ε_c and the null imposed (Liu
1988; Cameron, Gelbach & Miller 2008), and ties counted half (mid-p: Lancaster 1961; for McNemar's test Fagerland,
Lydersen & Laake 2013),

    p(δ) = P( |Σ ε_c (d_c − δ w_c)| > |D − δ| ) + ½ P( … = … ),

and the 95% interval is {δ : p(δ) > 0.05}, so interval and p-value always agree. With A = Σ ε_c d_c and B = Σ ε_c w_c,
the δ at which one flip is as extreme as the data lie between (D − A)/(1 − B) and (D + A)/(1 + B): the ends of the
interval are the 5% quantile of the smaller root and the 95% quantile of the larger one. No root-finding is needed, and
all contrasts of an axis share the flips. For one binary response per prompt, p(0) is McNemar's mid-p test by Monte
Carlo. Numerical ties are detected at δ = 0 only, where concordant prompts do not count: if mid-p rejects 0 and the
exact test would not, the interval ends at 0 without containing it, and that end is reported as ±1e-9.

**Bounds at a margin.** At a margin the signs are not fair coins: with few discordant prompts, most of them in one
direction, the distribution is skewed and sign flips reject up to 17% of true nulls (measured, docs/statistics.md).
Instead a draw weights the prompts by exponentials and adds one pseudo-prompt with the worst difference:

    U = (Σ E_c w_c x_c + e · m) / (Σ E_c w_c + e · 1/C),   E_c ~ Exp(1),

the bound of level 1 − α is the 1 − α quantile of U, and p(H0: δ ≥ b) = P(U ≥ b). With e ~ Exp(1) and m = 1 this is
Gaffke's bound (2005), which only needs differences in [−1, 1] (conjectured, no counter-example known; Learned-Miller &
Thomas 2019, arXiv 1905.06208); if every difference is 0 or 1 it is Clopper & Pearson's. It is used if fewer than
MIN_DISCORDANT prompts differ from the most frequent difference. Otherwise it is needlessly wide, and e ~ Gamma(½) with
m the largest difference observed: the half prompt of Jeffreys' prior, as mid-p is to the exact test.

Shapes: C clusters, M contrasts, R resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta

from leeway.stats.intervals import CHUNK, LEVEL, TIE, Floats, Ints

MIN_DISCORDANT = 5  # 5 of 5 in one direction: p = 2⁻⁵ by mid-p; 4 signs can neither reject nor give a bound
ALPHA = 0.05  # one-sided
OPEN = 1e-9  # reported for an end of the interval at 0 if 0 is rejected: the interval is open there


@dataclass(frozen=True)
class WildClusterTest:
    """Difference, 95% interval, p-value of 0 and number of discordant clusters, one value per contrast."""

    difference: Floats
    low: Floats
    high: Floats
    p: Floats
    n_discordant: Ints


def wild_cluster(sums_CM: Floats, weights_CM: Floats, *, resamples: int, seed: int) -> WildClusterTest:
    """Test M contrasts over C clusters; a cluster that a contrast lacks has sum and weight 0 in its column."""
    rng = np.random.default_rng(seed)
    clusters, contrasts = sums_CM.shape
    D = sums_CM.sum(axis=0)
    extreme = np.zeros(contrasts)
    lower, upper = np.empty((resamples, contrasts)), np.empty((resamples, contrasts))
    for start in range(0, resamples, CHUNK):
        size = min(CHUNK, resamples - start)
        signs_BC = rng.integers(0, 2, size=(size, clusters), dtype=np.int8) * 2.0 - 1.0
        A, B = signs_BC @ sums_CM, signs_BC @ weights_CM
        beyond, reached = np.abs(A) > np.abs(D) + TIE, np.abs(A) >= np.abs(D) - TIE
        extreme += (beyond.sum(axis=0) + reached.sum(axis=0)) / 2
        lower[start : start + size], upper[start : start + size] = _not_rejected(D, A, B)
    low = np.quantile(lower, 1 - LEVEL, axis=0, method="lower", overwrite_input=True)
    high = np.quantile(upper, LEVEL, axis=0, method="higher", overwrite_input=True)
    low, high = _widen_few_discordant(low, high, sums_CM, weights_CM, resamples=resamples, seed=seed)
    p = np.where(np.abs(D) <= TIE, 1.0, (extreme + 1) / (resamples + 1)).round(10)
    D, low, high = D.round(10) + 0.0, np.clip(low, -1, 1).round(10), np.clip(high, -1, 1).round(10)
    low, high = _agree_with_p(D, low, high, p)
    return WildClusterTest(D, low, high, p, (np.abs(sums_CM) > TIE).sum(axis=0))


def _not_rejected(D: Floats, A: Floats, B: Floats) -> tuple[Floats, Floats]:
    """Return the ends of the δ at which a flip reaches |D − δ|; unbounded if all signs are equal."""
    same = np.abs(B) >= 1 - TIE
    with np.errstate(divide="ignore", invalid="ignore"):
        one, other = (D - A) / (1 - B), (D + A) / (1 + B)
    return np.where(same, -np.inf, np.minimum(one, other)), np.where(same, np.inf, np.maximum(one, other))


def _widen_few_discordant(
    low: Floats, high: Floats, sums_CM: Floats, weights_CM: Floats, *, resamples: int, seed: int
) -> tuple[Floats, Floats]:
    """Widen the intervals of too few discordant prompts, so that "0 of 100 discordant" is not the interval [0, 0]."""
    at = np.flatnonzero(few_discordant(sums_CM, weights_CM))
    if not len(at):
        return low, high
    drawn = bound_draws(sums_CM[:, at], weights_CM[:, at], resamples=resamples, seed=seed)
    tail = (1 - LEVEL) / 2
    lowest, highest = drawn.low(tail), drawn.high(tail)
    for k, m in enumerate(at):
        if (np.abs(sums_CM[:, m]) <= TIE).all():
            highest[k] = zero_discordant_bound(int((weights_CM[:, m] > 0).sum()), tail)
            lowest[k] = -highest[k]
    low[at], high[at] = np.minimum(low[at], lowest), np.maximum(high[at], highest)
    return low, high


def _agree_with_p(D: Floats, low: Floats, high: Floats, p: Floats) -> tuple[Floats, Floats]:
    """Exclude 0 exactly if p ≤ 0.05: ties and Monte Carlo error affect the end at 0 only."""
    rejected = p <= 1 - LEVEL + 1e-12
    low = np.where(rejected & (D > 0), np.maximum(low, OPEN), np.where(rejected, low, np.minimum(low, 0.0)))
    high = np.where(rejected & (D < 0), np.minimum(high, -OPEN), np.where(rejected, high, np.maximum(high, 0.0)))
    return low, high


@dataclass(frozen=True)
class BoundDraws:
    """Draws of the lower and the upper bound of M differences, (R, M)."""

    lower_RM: Floats
    upper_RM: Floats

    def p_below(self, bound_M: Floats) -> Floats:
        """Return the p-values of H0: difference ≥ bound."""
        return _monte_carlo_p(self.upper_RM >= bound_M - TIE)

    def p_above(self, bound_M: Floats) -> Floats:
        """Return the p-values of H0: difference ≤ bound."""
        return _monte_carlo_p(self.lower_RM <= bound_M + TIE)

    def high(self, alpha: float = ALPHA) -> Floats:
        """Return the upper one-sided bounds: `p_below` rejects exactly the bounds above them."""
        return np.clip(-_order_statistic(-self.upper_RM, alpha), -1, 1)

    def low(self, alpha: float = ALPHA) -> Floats:
        """Return the lower one-sided bounds."""
        return np.clip(_order_statistic(self.lower_RM, alpha), -1, 1)


def bound_draws(sums_CM: Floats, weights_CM: Floats, *, resamples: int, seed: int) -> BoundDraws:
    """Draw the bounds of M contrasts over C clusters, given as in `wild_cluster`."""
    rng = np.random.default_rng(seed)
    clusters, contrasts = sums_CM.shape
    present_M = np.maximum((weights_CM > 0).sum(axis=0), 1)
    few_M = few_discordant(sums_CM, weights_CM)
    worst_M = np.where(few_M, 1.0, np.abs(_differences(sums_CM, weights_CM)).max(axis=0, initial=0.0))
    lower, upper = np.empty((resamples, contrasts)), np.empty((resamples, contrasts))
    for start in range(0, resamples, CHUNK):
        size = min(CHUNK, resamples - start)
        weight_BC = rng.standard_exponential((size, clusters))
        one_B, half_B = rng.standard_exponential((size, 1)), rng.standard_gamma(0.5, (size, 1))
        extra_BM = np.where(few_M, one_B, half_B)
        sum_BM = weight_BC @ (sums_CM * present_M)
        total_BM = weight_BC @ (weights_CM * present_M) + extra_BM
        lower[start : start + size] = (sum_BM - extra_BM * worst_M) / total_BM
        upper[start : start + size] = (sum_BM + extra_BM * worst_M) / total_BM
    return BoundDraws(lower, upper)


def few_discordant(sums_CM: Floats, weights_CM: Floats) -> NDArray[np.bool_]:
    """Return whether fewer than MIN_DISCORDANT clusters are discordant, or differ from the most frequent difference."""
    found = (np.abs(sums_CM) > TIE).sum(axis=0) < MIN_DISCORDANT
    differences_CM = _differences(sums_CM, weights_CM).round(9)
    for m in np.flatnonzero(~found):
        own = differences_CM[weights_CM[:, m] > 0, m]
        found[m] = len(own) - np.unique(own, return_counts=True)[1].max() < MIN_DISCORDANT
    return np.asarray(found)


def zero_discordant_bound(n: int, alpha: float) -> float:
    """Return the bound for 0 discordant of n: 1 − α^(1/n) (Clopper & Pearson 1934), the limit of the draws."""
    return float(beta.ppf(1 - alpha, 1, n)) if n else 1.0


def _differences(sums_CM: Floats, weights_CM: Floats) -> Floats:
    """Return the difference of each cluster; 0 if a contrast lacks it."""
    return np.divide(sums_CM, weights_CM, out=np.zeros_like(sums_CM), where=weights_CM > 0)


def _monte_carlo_p(hits_RM: NDArray[np.bool_]) -> Floats:
    return np.asarray((hits_RM.sum(axis=0) + 1) / (len(hits_RM) + 1), dtype=np.float64)


def _order_statistic(draws_RM: Floats, alpha: float) -> Floats:
    """Return the order statistic that agrees with p = (k + 1)/(R + 1) ≤ α."""
    k = max(int(np.floor(alpha * (len(draws_RM) + 1) + TIE)) - 1, 0)
    return np.asarray(np.partition(draws_RM, k, axis=0)[k], dtype=np.float64)
