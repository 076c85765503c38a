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
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from leeway.stats.bounds import TIE, bounds, few, still
from leeway.stats.intervals import CHUNK, LEVEL, Floats, Ints

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
