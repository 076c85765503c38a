"""The wild cluster bootstrap of a paired difference: p-value and interval from one set of sign flips.

Each prompt (cluster) pulls the difference by d_c, its summed share, and weighs w_c in it (Σ d_c = D, Σ w_c =
1). If the true difference were δ, the sign of d_c − δ·w_c would be a coin's: a checkpoint and its base would
be exchangeable prompt by prompt. With Rademacher signs ε_c and the null imposed (Liu 1988; Cameron, Gelbach &
Miller 2008)

    p(δ) = P( |Σ ε_c (d_c − δ w_c)| ≥ |D − δ| ),

and the 95% interval is {δ : p(δ) > 0.05}, so that interval and p-value never disagree. With A = Σ ε_c d_c and
B = Σ ε_c w_c, the δ at which one flip is as extreme as what was seen lie between (D − A)/(1 − B) and
(D + A)/(1 + B): the interval's ends are the 5% quantile of the smaller root and the 95% quantile of the
larger one. No root-finding, and all contrasts of an axis share the flips. For one binary answer per prompt,
p(0) is McNemar's exact test by Monte Carlo.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import beta

from leeway.stats.intervals import CHUNK, LEVEL, Floats, Ints

MIN_MOVED = 6  # with 5 moved clusters the smallest two-sided p is 2·2⁻⁵ = 0.0625: flips alone cannot bound anything
TIE = 1e-9  # two sums of the same pulls in another order differ by rounding


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
        extreme += (np.abs(A) >= np.abs(D) - TIE).sum(axis=0)
        lower[start : start + size], upper[start : start + size] = _unrejected(D, A, B)
    low = np.quantile(lower, 1 - LEVEL, axis=0, method="lower", overwrite_input=True)
    high = np.quantile(upper, LEVEL, axis=0, method="higher", overwrite_input=True)
    moved = (np.abs(pulls_CM) > TIE).sum(axis=0)
    for m in np.flatnonzero(moved < MIN_MOVED):
        bound = few_moved(pulls_CM[:, m], weights_CM[:, m])
        low[m], high[m] = min(low[m], bound[0]), max(high[m], bound[1])
    p = (extreme + 1) / (resamples + 1)
    low, high = np.clip(low, -1, 1), np.clip(high, -1, 1)
    return Tested(D.round(10), low.round(10), high.round(10), p.round(10), moved)


def _unrejected(D: Floats, A: Floats, B: Floats) -> tuple[Floats, Floats]:
    """The δ between which one flip reaches |D − δ|; all of them where every sign is the same."""
    same = np.abs(B) >= 1 - TIE
    with np.errstate(divide="ignore", invalid="ignore"):
        one, other = (D - A) / (1 - B), (D + A) / (1 + B)
    return np.where(same, -np.inf, np.minimum(one, other)), np.where(same, np.inf, np.maximum(one, other))


def few_moved(pulls_C: Floats, weights_C: Floats) -> tuple[float, float]:
    """A bound where hardly any prompt moved (so that '0 of 100 moved' is not the interval [0, 0]).

    Clopper–Pearson bounds on the shares of prompts that moved up and down, times the largest move (1 if
    none).
    """
    n = int((weights_C > 0).sum())
    if n == 0:
        return -1.0, 1.0
    up, down = int((pulls_C > TIE).sum()), int((pulls_C < -TIE).sum())
    size = min(1.0, float(np.abs(pulls_C).max()) * n) if up + down else 1.0
    low = _share(up, n)[0] - _share(down, n)[1]
    high = _share(up, n)[1] - _share(down, n)[0]
    return size * low, size * high


def _share(k: int, n: int) -> tuple[float, float]:
    """Clopper & Pearson 1934."""
    tail = (1 - LEVEL) / 2
    low = float(beta.ppf(tail, k, n - k + 1)) if k else 0.0
    high = float(beta.ppf(1 - tail, k + 1, n - k)) if k < n else 1.0
    return low, high
