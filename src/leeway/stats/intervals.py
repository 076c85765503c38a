"""Intervals for one rate: Wilson for binary scores, a cluster bootstrap for scores between 0 and 1."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

Floats = NDArray[np.float64]
Ints = NDArray[np.intp]

LEVEL = 0.95
RESAMPLES = 10_000
CHUNK = 2_000  # resamples held at once: 2,000 × 1,319 prompts of GSM8K are 21 MB


@dataclass(frozen=True)
class Estimate:
    """A mean over strata (attacks, say; one stratum is a plain mean) with its interval."""

    mean: float
    low: float
    high: float
    clusters: int
    method: str


def wilson(successes: float, n: float, level: float = LEVEL) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927, JASA 22:209).

    (p + z²/2n ± z·√(p(1−p)/n + z²/4n²)) / (1 + z²/n), which stays inside [0, 1] and is open at 0 of n.
    """
    if n <= 0:
        raise ValueError("a Wilson interval needs at least one trial")
    z = float(norm.ppf(0.5 + level / 2))
    p = successes / n
    centre = p + z * z / (2 * n)
    half = z * float(np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)))
    scale = 1 + z * z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def stratum_shares(strata: Ints) -> Floats:
    """The weight of each value in the mean over strata of the mean inside each stratum."""
    counts = np.bincount(strata)
    present = int((counts > 0).sum())
    return 1.0 / (present * counts[strata])


def effective_n(values: Floats, strata: Ints, clusters: Ints) -> float:
    """How many independent trials the clustered values are worth: p(1−p) / cluster-robust variance.

    The variance is the sum over clusters of squared summed deviations, C/(C−1) corrected (Miller 2024,
    arXiv 2411.00640, §2.2). It is capped at the number of values; where nothing varies, a cluster counts
    once.
    """
    n, count = len(values), int(clusters.max()) + 1
    if n == count and strata.max() == strata.min():
        return float(n)
    share = stratum_shares(strata)
    mean = float(share @ values)
    inside = np.bincount(strata, weights=share * values) / np.bincount(strata, weights=share)
    pulls = np.bincount(clusters, weights=share * (values - inside[strata]))
    variance = float(pulls @ pulls) * count / max(count - 1, 1)
    if variance <= 1e-15:
        return float(count)
    return float(min(n, max(mean * (1 - mean) / variance, 1.0)))


def estimate(values: Floats, strata: Ints, clusters: Ints, *, seed: int = 0) -> Estimate:
    """The mean over strata with a 95% interval that takes the prompts, not the answers, as independent.

    Binary scores: Wilson on the effective number of trials (Dean & Pagano 2015, J. Surv. Stat. Methodol.
    3:484), plain Wilson where every prompt was answered once. Other scores: percentile cluster bootstrap.
    """
    mean = float(stratum_shares(strata) @ values)
    count = int(clusters.max()) + 1
    if np.isin(values, (0.0, 1.0)).all():
        n = effective_n(values, strata, clusters)
        low, high = wilson(mean * n, n)
        method = "wilson" if n == len(values) else "wilson, clustered"
    else:
        low, high = bootstrap_mean(values, strata, clusters, seed=seed)
        method = "cluster bootstrap"
    return Estimate(round(mean, 10), round(low, 10), round(high, 10), count, method)


def bootstrap_mean(
    values: Floats, strata: Ints, clusters: Ints, *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean, drawing whole clusters (Davison & Hinkley 1997, §3.8)."""
    levels, strata = np.unique(strata, return_inverse=True)
    count = int(clusters.max()) + 1
    cell = clusters * len(levels) + strata
    size = count * len(levels)
    sums_CS = np.bincount(cell, weights=values, minlength=size).reshape(count, -1)
    counts_CS = np.bincount(cell, minlength=size).reshape(count, -1).astype(float)
    draws_BC, means = _draws(count, resamples, seed), []
    for start in range(0, resamples, CHUNK):
        weights_BC = draws_BC[start : start + CHUNK].astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            means.append((weights_BC @ sums_CS / (weights_BC @ counts_CS)).mean(axis=1))
    low, high = np.nanquantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


@lru_cache(maxsize=2)
def _draws(clusters: int, resamples: int, seed: int) -> NDArray[np.uint16]:
    """How often each cluster is drawn in each resample; the same for all checkpoints of an axis."""
    rng = np.random.default_rng(seed)
    drawn_BC = rng.integers(0, clusters, size=(resamples, clusters))
    drawn_BC += np.arange(resamples)[:, None] * clusters
    counts = np.bincount(drawn_BC.ravel(), minlength=resamples * clusters)
    return counts.astype(np.uint16).reshape(resamples, clusters)
