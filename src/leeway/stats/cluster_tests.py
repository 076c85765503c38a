"""The wild cluster bootstrap of a paired difference: p-value and interval from one set of sign flips.

Each prompt (cluster) pulls the difference by d_c, its summed share, and weighs w_c in it (Σ d_c = D, Σ w_c =
1). If the true difference were δ, the sign of d_c − δ·w_c would be a coin's: a checkpoint and its base would
be exchangeable prompt by prompt. With Rademacher signs ε_c and the null imposed (Liu 1988; Cameron, Gelbach &
Miller 2008), and ties counted half (mid-p: Lancaster 1961; for McNemar's test Fagerland, Lydersen & Laake 2013),

    p(δ) = P( |Σ ε_c (d_c − δ w_c)| > |D − δ| ) + ½ P( … = … ),

and the 95% interval is {δ : p(δ) > 0.05}, so that interval and p-value never disagree. With A = Σ ε_c d_c and B = Σ
ε_c w_c, the δ at which one flip is as extreme as what was seen lie between (D − A)/(1 − B) and (D + A)/(1 + B): the
interval's ends are the 5% quantile of the smaller root and the 95% quantile of the larger one. No root-finding, and
all contrasts of an axis share the flips. For one binary answer per prompt, p(0) is McNemar's mid-p test by Monte
Carlo. Ties in number are found at δ = 0 alone, where unmoved prompts have no say: where mid-p rejects 0 and the exact
test would not, the interval ends at 0 without containing it, and that end reads ±1e-9.

One-sided bounds on a mean difference, for tests at a margin: valid where few prompts moved, or none.

At a difference of 0 the signs of the prompts' moves are coins (`stats.wild`). At a margin they are not: where few
prompts moved, and most of them one way, the distribution is skewed and flipping signs rejects up to 17% of true nulls
(measured, docs/statistics.md). Here a draw weighs the prompts by exponentials, and one made-up prompt more, with the
worst move:

    U = (Σ E_c w_c x_c + e · m) / (Σ E_c w_c + e · 1/C),   E_c ~ Exp(1),

the bound of level 1 − α is the 1 − α quantile of U, and p(H0: δ ≥ b) = P(U ≥ b). With e ~ Exp(1) and m = 1 this is
Gaffke's bound (2005), which needs nothing but moves in [−1, 1] (conjectured, no counter-example known; Learned-Miller &
Thomas 2019, arXiv 1905.06208); where every move is 0 or 1 it is Clopper & Pearson's. It is used where fewer than
MIN_MOVED prompts differ from the commonest move. Elsewhere it is needlessly wide, and e ~ Gamma(½), m the largest move
seen: the half prompt of Jeffreys' prior, as mid-p is to the exact test.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta

from leeway.stats.intervals import CHUNK, LEVEL, Floats, Ints

MIN_MOVED = 5  # 5 of 5 moved one way: p = 2⁻⁵ by mid-p; with 4 signs alone cannot reject, nor bound anything
TIE = 1e-9  # two sums of the same pulls in another order differ by rounding
LEVEL_ONE = 0.05


@dataclass(frozen=True)
class Bounds:
    """Draws of the lower and the upper bound, (resamples, contrasts)."""

    lower_RM: Floats
    upper_RM: Floats

    def p_below(self, bound_M: Floats) -> Floats:
        """p of H0: the difference is `bound` or more; small where it lies below."""
        return _share(self.upper_RM >= bound_M - TIE)

    def p_above(self, bound_M: Floats) -> Floats:
        """p of H0: the difference is `bound` or less; small where it lies above."""
        return _share(self.lower_RM <= bound_M + TIE)

    def high(self, alpha: float = LEVEL_ONE) -> Floats:
        """The upper one-sided bound: p_below rejects every bound above it, and no other."""
        return np.clip(-_smallest(-self.upper_RM, alpha), -1, 1)

    def low(self, alpha: float = LEVEL_ONE) -> Floats:
        return np.clip(_smallest(self.lower_RM, alpha), -1, 1)


def bounds(pulls_CM: Floats, weights_CM: Floats, *, resamples: int, seed: int) -> Bounds:
    """Draws for M contrasts over C clusters, as `wild_cluster` takes them."""
    rng = np.random.default_rng(seed)
    clusters, contrasts = pulls_CM.shape
    present_M = np.maximum((weights_CM > 0).sum(axis=0), 1)
    few_M = few(pulls_CM, weights_CM)
    worst_M = np.where(few_M, 1.0, np.abs(moves(pulls_CM, weights_CM)).max(axis=0, initial=0.0))
    lower, upper = np.empty((resamples, contrasts)), np.empty((resamples, contrasts))
    for start in range(0, resamples, CHUNK):
        size = min(CHUNK, resamples - start)
        weigh_BC = rng.standard_exponential((size, clusters))
        one_B, half_B = rng.standard_exponential((size, 1)), rng.standard_gamma(0.5, (size, 1))
        extra_BM = np.where(few_M, one_B, half_B)
        moved_BM = weigh_BC @ (pulls_CM * present_M)
        total_BM = weigh_BC @ (weights_CM * present_M) + extra_BM
        lower[start : start + size] = (moved_BM - extra_BM * worst_M) / total_BM
        upper[start : start + size] = (moved_BM + extra_BM * worst_M) / total_BM
    return Bounds(lower, upper)


def moves(pulls_CM: Floats, weights_CM: Floats) -> Floats:
    """How far each cluster moved by itself; 0 where a contrast lacks it."""
    return np.divide(pulls_CM, weights_CM, out=np.zeros_like(pulls_CM), where=weights_CM > 0)


def few(pulls_CM: Floats, weights_CM: Floats) -> NDArray[np.bool_]:
    """Whether fewer than MIN_MOVED clusters moved at all, or moved otherwise than the commonest move."""
    found = (np.abs(pulls_CM) > TIE).sum(axis=0) < MIN_MOVED
    of_cluster = moves(pulls_CM, weights_CM).round(9)
    for m in np.flatnonzero(~found):
        own = of_cluster[weights_CM[:, m] > 0, m]
        found[m] = len(own) - np.unique(own, return_counts=True)[1].max() < MIN_MOVED
    return np.asarray(found)


def still(n: int, alpha: float) -> float:
    """The bound where none of n prompts moved: 1 − α^(1/n) (Clopper & Pearson 1934), which the draws only approach."""
    return float(beta.ppf(1 - alpha, 1, n)) if n else 1.0


def _share(hits_RM: NDArray[np.bool_]) -> Floats:
    return np.asarray((hits_RM.sum(axis=0) + 1) / (len(hits_RM) + 1), dtype=np.float64)


def _smallest(draws_RM: Floats, alpha: float) -> Floats:
    """The order statistic that agrees with p = (k + 1)/(R + 1) ≤ α."""
    k = max(int(np.floor(alpha * (len(draws_RM) + 1) + TIE)) - 1, 0)
    return np.asarray(np.partition(draws_RM, k, axis=0)[k], dtype=np.float64)


OPEN = 1e-9  # an end that lies at 0 though 0 is rejected: the interval is open there


@dataclass(frozen=True)
class Tested:
    """One value per contrast."""

    difference: Floats
    low: Floats
    high: Floats
    p: Floats
    moved: Ints


def wild_cluster(pulls_CM: Floats, weights_CM: Floats, *, resamples: int, seed: int) -> Tested:
    """Test M contrasts over C clusters; one that a contrast lacks has pull and weight 0 in its column."""
    rng = np.random.default_rng(seed)
    clusters, contrasts = pulls_CM.shape
    D = pulls_CM.sum(axis=0)
    extreme = np.zeros(contrasts)
    lower, upper = np.empty((resamples, contrasts)), np.empty((resamples, contrasts))
    for start in range(0, resamples, CHUNK):
        size = min(CHUNK, resamples - start)
        signs_BC = rng.integers(0, 2, size=(size, clusters), dtype=np.int8) * 2.0 - 1.0
        A, B = signs_BC @ pulls_CM, signs_BC @ weights_CM
        beyond, reached = np.abs(A) > np.abs(D) + TIE, np.abs(A) >= np.abs(D) - TIE
        extreme += (beyond.sum(axis=0) + reached.sum(axis=0)) / 2
        lower[start : start + size], upper[start : start + size] = _unrejected(D, A, B)
    low = np.quantile(lower, 1 - LEVEL, axis=0, method="lower", overwrite_input=True)
    high = np.quantile(upper, LEVEL, axis=0, method="higher", overwrite_input=True)
    low, high = _bounded(low, high, pulls_CM, weights_CM, resamples=resamples, seed=seed)
    p = np.where(np.abs(D) <= TIE, 1.0, (extreme + 1) / (resamples + 1)).round(10)
    D, low, high = D.round(10) + 0.0, np.clip(low, -1, 1).round(10), np.clip(high, -1, 1).round(10)
    low, high = _agreeing(D, low, high, p)
    return Tested(D, low, high, p, (np.abs(pulls_CM) > TIE).sum(axis=0))


def _bounded(
    low: Floats, high: Floats, pulls_CM: Floats, weights_CM: Floats, *, resamples: int, seed: int
) -> tuple[Floats, Floats]:
    """Widen what rests on too few prompts, so that '0 of 100 moved' is not the interval [0, 0]."""
    at = np.flatnonzero(few(pulls_CM, weights_CM))
    if not len(at):
        return low, high
    drawn = bounds(pulls_CM[:, at], weights_CM[:, at], resamples=resamples, seed=seed)
    tail = (1 - LEVEL) / 2
    lowest, highest = drawn.low(tail), drawn.high(tail)
    for k, m in enumerate(at):
        if (np.abs(pulls_CM[:, m]) <= TIE).all():
            highest[k] = still(int((weights_CM[:, m] > 0).sum()), tail)
            lowest[k] = -highest[k]
    low[at], high[at] = np.minimum(low[at], lowest), np.maximum(high[at], highest)
    return low, high


def _agreeing(D: Floats, low: Floats, high: Floats, p: Floats) -> tuple[Floats, Floats]:
    """The interval excludes 0 exactly where p ≤ 0.05: ties and Monte Carlo error touch its end at 0 alone."""
    rejected = p <= 1 - LEVEL + 1e-12
    low = np.where(rejected & (D > 0), np.maximum(low, OPEN), np.where(rejected, low, np.minimum(low, 0.0)))
    high = np.where(rejected & (D < 0), np.minimum(high, -OPEN), np.where(rejected, high, np.maximum(high, 0.0)))
    return low, high


def _unrejected(D: Floats, A: Floats, B: Floats) -> tuple[Floats, Floats]:
    """The δ between which one flip reaches |D − δ|; all of them where every sign is the same."""
    same = np.abs(B) >= 1 - TIE
    with np.errstate(divide="ignore", invalid="ignore"):
        one, other = (D - A) / (1 - B), (D + A) / (1 + B)
    return np.where(same, -np.inf, np.minimum(one, other)), np.where(same, np.inf, np.maximum(one, other))
