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
Instead a draw weights the prompts by exponentials and adds one pseudo-prompt with the worst possible difference m (1
for a difference, 1 or 0 for a rate), because a prompt that changes that much may exist and be absent from the sample:

    U = (Σ E_c w_c x_c + e · m · w) / (Σ E_c w_c + e · w),   E_c ~ Exp(1),   w = max_c w_c,

the bound of level 1 − α is the 1 − α quantile of U, and p(H0: δ ≥ b) = P(U ≥ b). With e ~ Exp(1) this is Gaffke's
bound (2005), which only needs bounded values (conjectured, no counter-example known; Learned-Miller & Thomas 2019,
arXiv 1905.06208); if every value is 0 or 1 it is Clopper & Pearson's exact bound. A whole pseudo-prompt is only
needed if values lie on a lattice of full moves, or hardly vary at all. Values in between smooth the distribution, and
half a prompt, e ~ Gamma(½) as in Jeffreys' prior, is then enough. So

    e = Exp(1) quantile · g + Gamma(½) quantile · (1 − g),   g = exp(−5 ν),   ν = Σ_c r_c² (1 − r_c)²,

with r_c = min(1, C w_c |x_c − median|). ν is the variance, in units of one prompt's full move, of what is not a full
move. For full moves at a Poisson rate plus a normal part of variance ν the smallest e = Gamma(k) that holds 5% at every
rate is k = 0.78 at ν = 0.05, 0.65 at 0.2, 0.54 at 0.5, and ½ from 1 on; ½ + ½ g is above it everywhere,
and a further move never narrows the bound. Simulated with its rivals in `benchmarks.statistics.few`.

Shapes: C clusters, M contrasts, R resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import NDArray

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


def wild_cluster_p(sums_CM: Floats, *, resamples: int, seed: int) -> Floats:
    """Return the p-values of `wild_cluster` alone, without intervals."""
    rng = np.random.default_rng(seed)
    clusters, contrasts = sums_CM.shape
    D, extreme = np.abs(sums_CM.sum(axis=0)), np.zeros(contrasts)
    for start in range(0, resamples, CHUNK):
        size = min(CHUNK, resamples - start)
        A = np.abs((rng.integers(0, 2, size=(size, clusters), dtype=np.int8) * 2.0 - 1.0) @ sums_CM)
        extreme += ((A > D + TIE).sum(axis=0) + (A >= D - TIE).sum(axis=0)) / 2
    return np.where(D <= TIE, 1.0, (extreme + 1) / (resamples + 1)).round(10)


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
    low[at], high[at] = np.minimum(low[at], drawn.low(tail)), np.maximum(high[at], drawn.high(tail))
    return low, high


def _agree_with_p(D: Floats, low: Floats, high: Floats, p: Floats) -> tuple[Floats, Floats]:
    """Exclude 0 exactly if p ≤ 0.05: ties and Monte Carlo error affect the end at 0 only."""
    rejected = p <= 1 - LEVEL + 1e-12
    low = np.where(rejected & (D > 0), np.maximum(low, OPEN), np.where(rejected, low, np.minimum(low, 0.0)))
    high = np.where(rejected & (D < 0), np.minimum(high, -OPEN), np.where(rejected, high, np.maximum(high, 0.0)))
    return low, high


@dataclass(frozen=True)
class BoundDraws:
    """Draws of the lower and the upper bound of M means, (R, M)."""

    lower_RM: Floats
    upper_RM: Floats
    support: tuple[float, float]

    def p_below(self, bound_M: Floats) -> Floats:
        """Return the p-values of H0: difference ≥ bound."""
        return _monte_carlo_p(self.upper_RM >= bound_M - TIE)

    def p_above(self, bound_M: Floats) -> Floats:
        """Return the p-values of H0: difference ≤ bound."""
        return _monte_carlo_p(self.lower_RM <= bound_M + TIE)

    def high(self, alpha: float = ALPHA) -> Floats:
        """Return the upper one-sided bounds: `p_below` rejects exactly the bounds above them."""
        return np.clip(-_order_statistic(-self.upper_RM, alpha), *self.support)

    def low(self, alpha: float = ALPHA) -> Floats:
        """Return the lower one-sided bounds."""
        return np.clip(_order_statistic(self.lower_RM, alpha), *self.support)


