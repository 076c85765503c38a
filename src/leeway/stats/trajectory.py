"""A trajectory's cells in a set of draws, and the interval of anything computed from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import norm
from scipy.stats import t as student

from leeway.stats.draws import TIE, Draws
from leeway.stats.intervals import LEVEL, Floats, Ints
from leeway.stats.measures import BASE, PLAIN, StatsError

Asked = Sequence[str | tuple[str, str]]  # objectives, or (objective, condition)

MIN_CLUSTERS = 10  # below this a percentile interval misses the truth more than one time in ten
MIN_MOVED = 6  # draws in which none of k moved prompts is drawn are e⁻ᵏ of them: with 3, more than the tail itself
MAX_LOST = 0.05  # draws in which a value does not exist; above this share the interval is withheld
NAN = float("nan")


@dataclass(frozen=True)
class Trajectory:
    """An objective under one condition: its budgets in order, and where each stands among the cells."""

    objective: str
    condition: str
    budgets_B: Floats
    columns_B: Ints
    base: int  # column of the base under the same condition; −1 where there is none
    n_clusters: int
    withheld: str  # why no number can be made of it; empty if one can
    note: str  # what weakens every number made of it

    @property
    def key(self) -> dict[str, object]:
        return {"objective": self.objective, "condition": self.condition}

    @property
    def label(self) -> str:
        return self.objective if self.condition == PLAIN else f"{self.objective} {self.condition}"


def trajectories(drawn: Draws, measure: str, objectives: Asked | None = None) -> list[Trajectory]:
    """One per objective, in the order asked for: under the condition with the most budgets (`plain` if several have),
    or the one asked for. Raises StatsError for a measure or an objective that the rows do not have."""
    drawn.need(measure)
    cells = drawn.cells[drawn.cells["measure"] == measure]
    tuned = cells[cells["objective"] != BASE]
    if tuned.empty:
        raise StatsError(f"no trained checkpoint has {measure}: there is no trajectory to look at")
    asked = list(objectives) if objectives is not None else sorted(str(o) for o in tuned["objective"].unique())
    return [_trajectory(cells, tuned, one) for one in asked]


def _trajectory(cells: pd.DataFrame, tuned: pd.DataFrame, asked: str | tuple[str, str]) -> Trajectory:
    objective, condition = (asked, None) if isinstance(asked, str) else asked
    own = tuned[tuned["objective"] == objective]
    if own.empty:
        there = ", ".join(sorted(tuned["objective"].unique()))
        raise StatsError(f"no checkpoints of {objective!r}: the rows have {there}")
    budgets = own.groupby("condition")["budget"].nunique()
    if condition is None:
        condition = min(budgets.index, key=lambda c: (-budgets[c], c != PLAIN, c))
    elif condition not in budgets.index:
        raise StatsError(f"{objective} was not measured under {condition!r}: only under {', '.join(budgets.index)}")
    own = own[own["condition"] == condition].sort_values("budget")
    base = cells[(cells["objective"] == BASE) & (cells["condition"] == condition)]
    together = pd.concat([own, base])
    clusters, weak = int(together["n_clusters"].min()), []
    withheld = "; ".join(f"{r['objective']} at {r['budget']}: {r['note']}" for _, r in together.iterrows() if r["note"])
    if not withheld and together["templates"].nunique() > 1:
        withheld = "asked under different templates along the way: not the same questions"
    seeds = sorted(own["seeds"].unique())
    if seeds[0] == 1:
        weak.append("one training seed: says nothing of another run")
    elif seeds[0] < 5:
        weak.append(f"{seeds[0]} training seeds: the spread between runs is known roughly")
    if (together["n"] + together["n_unscored"]).div(together["seeds"]).nunique() > 1:
        weak.append("not every checkpoint was asked as many questions")
    where = int(base.index[0]) if len(base) else -1
    found = own.index.to_numpy(np.intp)
    budgets_B = own["budget"].to_numpy(float)
    return Trajectory(objective, condition, budgets_B, found, where, clusters, withheld, "; ".join(weak))


@dataclass(frozen=True)
class Interval:
    """A percentile interval and the two-sided p-value of zero; NaN with a `note` where draws cannot tell."""

    low: float
    high: float
    p: float
    note: str = ""


def interval(drawn_R: Floats, clusters: int, moved: int | None = None, level: float = LEVEL) -> Interval:
    """Expanded percentiles of the draws, and the p-value that agrees with them.

    Percentiles are a normal's, of a variance short of C/(C − 1): with few prompts too narrow. The tail α/2 is therefore
    taken at Φ(−√(C/(C − 1)) · t_{C−1, α/2}) (Hesterberg 2015, Am. Stat. 69:371), and 2·min(P(draw ≤ 0), P(draw ≥ 0)),
    counted with the observed value itself, is turned into p the same way.

    Withheld below 10 prompts, where fewer than 6 of them moved (draws of the few say nothing of the many), and where
    the value does not exist in more than 5% of draws; below that it is of the draws in which it does, and noted.
    """
    known = drawn_R[np.isfinite(drawn_R)]
    lost = 1 - len(known) / max(len(drawn_R), 1)
    if clusters < MIN_CLUSTERS:
        return Interval(NAN, NAN, NAN, f"{clusters} prompts: too few for an interval")
    if moved is not None and moved < MIN_MOVED:
        return Interval(NAN, NAN, NAN, f"only {moved} prompts moved: too few for an interval")
    if lost > MAX_LOST:
        return Interval(NAN, NAN, NAN, f"undefined in {lost:.0%} of draws")
    if np.ptp(known) <= TIE:
        return Interval(NAN, NAN, NAN, "no draw differs from another: no interval")
    short = float(np.sqrt((clusters - 1) / clusters))
    tail = float(norm.cdf(student.ppf((1 - level) / 2, clusters - 1) / short))
    low, high = np.quantile(known, [tail, 1 - tail])
    said = f"the interval leaves out {lost:.1%} of draws, in which there is no value" if lost else ""
    return Interval(round(float(low), 10), round(float(high), 10), p_zero(known, clusters), said)


def p_zero(known_R: Floats, clusters: int) -> float:
    """Two-sided p of zero, on `clusters` − 1 degrees of freedom."""
    below, above = int((known_R <= 0).sum()), int((known_R >= 0).sum())
    beyond = min(0.5, (min(below, above) + 1) / (len(known_R) + 1))
    short = float(np.sqrt((clusters - 1) / clusters))
    return float(f"{2 * student.cdf(norm.ppf(beyond) * short, clusters - 1):.10g}")


def notes(*said: str) -> str:
    """What there is to say, each thing once."""
    return "; ".join(dict.fromkeys(part for one in said if one for part in one.split("; ")))


def simultaneous_lower(point_B: Floats, drawn_RB: Floats, level: float = LEVEL) -> Floats:
    """One-sided lower bounds that hold for all B values at once: point − c·se, c the `level` quantile over draws of
    max_b (drawn_b − point_b)/se_b (max-t; Romano & Wolf 2005, Econometrica 73:1237). NaN where nothing varies."""
    se_B = drawn_RB.std(axis=0, ddof=1)
    varies: NDArray[np.bool_] = se_B > 1e-12
    bound_B = np.full(len(point_B), NAN)
    if varies.any():
        t_R = ((drawn_RB - point_B)[:, varies] / se_B[varies]).max(axis=1)
        bound_B[varies] = point_B[varies] - np.quantile(t_R, level) * se_B[varies]
    return bound_B
