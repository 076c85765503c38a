"""The elementary tests that claims consist of: one comparison each, with p-values for the claim and for its reverse."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from leeway import stats
from leeway.stats.bootstrap import interval, trajectories
from leeway.stats.contrasts import minimal_detectable_effect
from leeway.stats.interaction import slope_weights
from leeway.stats.intervals import NAN
from leeway.stats.metrics import BASE, PLAIN, analysis_table, measures
from leeway.stats.pairing import first_conditions

DIFFERENCE, DOUBLING, SLOPE = "difference", "difference per doubling", "per unit of capability"
HALF_TO_MDE = 2.8016 / 1.9600  # (z_0.975 + z_0.80) / z_0.975: from half of a 95% interval to the MDE at 80% power
MIN_P = 0.025  # the smallest adjusted p that resampling must be able to reach
RESAMPLES, MAX_RESAMPLES = 10_000, 200_000
FEW_EXTREME = 10  # a p from so few extreme draws is too coarse to be multiplied

T = TypeVar("T")
Pair = tuple[str, str, int]  # objective, reference (an objective or the base), budget


@dataclass(frozen=True)
class Comparison:
    """One comparison: estimate and interval, `p` of the claimed direction, `p_reverse` of the opposite one.

    `p` is NaN if the comparison is impossible; `note` then gives the reason, otherwise its limitations.
    """

    name: str
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
    slack: float = 0.0  # distance of the estimate from the limit of the claim: breaks ties of p

    def reversed(self) -> Comparison:
        return replace(self, p=self.p_reverse, p_reverse=self.p, slack=-self.slack)


@dataclass(frozen=True)
class MarginTest:
    """A difference at one budget with p-values on both sides of ±margin, and one-sided 95% bounds."""

    name: str
    margin: float
    upper: Mapping[str, Any]  # the line of the test at margin: `p` of H0 difference ≥ margin, `p_worse` of ≤
    lower: Mapping[str, Any]  # at −margin: `p` of H0 difference ≤ −margin, `p_worse` of ≥

    def above(self) -> Comparison:
        """Return the claim that the difference is above the margin."""
        return self._comparison(self.upper["p_worse"], self.upper["p"], self.upper["difference"] - self.margin)

    def below(self) -> Comparison:
        """Return the claim that the difference is below −margin."""
        return self._comparison(self.lower["p_worse"], self.lower["p"], -self.margin - self.upper["difference"])

    def within(self) -> Comparison:
        """Return the claim that the difference is inside ±margin, by TOST; reverse: outside, on either side."""
        outside = min(1.0, 2 * self.smallest_p) if self._tested else NAN
        inside = max(self.upper["p"], self.lower["p"]) if self._tested else NAN
        return self._comparison(inside, outside, self.margin - abs(self.upper["difference"]))

    @property
    def smallest_p(self) -> float:
        """The smaller p of a difference outside ±margin: the one that is corrected for multiple comparisons."""
        return float(min(self.upper["p_worse"], self.lower["p_worse"])) if self._tested else 1.0

    @property
    def _tested(self) -> bool:
        return not math.isnan(self.upper["p"])

    def _comparison(self, p: float, p_reverse: float, slack: float) -> Comparison:
        line, clusters, mde = self.upper, int(self.upper["n_clusters"]), NAN
        if self._tested:
            mde = minimal_detectable_effect(float(line["se"]), clusters, int(line["n_discordant"]))
        found: dict[str, Any] = {"estimate": float(line["difference"]), "level": 0.90, "note": str(line["note"])}
        found |= {"low": float(self.lower["limit"]), "high": float(line["limit"]), "mde": mde, "n_clusters": clusters}
        return Comparison(self.name, **found, p=float(p), p_reverse=float(p_reverse), slack=float(slack))


@dataclass
class EvaluationContext:
    """The rows that claims are tested on; tables that several claims need are computed once."""

    rows: pd.DataFrame
    conditions: Mapping[str, str]
    first: Mapping[str, str] = field(default_factory=dict)
    claims: int = 1  # size of the family: resampling has to reach below its correction
    format_objective: Callable[[str, str], str] = lambda objective, _: objective  # given its condition
    format_budget: Callable[[int], str] = lambda budget: f"at {budget:,}"
    resamples: int = RESAMPLES

    @cached_property
    def _table(self) -> pd.DataFrame:
        return analysis_table(self.rows, self.conditions)

    @cached_property
    def axes(self) -> dict[str, str]:
        """The axis of each measure of the rows."""
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

    @cached_property
    def _cache(self) -> dict[object, Any]:
        return {}

    def _cached(self, key: object, compute: Callable[[], T]) -> T:
        if key not in self._cache:
            self._cache[key] = compute()
        found: T = self._cache[key]
        return found

    def _name(self, objective: str) -> str:
        return self.format_objective(objective, self._first.get(objective, PLAIN))

    def margin_tests(self, measure: str, pairs: Seq[Pair], margin: float) -> list[MarginTest]:
        """Return the test of each pair's difference at ±margin."""
        found: dict[Pair, MarginTest] = {}
        for other in dict.fromkeys(p[1] for p in pairs):
            own = [p for p in pairs if p[1] == other]
            tests = self._margin_tests(measure, own, margin, self.resamples)
            needed = min(round(2 * len(pairs) * self.claims / MIN_P), MAX_RESAMPLES)
            coarse = any(t.smallest_p <= FEW_EXTREME / self.resamples for t in tests.values())
            if needed > self.resamples and coarse:
                tests = self._margin_tests(measure, own, margin, needed)
            found |= tests
        return [found[p] for p in pairs]

    def _margin_tests(self, measure: str, pairs: Seq[Pair], margin: float, resamples: int) -> dict[Pair, MarginTest]:
        upper = self._one_sided(measure, pairs, (margin, "higher"), resamples)
        lower = self._one_sided(measure, pairs, (-margin, "lower"), resamples)
        return {p: self._margin_test(p, upper, lower, margin) for p in pairs}

    def _margin_test(self, pair: Pair, upper: pd.DataFrame, lower: pd.DataFrame, margin: float) -> MarginTest:
        objective, other, budget = pair
        name = f"{self._name(objective)} − {self._name(other)} {self.format_budget(budget)}"
        up, down = (
            t[(t["objective"] == objective) & (t["budget"] == budget) & t["first"].astype(bool)] for t in (upper, lower)
        )
        if len(up) != 1:
            reason = "measured under several test prompts, none declared first" if len(up) else "not measured there"
            line: dict[str, Any] = dict.fromkeys(("difference", "limit", "p", "p_worse"), NAN)
            line |= {"n_clusters": 0, "note": f"{objective}: {reason}"}
            return MarginTest(name, margin, line, line)
        return MarginTest(name, margin, *({str(k): v for k, v in t.iloc[0].items()} for t in (up, down)))

    def _one_sided(
        self, measure: str, pairs: Seq[Pair], bound: tuple[float, stats.WorseDirection], resamples: int
    ) -> pd.DataFrame:
        other, budgets = pairs[0][1], tuple(sorted({b for _, _, b in pairs}))
        objectives = tuple(sorted({o for o, _, _ in pairs}))

        def compute() -> pd.DataFrame:
            rows = self.rows
            chosen = (rows["eval"] == self.axes[measure]) & rows["objective"].isin([*objectives, other, BASE])
            rows = rows[chosen & rows["budget"].isin([*budgets, 0])]
            against = None if other == BASE else (other, None)
            bounds = {measure: bound}
            return stats.one_sided(rows, self.conditions, bounds, against, first=self._first, resamples=resamples)

        return self._cached((measure, other, objectives, budgets, bound, resamples), compute)

    def draws(self, *names: str) -> stats.Draws:
        draw = partial(stats.draws, self.rows, self.conditions, names, resamples=self.resamples)
        return self._cached(("draws", *sorted(names)), draw)

    def divergence(self, measure: str, objectives: Seq[str]) -> pd.DataFrame:
        choice = self._with_condition(sorted(objectives))
        test = partial(stats.divergence, self.rows, self.conditions, measure, choice, drawn=self.draws(measure))
        return self._cached(("divergence", measure, *sorted(objectives)), test)

    def slope_difference(self, measure: str, objectives: Seq[str], one: str, other: str) -> Comparison:
        """Return the claim that the slope per doubling of one objective is above another's."""
        table = self.divergence(measure, objectives)
        pairs = table[table["kind"] == "pair"]
        same = pairs[(pairs["objective"] == one) & (pairs["against"] == other)]
        swapped = pairs[(pairs["objective"] == other) & (pairs["against"] == one)]
        sign, line = (1.0, same.iloc[0]) if len(same) else (-1.0, swapped.iloc[0])
        return _above_zero(f"slope of {self._name(one)} − {self._name(other)}", line, DOUBLING, sign)

    def p_slopes_within(self, measure: str, objectives: Seq[str], margin: float) -> float:
        """Return the p of H0: some two slopes differ by `margin` or more per doubling; NaN if one is withheld."""
        drawn = self.draws(measure)
        found = trajectories(drawn, measure, self._with_condition(objectives))
        weights = [slope_weights(np.log2(t.budgets_B)) for t in found]
        largest = 0.0
        for (a, weights_a), (b, weights_b) in itertools.combinations(zip(found, weights, strict=True), 2):
            discordant = drawn.n_discordant([*a.columns_B, *b.columns_B], [*weights_a, *(-weights_b)])
            difference_R = drawn.drawn_RK[:, a.columns_B] @ weights_a - drawn.drawn_RK[:, b.columns_B] @ weights_b
            if a.withheld or b.withheld or interval(difference_R, min(a.n_clusters, b.n_clusters), discordant).note:
                return NAN
            outside = max(int((difference_R >= margin).sum()), int((difference_R <= -margin).sum()))
            largest = max(largest, (outside + 1) / (len(difference_R) + 1))
        return largest

    def coupling_slope(self, measure: str, on: str, objective: str) -> Comparison:
        """Return the claim that the slope of `measure` on `on` along a trajectory is above 0."""
        choice = self._with_condition([objective])
        table = stats.coupling(self.rows, self.conditions, measure, on, choice, drawn=self.draws(measure, on))
        return _above_zero(f"{measure} on {on} along {self._name(objective)}", table.iloc[0], SLOPE)

    def matched_difference(self, measure: str, on: str, one: str, other: str) -> Comparison:
        """Return the claim that one objective is above another where both have the same `on`."""
        choice, drawn = self._with_condition([one, other]), self.draws(measure, on)
        table = stats.matched(self.rows, self.conditions, "largest", [measure], choice, on, drawn=drawn)
        line = table[table["kind"] == "pair"].iloc[0]
        reached = f" at {100 * line['capability']:.1f}% {on}" if line["capability"] == line["capability"] else ""
        return _above_zero(f"{self._name(one)} − {self._name(other)}{reached}", line, DIFFERENCE)

    def _with_condition(self, objectives: Seq[str]) -> list[str | tuple[str, str]]:
        return [(o, self._first[o]) if o in self._first else o for o in objectives]


def _above_zero(name: str, line: pd.Series, unit: str, sign: float = 1.0) -> Comparison:
    """Split a two-sided p of 0 into its two one-sided tests."""
    estimate, p = sign * float(line["estimate"]), float(line["p"])
    low, high = sorted((sign * float(line["low"]), sign * float(line["high"])))
    above, mde = p / 2 if estimate > 0 else 1 - p / 2, HALF_TO_MDE * (high - low) / 2
    clusters, note = int(line["n_clusters"]), str(line["note"])
    return Comparison(name, estimate, low, high, 0.95, unit, above, 1 - above, mde, clusters, note, slack=estimate)
