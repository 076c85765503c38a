"""Dose and response: attack success by the share of compliant answers in the training data, and the limit of detection.

**Limit of detection.** The smallest dose from which the two-sided 5% test of `contrasts`, dose against dose 0, rejects
upwards with 80% power, with this study's prompts and judge. Between two doses of the study, at share s = (1 − u) s_k +
u s_{k+1}, a prompt's difference to dose 0 is taken from dose k + 1 with probability u and from dose k otherwise, so
its mean, its second moment and the share π of discordant prompts are interpolated linearly. With mean δ and standard
deviation σ over C prompts

    power(s) = min( T_{C−1}(δ √C / σ − t_{0.975, C−1}), P(Bin(C, π) ≥ MIN_DISCORDANT) ),

as in `contrasts.minimal_detectable_effect` (Bloom 1995): fewer discordant prompts cannot reject. The limit is the dose
from which the power is at least 80% up to the largest dose; infinite if the largest has less. The interval is the 95%
percentile interval over bootstrap draws of prompts. It covers neither another training seed nor another set of answers.

Shapes: C clusters, K doses including 0, B bootstrap draws, G points of the grid of doses.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import scipy

from leeway.stats.cluster_tests import MIN_DISCORDANT
from leeway.stats.contrasts import POWER, by_axis, contrasts
from leeway.stats.intervals import LEVEL, NAN, NO_VARIANCE, TAILS, TIE, Floats
from leeway.stats.pairing import paired_contrasts
from leeway.stats.rates import rates

DRAWS = 1000
STEPS = 200  # points of the grid between two doses
DOSE = ["measure", "label", "share", "objective", "rate", "low", "high", "difference", "difference_low"]
DOSE += ["difference_high", "p", "power", "n_clusters", "n_discordant", "seeds"]
DETECTION = ["measure", "label", "limit", "low", "high", "largest", "rising", "n_clusters", "note"]


def dose_response(
    rows: pd.DataFrame, conditions: Mapping[str, str], shares: Mapping[str, float], *, seed: int = 0
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return (one line per measure and dose, one line per measure with its limit of detection).

    `rows` are those of the arms `shares`, at one budget under one condition; the one with share 0 is the reference of
    all differences. `rising`: whether the rate never falls from one dose to the next.
    """
    zero = next(name for name, share in shares.items() if share == 0)
    known = {(r["objective"], r["measure"]): r for r in rates(rows, conditions, pool_seeds=True).to_dict("records")}
    tests = contrasts(rows, conditions, against=(zero, None), seed=seed)
    tests = tests[tests["axis"] == "jailbreak"]
    wanted = [m for m in dict.fromkeys(tests["measure"]) if m == "asr" or m.startswith("asr:")]
    by_share, lines, limits = sorted(shares, key=lambda name: shares[name]), [], []
    moments = _moments(rows, conditions, zero, by_share[1:], wanted)
    for measure in wanted:
        curve = [known[name, measure] for name in by_share]
        share_K, found = np.array([shares[name] for name in by_share]), moments.get(measure)
        power_K = [NAN] * len(by_share) if found is None else power(*_at(found, np.full(len(found), 1 / len(found))))
        for name, rate, power_k in zip(by_share, curve, np.ravel(power_K), strict=True):
            own = tests[(tests["objective"] == name) & (tests["measure"] == measure)].to_dict("records")
            test = own[0] if own else {"difference": 0.0, "low": NAN, "high": NAN, "p": NAN, "n_discordant": 0}
            line = {"measure": measure, "label": rate["label"], "share": shares[name], "objective": name}
            line |= {k: rate[k] for k in ("rate", "low", "high", "n_clusters")}
            line |= {"difference": test["difference"], "difference_low": test["low"], "difference_high": test["high"]}
            line |= {"p": test["p"], "n_discordant": test["n_discordant"], "power": round(float(power_k), 4)}
            lines.append(line | {"seeds": str(test.get("seeds", ""))})
        rising = bool((np.diff([rate["rate"] for rate in curve]) >= -TIE).all())
        limit = {"measure": measure, "label": curve[0]["label"], "largest": share_K[-1], "rising": rising}
        if found is None:
            limits.append(limit | {"note": "too many unscored answers"})
            continue
        point, low, high = detection_limit(found, share_K, seed=seed)
        limits.append(limit | {"limit": point, "low": low, "high": high, "n_clusters": len(found), "note": ""})
    return pd.DataFrame(lines, columns=DOSE), pd.DataFrame(limits, columns=DETECTION)


