"""No drift, and not worse: what has to be earned, by tests at a stated margin."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from leeway.stats.anytime import Anytime
from leeway.stats.bounds import LEVEL_ONE, TIE, Bounds, bounds
from leeway.stats.clustered import items_needed, standard_error
from leeway.stats.contrasts import Columns, note, rates_of
from leeway.stats.intervals import RESAMPLES, Floats
from leeway.stats.measures import Measure, StatsError, measures
from leeway.stats.multiplicity import correct
from leeway.stats.pairing import KEY, Against, Contrast, contrasted

Worse = Literal["higher", "lower"]
Bound = float | tuple[float, Worse]

SHARED = [*KEY, "seeds", "axis", "measure", "label", "first", "base", "rate", "difference"]
COUNTS = ["n", "n_clusters", "n_moved", "n_unpaired", "n_unscored", "note"]
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
        contrast.line.update(base=NAN, rate=NAN, difference=NAN, n_moved=0)
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
    line |= rates_of(scored) | {"difference": round(difference, 10), "n_moved": moved, "error": round(se, 10)}
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
