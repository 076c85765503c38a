"""No drift, and not worse: what has to be earned, by tests at a stated margin.

A checkpoint's own rate against a bound that was stated beforehand: one-sided limit and p-values both ways.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from scipy.stats import beta, norm, t

from leeway.stats.anytime import Anytime, common, is_sequential, of_rates
from leeway.stats.cluster_tests import LEVEL_ONE, TIE, Bounds, bounds
from leeway.stats.contrasts import Columns, correct, items_needed, note, rates_of, standard_error
from leeway.stats.intervals import RESAMPLES, Floats, Ints, effective_n, stratum_shares
from leeway.stats.metrics import Measure, StatsError, codes, groups, measures, observations, why_not
from leeway.stats.pairing import KEY, Against, Contrast, contrasted

Worse = Literal["higher", "lower"]
Bound = float | tuple[float, Worse]

SHARED = [*KEY, "seeds", "axis", "measure", "label", "first", "base", "rate", "difference"]
COUNTS = ["n", "n_clusters", "n_discordant", "n_unpaired", "n_unscored", "note"]
EQUIVALENCE = [*SHARED, "low90", "high90", "margin", "se", "p_lower", "p_upper", "p", "p_holm", "equivalent"]
EQUIVALENCE += ["family", "family_size", *COUNTS]
ONE_SIDED = [*SHARED, "bound", "worse", "limit", "se", "p", "p_worse", "items_needed", *COUNTS]
NAN = float("nan")


def equivalence(
    rows: pd.DataFrame,
    conditions: Mapping[str, str],
    margins: Mapping[str, float],
    against: Against | None = None,
    *,
    first: Mapping[str, str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """Two one-sided tests (Schuirmann 1987) per checkpoint and measure with a margin: is |difference| < margin?

    `p_lower` is the p of H0: difference ≤ −margin, `p_upper` of H0: difference ≥ margin, `p` the larger, and p ≤ 0.05
    exactly where the 90% interval lies inside the margins. `equivalent` is Holm's p ≤ 0.05, in families like those of
    `contrasts`. Valid with few prompts, few that moved, or none (`stats.bounds`). A margin is a difference in (0, 1):
    0.05 is five points. Raises StatsError on a margin outside, or for a measure that the rows do not have.
    """
    wrong = [m for m, margin in margins.items() if not 0 < margin < 1]
    if wrong:
        raise StatsError(f"the margin of {wrong[0]} is {margins[wrong[0]]}: give a difference between 0 and 1, as 0.05")
    lines: list[dict[str, object]] = []
    blank = dict.fromkeys(("low90", "high90", "se", "p_lower", "p_upper", "p"), NAN)
    for tested, drawn in _tested(rows, conditions, margins, against, first, resamples, seed):
        margin_M = np.array([margins[c.measure.name] for c in tested])
        made = [c.line | blank | {"margin": margin} for c, margin in zip(tested, margin_M.tolist(), strict=True)]
        if drawn is not None:
            p_lower, p_upper = drawn.p_above(-margin_M), drawn.p_below(margin_M)
            found = {"low90": drawn.low(), "high90": drawn.high(), "p_lower": p_lower, "p_upper": p_upper}
            found |= {"p": np.maximum(p_lower, p_upper)}
            for m, line in enumerate(made):
                line.update({k: round(float(v[m]), 10) for k, v in found.items()} | {"se": line["error"]})
        lines += made
    for line in lines:
        line["family"] = f"{line['family']}, equivalence"
    uncorrected = [c for c in EQUIVALENCE if c not in ("p_holm", "family_size", "equivalent")]
    table = correct(pd.DataFrame(lines, columns=uncorrected))
    return table.assign(equivalent=table["p_holm"] <= LEVEL_ONE)[EQUIVALENCE]


def one_sided(
    rows: pd.DataFrame,
    conditions: Mapping[str, str],
    bounds: Mapping[str, Bound],
    against: Against | None = None,
    *,
    first: Mapping[str, str] | None = None,
    level: float = LEVEL_ONE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """Non-inferiority both ways: is each checkpoint's difference on the good side of a bound, or on the bad one?

    `bounds` gives a measure's bound on checkpoint − reference, with its sign, and which way is worse: `{"asr": (0.05,
    "higher"), "accuracy": (-0.03, "lower")}`; a number alone where the measure itself knows which way is better.
    Worse "higher": H0 of `p` is difference ≥ bound, `limit` the upper bound of confidence 1 − `level`; worse "lower":
    difference ≤ bound, and the lower one. `p` ≤ `level` exactly where `limit` is on the good side. `p_worse` tests the
    opposite: small where the bound is surely exceeded. `items_needed`: prompts more that would decide at 80% power if
    the difference is what was seen (0 where decided, infinite where it lies on the bound, NaN where prompts are asked
    until decided). No correction: a gate's rules must all hold.
    """
    lines: list[dict[str, object]] = []
    blank = dict.fromkeys(("limit", "se", "p", "p_worse", "items_needed"), NAN)
    for tested, drawn in _tested(rows, conditions, bounds, against, first, resamples, seed):
        told = [_told(bounds[c.measure.name], c.measure) for c in tested]
        made = [c.line | blank | {"bound": b, "worse": w} for c, (b, w) in zip(tested, told, strict=True)]
        if drawn is not None:
            bound_M, higher_M = np.array([b for b, _ in told]), np.array([w == "higher" for _, w in told])
            below, above = drawn.p_below(bound_M), drawn.p_above(bound_M)
            limit = np.where(higher_M, drawn.high(level), drawn.low(level))
            p, p_worse = np.where(higher_M, below, above), np.where(higher_M, above, below)
            for m, line in enumerate(made):
                line.update(limit=round(float(limit[m]), 10), se=line["error"])
                line.update(p=round(float(p[m]), 10), p_worse=round(float(p_worse[m]), 10))
                # a design that stops when it may has no number of prompts that it would take
                line["items_needed"] = NAN if tested[m].sequential else _more(line, level)
        lines += made
    return pd.DataFrame(lines, columns=ONE_SIDED)


def _tested(
    rows: pd.DataFrame,
    conditions: Mapping[str, str],
    wanted: Collection[str],
    against: Against | None,
    first: Mapping[str, str] | None,
    resamples: int,
    seed: int,
) -> Iterator[tuple[list[Contrast], Bounds | Sequences | None]]:
    """Per axis the contrasts that can be tested with their draws, then those that cannot, with none."""
    found, table = contrasted(rows, conditions, against=against, first=first, only=wanted)
    known = [m.name for m in measures(table)]
    strange = [name for name in wanted if name not in known]
    if strange:
        raise StatsError(f"no measure {strange[0]}: these rows have {', '.join(known)}")
    for contrast in found:
        contrast.line.update(base=NAN, rate=NAN, difference=NAN, n_discordant=0)
    for axis in dict.fromkeys(c.measure.axis for c in found):
        columns = Columns(np.unique(table.loc[table["eval"] == axis, "cluster"].to_numpy(np.intp)))
        whole = [c for c in found if c.measure.axis == axis and c.scored is not None]
        stopped = [c for c in whole if c.sequential]
        for contrast in (c for c in whole if not c.sequential):
            columns.add(contrast)
        if stopped:
            for contrast in stopped:
                _fill(contrast, float(contrast.moves.mean()), int((np.abs(contrast.moves) > TIE).sum()))
            yield stopped, Sequences([Anytime(c.moves) for c in stopped])
        if columns.contrasts:
            pulls_CM, weights_CM = columns.matrices()
            moved = (np.abs(pulls_CM) > 0).sum(axis=0)
            for m, contrast in enumerate(columns.contrasts):
                _fill(contrast, float(pulls_CM[:, m].sum()), int(moved[m]))
            yield columns.contrasts, bounds(pulls_CM, weights_CM, resamples=resamples, seed=seed)
    yield [c for c in found if c.scored is None], None


@dataclass(frozen=True)
class Sequences:
    """The same questions as `Bounds` answers, of contrasts whose prompts were asked until decided."""

    of: list[Anytime]

    def p_below(self, bound_M: Floats) -> Floats:
        return np.array([a.p_below(b) for a, b in zip(self.of, bound_M.tolist(), strict=True)])

    def p_above(self, bound_M: Floats) -> Floats:
        return np.array([a.p_above(b) for a, b in zip(self.of, bound_M.tolist(), strict=True)])

    def high(self, alpha: float = LEVEL_ONE) -> Floats:
        return np.array([a.high(alpha) for a in self.of])

    def low(self, alpha: float = LEVEL_ONE) -> Floats:
        return np.array([a.low(alpha) for a in self.of])


def _fill(contrast: Contrast, difference: float, moved: int) -> None:
    scored, line = contrast.scored, contrast.line
    assert scored is not None
    se = standard_error(scored)
    line |= rates_of(scored) | {"difference": round(difference, 10), "n_discordant": moved, "error": round(se, 10)}
    if contrast.sequential:
        line["note"] = f"sequential design: {len(contrast.moves)} prompts asked"
        return
    line["note"] = note(line, len(np.unique(scored.clusters)), moved, se, at_a_margin=True)


def _told(bound: Bound, measure: Measure) -> tuple[float, Worse]:
    if isinstance(bound, tuple):
        value, worse = bound
    elif measure.better:
        value, worse = bound, "lower" if measure.better == "higher" else "higher"
    else:
        raise StatsError(f"{measure.name} has no better direction: give its bound as (bound, 'higher' or 'lower')")
    if worse not in ("higher", "lower") or not -1 < value < 1:
        raise StatsError(
            f"the bound of {measure.name} is {bound!r}: give a difference in (−1, 1), and 'higher' or 'lower'"
        )
    return float(value), worse


def _more(line: Mapping[str, object], level: float) -> float:
    if min(float(str(line["p"])), float(str(line["p_worse"]))) <= level:
        return 0.0
    difference, se, n, bound = (float(str(line[k])) for k in ("difference", "error", "n_clusters", "bound"))
    return max(items_needed(difference, se, int(n), bound, alpha=level), 1.0)


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