def _moments(
    rows: pd.DataFrame, conditions: Mapping[str, str], zero: str, doses: Sequence[str], measures: Sequence[str]
) -> dict[str, Floats]:
    """Return each measure's differences to dose 0, (C, K), over prompts that every dose has; dose 0 comes first."""
    found, table = paired_contrasts(rows, conditions, against=(zero, None), only=measures)
    columns: dict[str, dict[str, Floats]] = {}
    for _, matrix in by_axis(found, table):
        for m, contrast in enumerate(matrix.contrasts):
            weights_C = matrix.weights_CM[:, m]
            with np.errstate(invalid="ignore"):
                own = np.where(weights_C > 0, matrix.sums_CM[:, m] / np.where(weights_C > 0, weights_C, 1.0), NAN)
            columns.setdefault(contrast.measure.name, {})[str(contrast.line["objective"])] = own
    complete = {}
    for measure, by_dose in columns.items():
        if set(by_dose) == set(doses):
            difference_CK = np.column_stack([by_dose[name] for name in doses])
            kept = difference_CK[~np.isnan(difference_CK).any(axis=1)]
            complete[measure] = np.hstack([np.zeros((len(kept), 1)), kept])
    return complete


def detection_limit(
    difference_CK: Floats, share_K: Floats, *, draws: int = DRAWS, seed: int = 0
) -> tuple[float, float, float]:
    """Return (limit of detection, 95% interval) from the differences to dose 0 of C prompts at K doses, the first 0."""
    clusters = len(difference_CK)
    weights_BC = np.random.default_rng(seed).multinomial(clusters, [1 / clusters] * clusters, size=draws) / clusters
    point = _limits(difference_CK, np.full((1, clusters), 1 / clusters), share_K)[0]
    drawn = np.sort(_limits(difference_CK, weights_BC, share_K))
    ends = [drawn[int(np.floor(TAILS[0] * (draws - 1)))], drawn[int(np.ceil(TAILS[1] * (draws - 1)))]]
    return float(point), float(ends[0]), float(ends[1])


def _limits(difference_CK: Floats, weights_BC: Floats, share_K: Floats) -> Floats:
    """Return the limit of detection of each draw of prompts, (B,)."""
    moments = _at(difference_CK, weights_BC)
    segments = [np.linspace(a, b, STEPS, endpoint=False) for a, b in itertools.pairwise(share_K)]
    grid = np.append(np.concatenate(segments), share_K[-1])
    k = np.clip(np.searchsorted(share_K, grid, side="right") - 1, 0, len(share_K) - 2)
    u = (grid - share_K[k]) / (share_K[k + 1] - share_K[k])
    mean, square, discordant = ((1 - u) * m[:, k] + u * m[:, k + 1] for m in moments[:3])
    power_BG = power(mean, square, discordant, moments[3])
    low_enough = np.where(power_BG < POWER, np.arange(len(grid)), -1).max(axis=1)  # the last point below 80%
    return np.asarray(np.append(grid, np.inf)[low_enough + 1])


def _at(difference_CK: Floats, weights_BC: Floats) -> tuple[Floats, Floats, Floats, int]:
    """Return the weighted mean, second moment and discordant share of each dose, (B, K), and the number of prompts."""
    weights_BC = np.atleast_2d(weights_BC)
    parts = (difference_CK, difference_CK**2, (np.abs(difference_CK) > TIE).astype(float))
    mean, square, discordant = (weights_BC @ part for part in parts)
    return mean, square, discordant, len(difference_CK)


def power(mean: Floats, square: Floats, discordant: Floats, clusters: int) -> Floats:
    """Return the probability that the test of a difference rejects 0 upwards, from moments over prompts."""
    if clusters < MIN_DISCORDANT:
        return np.zeros_like(mean)
    deviation = np.sqrt(np.maximum(square - mean**2, NO_VARIANCE) * clusters / (clusters - 1))
    critical = scipy.stats.t.ppf(0.5 + LEVEL / 2, clusters - 1)
    rejects = scipy.stats.t.cdf(mean * np.sqrt(clusters) / deviation - critical, clusters - 1)
    enough = scipy.stats.binom.sf(MIN_DISCORDANT - 1, clusters, np.clip(discordant, 0, 1))
    return np.asarray(np.minimum(rejects, enough), dtype=np.float64)
