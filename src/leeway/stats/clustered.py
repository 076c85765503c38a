"""Standard errors by prompt, what they could have detected, and intervals that cover new training runs."""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import beta, binomtest, norm, t

from leeway.stats.bounds import MIN_MOVED
from leeway.stats.intervals import LEVEL, Floats, Ints, stratum_shares
from leeway.stats.pairing import Pairs

POWER = 0.80
NOTHING = 1e-15
FLOOR = {2: 0.5}  # the share of the variance between runs that is kept however much noise explains it: by simulation
FLOOR_MORE = 0.1


def standard_error(pairs: Pairs) -> float:
    """Paired, clustered standard error of the difference; NaN where nothing varies, or one prompt is all there is.

    √( C/(C − 1) · Σ_c (Σ_{i∈c} s_i (d_i − d̄_{a(i)}))² ), s_i the share of pair i in the mean over strata (Miller
    2024, arXiv 2411.00640, §2.2 and 4.2, with the small-sample factor of Liang & Zeger as statsmodels has it).
    """
    residual = _residuals(pairs)
    where, count = _codes(pairs.clusters)
    pulls = np.bincount(where, weights=residual)
    variance = float(pulls @ pulls) * count / max(count - 1, 1)
    return math.sqrt(variance) if count > 1 and variance > NOTHING else float("nan")


def detectable(se: float, clusters: int, moved: int) -> float:
    """The smallest true difference seen with 80% power at two-sided 5% (the minimal detectable effect).

    (t_{0.975} + t_{0.80}) · se with C − 1 degrees of freedom (Bloom 1995, Eval. Rev. 19:547). Where fewer than
    MIN_MOVED prompts moved the error is not known, and it is never less than the share δ of prompts that must move
    for MIN_MOVED of C to do so in 80% of samples, P(Bin(C, δ) ≥ MIN_MOVED) = 0.80: fewer cannot reject. NaN below
    MIN_MOVED prompts.
    """
    if clusters < MIN_MOVED:
        return float("nan")
    df = clusters - 1
    known = 0.0 if math.isnan(se) else float(t.ppf(0.5 + LEVEL / 2, df) + t.ppf(POWER, df)) * se
    if moved >= MIN_MOVED and known:
        return min(known, 1.0)
    return min(max(known, float(beta.ppf(POWER, MIN_MOVED, clusters - MIN_MOVED + 1))), 1.0)


def items_needed(
    difference: float, se: float, clusters: int, bound: float, *, power: float = POWER, alpha: float = 0.05
) -> float:
    """How many prompts more would tell the difference from a bound, one-sided, if it is what was seen.

    C' = C ((z_{1−α} + z_power) · se / |difference − bound|)²; the answer is C' − C, not below 0, and infinity where the
    difference lies on the bound. Where nothing varied (se is NaN) C' is what Clopper–Pearson needs: (1 − |difference −
    bound|)^C' ≤ α.
    """
    gap = abs(difference - bound)
    if math.isnan(gap):
        return float("nan")
    if gap < 1e-12:
        return math.inf
    if math.isnan(se):
        needed = math.log(alpha) / math.log1p(-min(gap, 1 - 1e-12))
    else:
        needed = clusters * (float(norm.ppf(1 - alpha) + norm.ppf(power)) * se / gap) ** 2
    return float(max(math.ceil(needed - 1e-9) - clusters, 0))


def mcnemar(pairs: Pairs) -> float:
    """Exact p of McNemar's test (1947); NaN unless every prompt has one pair, and both answers are 0 or 1."""
    binary = np.isin(pairs.value, (0.0, 1.0)).all() and np.isin(pairs.base, (0.0, 1.0)).all()
    if not binary or len(np.unique(pairs.clusters)) != len(pairs.clusters):
        return float("nan")
    up, down = int((pairs.value > pairs.base).sum()), int((pairs.value < pairs.base).sum())
    return float(binomtest(up, up + down).pvalue) if up + down else 1.0


def over_runs(difference: float, se: float, pairs: Pairs) -> tuple[float, float]:
    """95% interval that covers new prompts and new training runs; NaN with one seed, or where nothing varies.

    Prompts and S seeds are crossed, so that with D_s the difference of one seed

        half² = t²_{0.975, C−1} V_prompt + t²_{0.975, S−1} max(V_run − V_both, f V_run)

    V_prompt is the clustered variance, V_run = Var(D_s)/S, V_both the variance of prompt × seed, which both contain
    (Cameron, Gelbach & Miller 2011, JBES 29:238: V_prompt + V_run − V_both). Each part has the degrees of freedom it
    was estimated with, as in Howe (1974, JASA 69:789); one t for the sum covers too little or far too much with 2 to
    5 seeds. f is ½ for two seeds and ⅒ for more, found by simulation (benchmarks/statistics).
    """
    seeds = np.unique(pairs.seeds)
    S = len(seeds)
    where, C = _codes(pairs.clusters)
    if S < 2 or math.isnan(se):
        return float("nan"), float("nan")
    of_seed, residual_CS = np.empty(S), np.empty((C, S))
    for s, seed in enumerate(seeds):
        at = pairs.seeds == seed
        own = pairs.at(at)
        of_seed[s] = stratum_shares(own.strata) @ (own.value - own.base)
        residual_CS[:, s] = np.bincount(where[at], weights=_residuals(own), minlength=C)
    runs = float(of_seed.var(ddof=1)) / S
    crossed = residual_CS - residual_CS.mean(axis=1, keepdims=True)
    both = float((crossed**2).sum()) * C / ((C - 1) * (S - 1) * S)
    runs = max(runs - both, FLOOR.get(S, FLOOR_MORE) * runs)
    high = 0.5 + LEVEL / 2
    half = math.sqrt((float(t.ppf(high, C - 1)) * se) ** 2 + float(t.ppf(high, S - 1)) ** 2 * runs)
    return max(difference - half, -1.0), min(difference + half, 1.0)


def extremes(pairs: Pairs, strata: int, better: str) -> tuple[float, float]:
    """The difference if all unscored answers had gone its best way and the reference's worst, and the reverse.

    Where no direction is better: the largest and the smallest difference. NaN without pairs.
    """
    if not len(pairs.value):
        return float("nan"), float("nan")
    counts = np.bincount(pairs.strata, minlength=strata)
    found = []
    for own, other in ((1.0, 0.0), (0.0, 1.0)):
        value = np.where(np.isnan(pairs.value), own, pairs.value)
        difference = value - np.where(np.isnan(pairs.base), other, pairs.base)
        inside = np.bincount(pairs.strata, weights=difference, minlength=strata) / np.maximum(counts, 1)
        found.append(round(float(np.where(counts > 0, inside, own - other).mean()), 10))
    return (found[1], found[0]) if better == "lower" else (found[0], found[1])


def _residuals(pairs: Pairs) -> Floats:
    """What each pair adds to the difference beyond its stratum's mean."""
    difference, share = pairs.value - pairs.base, stratum_shares(pairs.strata)
    total = np.bincount(pairs.strata, weights=share)
    inside = np.bincount(pairs.strata, weights=share * difference) / np.where(total > 0, total, 1.0)
    return np.asarray(share * (difference - inside[pairs.strata]), dtype=np.float64)


def _codes(clusters: Ints) -> tuple[Ints, int]:
    names, where = np.unique(clusters, return_inverse=True)
    return where.astype(np.intp), len(names)
