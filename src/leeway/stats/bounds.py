"""One-sided bounds on a mean difference, for tests at a margin: valid where few prompts moved, or none.

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

from leeway.stats.intervals import CHUNK, Floats

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
