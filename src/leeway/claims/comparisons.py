"""The elementary tests that claims are made of: one comparison each, with the p of what it says and of its contrary."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from leeway import stats
from leeway.stats.bootstrap import interval, trajectories
from leeway.stats.contrasts import detectable
from leeway.stats.interaction import slope_weights
from leeway.stats.metrics import BASE, PLAIN, measures, observations
from leeway.stats.pairing import first_conditions

NAN = float("nan")
DIFFERENCE, DOUBLING, SLOPE = "difference", "difference per doubling", "per unit of capability"
POWERED = 2.8016 / 1.9600  # (z_0.975 + z_0.80) / z_0.975: from half of a 95% interval to what is seen with 80% power
FLOOR = 0.025  # the smallest adjusted p that resampling must be able to reach
RESAMPLES, MOST = 10_000, 200_000
NEAR = 10  # of so few draws a p is too coarse to be multiplied


@dataclass(frozen=True)
class Comparison:
    """One comparison: its estimate and interval, `p` of the claimed side, `p_reverse` of the other one.

    `p` is NaN where the comparison cannot be made, and `note` then says why; else it says what weakens it.
    """

    what: str
    estimate: float = NAN
    low: float = NAN
    high: float = NAN
    level: float = NAN
    unit: str = DIFFERENCE
    p: float = NAN
    p_reverse: float = NAN
    mde: float = NAN
    n_clusters: int = 0
    note: str = ""
    room: float = 0.0  # how far the estimate lies inside what is claimed: tells apart what p cannot

    def turned(self) -> Comparison:
        """The same comparison, with what is claimed and its contrary exchanged."""
        return replace(self, p=self.p_reverse, p_reverse=self.p, room=-self.room)


@dataclass(frozen=True)
class Cell:
    """A difference at one budget and where it surely lies: p-values of both sides of ±margin, bounds at 95% each."""

    what: str
    line: Mapping[str, Any]
    margin: float
    below: float = NAN  # p of H0: difference ≥ margin
    beyond: float = NAN  # p of H0: difference ≤ margin
    above_minus: float = NAN  # p of H0: difference ≤ −margin
    beyond_minus: float = NAN  # p of H0: difference ≥ −margin
    low: float = NAN
    high: float = NAN

    def higher(self) -> Comparison:
        """Claimed: the difference lies above the margin."""
        return self._part(self.beyond, self.below, self._difference - self.margin)

    def lower(self) -> Comparison:
        """Claimed: it lies below −margin."""
        return self._part(self.beyond_minus, self.above_minus, -self.margin - self._difference)

    def within(self) -> Comparison:
        """Claimed: it lies inside ±margin, by two one-sided tests; contrary: outside, on whichever side."""
        contrary = min(1.0, 2 * min(self.beyond, self.beyond_minus)) if self._known else NAN
        inside = max(self.below, self.above_minus) if self._known else NAN
        return self._part(inside, contrary, self.margin - abs(self._difference))

    @property
    def strongest(self) -> float:
        """The smallest p of what is corrected for the number of comparisons: that it lies beyond the margin."""
        return min(self.beyond, self.beyond_minus) if self._known else 1.0

    @property
    def _known(self) -> bool:
        return not math.isnan(self.below)

    @property
    def _difference(self) -> float:
        return float(self.line["difference"])

    def _part(self, p: float, p_reverse: float, room: float) -> Comparison:
        line, clusters = self.line, int(self.line["n_clusters"])
        seen = detectable(float(line["se"]), clusters, int(line["n_discordant"])) if self._known else NAN
        return Comparison(
            self.what,
            self._difference,
            self.low,
            self.high,
            0.90,
            DIFFERENCE,
            p,
            p_reverse,
            seen,
            clusters,
            str(line["note"]),
            room,
        )


@dataclass
class EvaluationContext:
    """Rows to test on. Tables that several claims need are made once."""

    rows: pd.DataFrame
    conditions: Mapping[str, str]
    first: Mapping[str, str] = field(default_factory=dict)
    claims: int = 1  # of the family: resampling has to reach below its correction
    name: Callable[[str, str], str] = lambda objective, _: (
        objective
    )  # of an objective under its condition, in a sentence
    at: Callable[[int], str] = lambda budget: f"at {budget:,}"
    resamples: int = RESAMPLES

    @cached_property
    def _table(self) -> pd.DataFrame:
        return observations(self.rows, self.conditions)

    @cached_property
    def axes(self) -> dict[str, str]:
        """The axis of each measure that the rows have."""
        return {m.name: m.axis for m in measures(self._table)}

    @cached_property
    def objectives(self) -> list[str]:
        return [str(o) for o in self._table["objective"].unique() if o != BASE]

    @cached_property
    def budgets(self) -> list[int]:
        return sorted(int(b) for b in self._table.loc[self._table["objective"] != BASE, "budget"].unique())

    @cached_property
    def _first(self) -> dict[str, str]:
        return first_conditions(self._table, self.first)

    def named(self, objective: str) -> str:
        return self.name(objective, self._first.get(objective, PLAIN))

    @cached_property
    def _kept(self) -> dict[object, Any]:
        return {}

    def cells(self, measure: str, pairs: Seq[tuple[str, str, int]], margin: float) -> list[Cell]:
        """(objective, reference or base, budget): their differences, held against ±margin."""
        found: dict[tuple[str, str, int], Cell] = {}
        for other in dict.fromkeys(p[1] for p in pairs):
            own = [p for p in pairs if p[1] == other]
            made = self._cells(measure, own, margin, self.resamples)
            needed = min(round(2 * len(pairs) * self.claims / FLOOR), MOST)
            if needed > self.resamples and any(c.strongest <= NEAR / self.resamples for c in made.values()):
                made = self._cells(measure, own, margin, needed)
            found |= made
        return [found[p] for p in pairs]

    def _cells(
        self, measure: str, pairs: Seq[tuple[str, str, int]], margin: float, resamples: int
    ) -> dict[tuple[str, str, int], Cell]:
        upper = self._sided(measure, pairs, (margin, "higher"), resamples)
        lower = self._sided(measure, pairs, (-margin, "lower"), resamples)
        return {p: self._cell(p, upper, lower, margin) for p in pairs}

    def _cell(self, pair: tuple[str, str, int], upper: pd.DataFrame, lower: pd.DataFrame, margin: float) -> Cell:
        objective, other, budget = pair
        what = f"{self.named(objective)} − {self.named(other)} {self.at(budget)}"
        up, down = (
            t[(t["objective"] == objective) & (t["budget"] == budget) & t["first"].astype(bool)] for t in (upper, lower)
        )
        if len(up) != 1:
            seen = "measured under several test prompts, none declared first" if len(up) else "not measured there"
            line = {"difference": NAN, "se": NAN, "n_clusters": 0, "n_discordant": 0, "note": f"{objective}: {seen}"}
            return Cell(what, line, margin)
        line = {str(k): v for k, v in up.iloc[0].items()}
        of_upper = (float(up["p"].iloc[0]), float(up["p_worse"].iloc[0]))
        of_lower = (float(down["p"].iloc[0]), float(down["p_worse"].iloc[0]))
        limits = (float(down["limit"].iloc[0]), float(up["limit"].iloc[0]))
        return Cell(what, line, margin, *of_upper, *of_lower, *limits)

    def _sided(
        self, measure: str, pairs: Seq[tuple[str, str, int]], bound: tuple[float, stats.Worse], resamples: int
    ) -> pd.DataFrame:
        other, budgets = pairs[0][1], tuple(sorted({b for _, _, b in pairs}))
        objectives = tuple(sorted({o for o, _, _ in pairs}))
        key = (measure, other, objectives, budgets, bound, resamples)
        if key not in self._kept:
            rows = self.rows
            asked = (rows["eval"] == self.axes[measure]) & rows["objective"].isin([*objectives, other, BASE])
            rows = rows[asked & rows["budget"].isin([*budgets, 0])]
            against = None if other == BASE else (other, None)
            self._kept[key] = stats.one_sided(
                rows, self.conditions, {measure: bound}, against, first=self._first, resamples=resamples
            )
        found: pd.DataFrame = self._kept[key]
        return found

    def drawn(self, *names: str) -> stats.Draws:
        """The joint bootstrap of some measures."""
        key = ("draws", *sorted(names))
        if key not in self._kept:
            self._kept[key] = stats.draws(self.rows, self.conditions, names, resamples=self.resamples)
        found: stats.Draws = self._kept[key]
        return found

    def divergence(self, measure: str, objectives: Seq[str]) -> pd.DataFrame:
        key = ("divergence", measure, *sorted(objectives))
        if key not in self._kept:
            made = stats.divergence(
                self.rows, self.conditions, measure, self._asked(sorted(objectives)), drawn=self.drawn(measure)
            )
            self._kept[key] = made
        found: pd.DataFrame = self._kept[key]
        return found

    def steeper(self, measure: str, objectives: Seq[str], one: str, other: str) -> Comparison:
        """The slope of one objective minus another's, per doubling; claimed: above 0."""
        table = self.divergence(measure, objectives)
        pairs = table[table["kind"] == "pair"]
        forth = pairs[(pairs["objective"] == one) & (pairs["against"] == other)]
        back = pairs[(pairs["objective"] == other) & (pairs["against"] == one)]
        sign, line = (1.0, forth.iloc[0]) if len(forth) else (-1.0, back.iloc[0])
        return _sided_part(f"slope of {self.named(one)} − {self.named(other)}", line, DOUBLING, sign)

    def slopes_within(self, measure: str, objectives: Seq[str], margin: float) -> float:
        """p of H0: some two slopes differ by `margin` or more per doubling; NaN where one is withheld."""
        drawn = self.drawn(measure)
        found = trajectories(drawn, measure, self._asked(objectives))
        weights = [slope_weights(np.log2(t.budgets_B)) for t in found]
        worst = 0.0
        for (a, of_a), (b, of_b) in itertools.combinations(zip(found, weights, strict=True), 2):
            moved = drawn.moved([*a.columns_B, *b.columns_B], [*of_a, *(-of_b)])
            apart_R = drawn.drawn_RK[:, a.columns_B] @ of_a - drawn.drawn_RK[:, b.columns_B] @ of_b
            if a.withheld or b.withheld or interval(apart_R, min(a.n_clusters, b.n_clusters), moved).note:
                return NAN
            outside = max(int((apart_R >= margin).sum()), int((apart_R <= -margin).sum()))
            worst = max(worst, (outside + 1) / (len(apart_R) + 1))
        return worst

    def coupled(self, measure: str, on: str, objective: str) -> Comparison:
        """The slope of `measure` on `on` along a trajectory; claimed: above 0."""
        asked = self._asked([objective])
        table = stats.coupling(self.rows, self.conditions, measure, on, asked, drawn=self.drawn(measure, on))
        return _sided_part(f"{measure} on {on} along {self.named(objective)}", table.iloc[0], SLOPE)

    def matched(self, measure: str, on: str, one: str, other: str) -> Comparison:
        """One objective − another where both have the same `on`; claimed: above 0."""
        asked, drawn = self._asked([one, other]), self.drawn(measure, on)
        table = stats.matched(self.rows, self.conditions, "largest", [measure], asked, on, drawn=drawn)
        line = table[table["kind"] == "pair"].iloc[0]
        reached = f" at {100 * line['capability']:.1f}% {on}" if line["capability"] == line["capability"] else ""
        return _sided_part(f"{self.named(one)} − {self.named(other)}{reached}", line, DIFFERENCE)

    def _asked(self, objectives: Seq[str]) -> list[str | tuple[str, str]]:
        return [(o, self._first[o]) if o in self._first else o for o in objectives]


def _sided_part(what: str, line: pd.Series, unit: str, sign: float = 1.0) -> Comparison:
    """A line with a two-sided p of 0 as the two one-sided tests it is made of."""
    estimate, p = sign * float(line["estimate"]), float(line["p"])
    low, high = sorted((sign * float(line["low"]), sign * float(line["high"])))
    above = p / 2 if estimate > 0 else 1 - p / 2
    return Comparison(
        what,
        estimate,
        low,
        high,
        0.95,
        unit,
        above,
        NAN if math.isnan(p) else 1 - above,
        POWERED * (high - low) / 2,
        int(line["n_clusters"]),
        str(line["note"]),
        estimate,
    )