def bound_draws(
    sums_CM: Floats, weights_CM: Floats, *, resamples: int, seed: int, support: tuple[float, float] = (-1.0, 1.0)
) -> BoundDraws:
    """Draw the bounds of M means over C clusters, given as in `wild_cluster`; values lie in `support`, 1 or 2 wide."""
    rng = np.random.default_rng(seed)
    clusters, contrasts = sums_CM.shape
    present_M = np.maximum((weights_CM > 0).sum(axis=0), 1)
    whole_M = _whole_prompt(sums_CM, weights_CM)
    largest_M = np.maximum((weights_CM * present_M).max(axis=0), 1.0)
    u_R = (rng.permutation(resamples) + 0.5) / resamples  # stratified: less Monte Carlo error
    one_R, half_R = -np.log(u_R), scipy.special.chdtri(1, u_R) / 2  # upper quantiles of Exp(1) and Gamma(½)
    lower, upper = np.empty((resamples, contrasts)), np.empty((resamples, contrasts))
    for start in range(0, resamples, CHUNK):
        at = slice(start, min(start + CHUNK, resamples))
        weight_BC = rng.standard_exponential((at.stop - start, clusters))
        extra_BM = (one_R[at, None] * whole_M + half_R[at, None] * (1 - whole_M)) * largest_M
        sum_BM = weight_BC @ (sums_CM * present_M)
        total_BM = weight_BC @ (weights_CM * present_M) + extra_BM
        lower[at] = (sum_BM + extra_BM * support[0]) / total_BM
        upper[at] = (sum_BM + extra_BM * support[1]) / total_BM
    return BoundDraws(lower, upper, support)


def _whole_prompt(sums_CM: Floats, weights_CM: Floats) -> Floats:
    """Return g of each contrast, (M,): 1 if a whole pseudo-prompt is needed, towards 0 where half of one is enough."""
    values_CM, found = _differences(sums_CM, weights_CM), []
    for m, present_C in enumerate((weights_CM > 0).T):
        x_C, w_C = values_CM[present_C, m], weights_CM[present_C, m]
        middle = np.sort(x_C)[(len(x_C) - 1) // 2] if len(x_C) else 0.0  # a value that occurs, not between two
        move_C = np.minimum(len(x_C) * w_C * np.abs(x_C - middle), 1.0)
        found.append(np.exp(-5 * np.sum((move_C * (1 - move_C)) ** 2)))
    return np.array(found)


def few_discordant(sums_CM: Floats, weights_CM: Floats) -> NDArray[np.bool_]:
    """Return whether fewer than MIN_DISCORDANT clusters are discordant, or differ from the most frequent difference."""
    found = (np.abs(sums_CM) > TIE).sum(axis=0) < MIN_DISCORDANT
    differences_CM = _differences(sums_CM, weights_CM).round(9)
    for m in np.flatnonzero(~found):
        own = differences_CM[weights_CM[:, m] > 0, m]
        found[m] = len(own) - np.unique(own, return_counts=True)[1].max() < MIN_DISCORDANT
    return np.asarray(found)


def _differences(sums_CM: Floats, weights_CM: Floats) -> Floats:
    """Return the difference of each cluster; 0 if a contrast lacks it."""
    return np.divide(sums_CM, weights_CM, out=np.zeros_like(sums_CM), where=weights_CM > 0)


def _monte_carlo_p(hits_RM: NDArray[np.bool_]) -> Floats:
    return np.asarray((hits_RM.sum(axis=0) + 1) / (len(hits_RM) + 1), dtype=np.float64)


def _order_statistic(draws_RM: Floats, alpha: float) -> Floats:
    """Return the order statistic that agrees with p = (k + 1)/(R + 1) ≤ α."""
    k = max(int(np.floor(alpha * (len(draws_RM) + 1) + TIE)) - 1, 0)
    return np.asarray(np.partition(draws_RM, k, axis=0)[k], dtype=np.float64)
