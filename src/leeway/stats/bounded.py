"""A checkpoint's own rate against a bound that was stated beforehand: one-sided limit and p-values both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import pandas as pd
from scipy.stats import beta, norm, t

from leeway.stats.anytime import Anytime
from leeway.stats.bounds import bounds
from leeway.stats.intervals import RESAMPLES, Floats, Ints, effective_n, stratum_shares
from leeway.stats.measures import Measure, codes, groups, measures, observations, why_not
from leeway.stats.turns import common, is_sequential, of_rates

KEY = ["objective", "budget", "condition"]
COLUMNS = [*KEY, "measure", "bound", "worse", "rate", "limit", "se", "p", "p_worse", "n", "n_clusters"]
COLUMNS += ["n_unscored", "note"]
NAN = float("nan")


def bounded(
    rows: pd.DataFrame,
    conditions: Mapping[str, str],
    wanted: Mapping[str, float],
    worse: Literal["higher", "lower"],
    *,
    level: float = 0.05,
) -> pd.DataFrame:
    """One line per checkpoint and measure with a bound; training seeds pooled, a prompt being one cluster.

    `p` is small where the rate is shown to lie on the right side of its bound, `p_worse` where it is shown to lie
    beyond; `limit` is the end of the one-sided interval that the first of the two inverts. Binary answers: the exact
    binomial test and Clopper & Pearson's limit on the effective number of trials (`intervals.effective_n`), lowered by
    (z/t)² for an error estimated from few prompts (Korn & Graubard 1998, Surv. Methodol. 24:193).
    Probabilities: the bound of `stats.bounds`, which holds for few prompts too. No number where too many answers are
    unscored, or where there is one prompt.
    """
    table = common(observations(rows, conditions), KEY)
    lines: list[dict[str, object]] = []
    for measure in (m for m in measures(table) if m.name in wanted):
        chosen = measure.select(table)
        names, strata = codes(chosen["stratum"])
        values, clusters = chosen["value"].to_numpy(float), chosen["cluster"].to_numpy(np.intp)
        bound, sequential = wanted[measure.name], is_sequential(chosen).to_numpy()
        for line, at in groups(chosen, KEY):
            told = {"measure": measure.name, "bound": bound, "worse": worse}
            lines.append(line | told | _line(measure, values[at], strata[at], clusters[at], names))
            sign = -1 if worse == "higher" else 1
            if not lines[-1]["note"] and sequential[at].any():
                scored = at[~np.isnan(values[at])]
                turns = chosen["turn"].to_numpy(np.intp)[scored]
                _at_any_time(lines[-1], of_rates(values[scored], strata[scored], turns), sign, level)
            elif not lines[-1]["note"]:
                _test(lines[-1], values[at], strata[at], clusters[at], sign, level)
    return pd.DataFrame(lines, columns=COLUMNS)


def _line(measure: Measure, values: Floats, strata: Ints, clusters: Ints, names: list[str]) -> dict[str, object]:
    absent = np.isnan(values)
    scored = values[~absent]
    count = len(np.unique(clusters[~absent]))
    reason = why_not(absent, strata, names, measure)
    if not reason and count < 2:
        reason = "one prompt alone: no error can be estimated"
    found: dict[str, object] = dict.fromkeys(("rate", "limit", "se", "p", "p_worse"), NAN)
    return found | {"n": len(scored), "n_clusters": count, "n_unscored": int(absent.sum()), "note": reason}


def _test(line: dict[str, object], values: Floats, strata: Ints, clusters: Ints, sign: int, level: float) -> None:
    """Fill in the numbers; `sign` is 1 where a rate above the bound is good."""
    scored = ~np.isnan(values)
    x, strata = values[scored], strata[scored]
    where = np.unique(clusters[scored], return_inverse=True)[1].astype(np.intp)
    count, share, bound = int(where.max()) + 1, stratum_shares(strata), float(str(line["bound"]))
    rate = float(share @ x)
    if _binary(x):
        trials, once = effective_n(x, strata, where), len(x) == count
        if not once:
            trials = max(1.0, trials * (norm.ppf(1 - level) / t.ppf(1 - level, count - 1)) ** 2)
        below, above = _tails(rate * trials, trials, bound)
        low, high = _clopper_pearson(rate * trials, trials, level)
        se = float(np.sqrt(max(rate * (1 - rate), 0.0) / trials))
    else:
        se = _clustered(x, strata, where, share)
        moves = share * (2 * x - 1)  # a probability as a move in [−1, 1]
        moves_C1, weights_C1 = (np.bincount(where, weights=w)[:, None].astype(np.float64) for w in (moves, share))
        drawn = bounds(moves_C1, weights_C1, resamples=RESAMPLES, seed=0)
        at = np.array([2 * bound - 1])
        below, above = float(drawn.p_below(at)[0]), float(drawn.p_above(at)[0])
        low, high = (float(end[0] + 1) / 2 for end in (drawn.low(level), drawn.high(level)))
    good, bad = (above, below) if sign > 0 else (below, above)
    found = {"rate": rate, "limit": low if sign > 0 else high, "se": se, "p": good, "p_worse": bad}
    line |= {name: round(value, 10) for name, value in found.items()}


def _at_any_time(line: dict[str, object], of: Anytime, sign: int, level: float) -> None:
    """The same where prompts were asked until something was decided."""
    at = 2 * float(str(line["bound"])) - 1
    above, below = of.p_above(at), of.p_below(at)
    rate = (float(of.moves_T.mean()) + 1) / 2
    se = float(of.moves_T.std(ddof=1)) / 2 / float(np.sqrt(len(of.moves_T)))
    good, bad, limit = (above, below, of.low(level)) if sign > 0 else (below, above, of.high(level))
    found = {"rate": rate, "limit": (limit + 1) / 2, "se": se, "p": good, "p_worse": bad}
    line |= {name: round(value, 10) for name, value in found.items()}


def _clustered(x: Floats, strata: Ints, where: Ints, share: Floats) -> float:
    """The standard error of the mean over strata, clustered by prompt (Miller 2024, §2.2)."""
    inside = np.bincount(strata, weights=share * x) / np.bincount(strata, weights=share)
    pulls = np.bincount(where, weights=share * (x - inside[strata]))
    return float(np.sqrt(pulls @ pulls * len(pulls) / (len(pulls) - 1)))


def _tails(k: float, n: float, bound: float) -> tuple[float, float]:
    """P(X ≤ k) and P(X ≥ k) for n trials at the bound, k and n not necessarily whole."""
    return (
        float(beta.sf(bound, k + 1, n - k)) if k < n else 1.0,
        float(beta.cdf(bound, k, n - k + 1)) if k > 0 else 1.0,
    )


def _clopper_pearson(k: float, n: float, level: float) -> tuple[float, float]:
    """Both one-sided limits (Clopper & Pearson 1934)."""
    low = float(beta.ppf(level, k, n - k + 1)) if k > 0 else 0.0
    high = float(beta.ppf(1 - level, k + 1, n - k)) if k < n else 1.0
    return low, high


def _binary(values: Floats) -> bool:
    return bool(np.isin(values, (0.0, 1.0)).all())
