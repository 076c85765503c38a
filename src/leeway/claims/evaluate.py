"""From claims and rows to verdicts: supported, contradicted, or inconclusive, with the reason in one sentence.

Every claim has an opposite, and both are tested. A claim about several comparisons holds if each of them does
(intersection–union: its p is the largest, uncorrected inside; Berger 1982, Technometrics 24:295); its opposite holds if
that of one comparison does (p is k times the smallest of k). Holm runs over all claims of a family, once for the claims
and once for their opposites.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal, TypeVar

import numpy as np
import pandas as pd

from leeway import stats
from leeway.claims import mechanism
from leeway.claims.comparison import DIFFERENCE, DOUBLING, SLOPE, Comparison
from leeway.claims.schema import Claim, Claims
from leeway.stats.bootstrap import interval, trajectories
from leeway.stats.contrasts import holm, minimal_detectable_effect
from leeway.stats.identity import same_behaviour
from leeway.stats.interaction import slope_weights
from leeway.stats.intervals import NAN
from leeway.stats.metrics import BASE, LOG_ODDS, PLAIN, analysis_table, measures
from leeway.stats.pairing import first_conditions

NATS, NATS_DOUBLING = "difference in log-odds", "difference in log-odds per doubling"
HALF_TO_MDE = 2.8016 / 1.9600  # (z_0.975 + z_0.80) / z_0.975: from half of a 95% interval to the MDE at 80% power
MIN_P = 0.025  # the smallest adjusted p that resampling must be able to reach
RESAMPLES, MAX_RESAMPLES = 10_000, 200_000
FEW_EXTREME = 10  # a p from so few extreme draws is too coarse to be multiplied

T = TypeVar("T")
Pair = tuple[str, str, int]  # objective, reference (an objective or the base), budget


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
        found |= {"unit": NATS if line.get("measure") in LOG_ODDS else DIFFERENCE}
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
    probe: pd.DataFrame | None = None  # the probe's estimates (`stats.mechanism.COLUMNS`)
    void: Collection[tuple[str, int]] = ()  # objectives and budgets of which "no drift" says nothing (`stats.learned`)

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
    def _identity(self) -> pd.DataFrame:
        return stats.identity(self.rows, self.conditions, self._first)

    @cached_property
    def _cache(self) -> dict[object, Any]:
        return {}

    def _cached(self, key: object, compute: Callable[[], T]) -> T:
        if key not in self._cache:
            self._cache[key] = compute()
        found: T = self._cache[key]
        return found

    def objective_name(self, objective: str) -> str:
        return self.format_objective(objective, self._first.get(objective, PLAIN))

    def unlearned(self, objectives: Seq[str], budgets: Seq[int]) -> list[str]:
        """Name the arms in `void`."""
        arms = [(o, b) for o in objectives for b in budgets if (o, b) in self.void]
        return [f"{self.objective_name(o)} {self.format_budget(b)}" for o, b in arms]

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
        name = f"{self.objective_name(objective)} − {self.objective_name(other)} {self.format_budget(budget)}"
        up, down = (
            t[(t["objective"] == objective) & (t["budget"] == budget) & t["first"].astype(bool)] for t in (upper, lower)
        )
        if len(up) != 1:
            reason = "measured under several test prompts, none declared first" if len(up) else "not measured there"
            line: dict[str, Any] = dict.fromkeys(("difference", "limit", "p", "p_worse"), NAN)
            line |= {"n_clusters": 0, "note": f"{objective}: {reason}"}
            return MarginTest(name, margin, line, line)
        lines = [{str(k): v for k, v in t.iloc[0].items()} for t in (up, down)]
        if same := same_behaviour(self._identity, objective, other, budget):
            behaviour = f"{self.objective_name(objective)} behaves as {self.objective_name(other)}: {same}"
            lines[0]["note"] = "; ".join(filter(None, [behaviour, str(lines[0]["note"])]))
        return MarginTest(name, margin, *lines)

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
        return _above_zero(
            f"slope of {self.objective_name(one)} − {self.objective_name(other)}", line, _per_doubling(measure), sign
        )

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
        return _above_zero(f"{measure} on {on} along {self.objective_name(objective)}", table.iloc[0], SLOPE)

    def matched_difference(self, measure: str, on: str, one: str, other: str) -> Comparison:
        """Return the claim that one objective is above another where both have the same `on`."""
        choice, drawn = self._with_condition([one, other]), self.draws(measure, on)
        table = stats.matched(self.rows, self.conditions, "largest", [measure], choice, on, drawn=drawn)
        line = table[table["kind"] == "pair"].iloc[0]
        reached = f" at {100 * line['capability']:.1f}% {on}" if line["capability"] == line["capability"] else ""
        return _above_zero(f"{self.objective_name(one)} − {self.objective_name(other)}{reached}", line, DIFFERENCE)

    def _with_condition(self, objectives: Seq[str]) -> list[str | tuple[str, str]]:
        return [(o, self._first[o]) if o in self._first else o for o in objectives]


def _above_zero(name: str, line: pd.Series, unit: str, sign: float = 1.0) -> Comparison:
    """Split a two-sided p of 0 into its two one-sided tests."""
    estimate, p = sign * float(line["estimate"]), float(line["p"])
    low, high = sorted((sign * float(line["low"]), sign * float(line["high"])))
    above, mde = p / 2 if estimate > 0 else 1 - p / 2, HALF_TO_MDE * (high - low) / 2
    clusters, note = int(line["n_clusters"]), str(line["note"])
    return Comparison(name, estimate, low, high, 0.95, unit, above, 1 - above, mde, clusters, note, slack=estimate)


LEVEL = 0.05
SUPPORTED, CONTRADICTED, INCONCLUSIVE = "supported", "contradicted", "inconclusive"
COLUMNS = ["claim", "statement", "source", "assumptions", "declared", "analysis", "measure", "margin", "verdict"]
COLUMNS += ["comparison", "estimate", "low", "high", "level", "unit", "p", "p_holm", "p_reverse", "p_reverse_holm"]
COLUMNS += ["family_size", "mde", "n_tests", "n_clusters", "why"]
MINUS = "\u2212"


@dataclass(frozen=True)
class TestedClaim:
    """A claim with its comparisons: it holds if `every` one does, or else if any one does."""

    claim: Claim
    comparisons: tuple[Comparison, ...] = ()
    every: bool = True
    untested: str = ""  # why it could not be tested on these rows

    @property
    def p(self) -> float:
        p = [c.p for c in self.comparisons]
        return _p_all(p) if self.every else _p_any(p)

    @property
    def p_reverse(self) -> float:
        p = [c.p_reverse for c in self.comparisons]
        return _p_any(p) if self.every else _p_all(p)

    def deciding(self, verdict: str) -> Comparison:
        """Return the comparison that the verdict rests on: the weakest if all must hold, else the strongest."""
        if not self.comparisons:
            return Comparison("")
        if verdict == CONTRADICTED:
            known = [c.reversed() for c in self.comparisons if not math.isnan(c.p_reverse)]
            return _extreme(known, weakest=not self.every).reversed()
        withheld = [c for c in self.comparisons if math.isnan(c.p)]
        if withheld and (self.every or len(withheld) == len(self.comparisons)):
            return withheld[0]
        return _extreme([c for c in self.comparisons if not math.isnan(c.p)], weakest=self.every)


def _extreme(comparisons: Seq[Comparison], *, weakest: bool) -> Comparison:
    return sorted(comparisons, key=lambda c: (-c.p, c.slack))[0 if weakest else -1]


def judge(claims: Claims, context: EvaluationContext, declared: Literal["before", "after"] = "before") -> pd.DataFrame:
    """Return one line per claim, in order; a claim with a withheld number is inconclusive, with the reason."""
    context.claims = len(claims.claims)
    tested = [_tested(claim, context) for claim in claims.claims]
    both_p = ([t.p for t in tested], [t.p_reverse for t in tested])
    p_holm, p_reverse_holm = ([round(v, 10) for v in holm(np.array(p)).tolist()] for p in both_p)
    size = int(np.isfinite([t.p for t in tested]).sum())
    lines = []
    for one, p, p_reverse in zip(tested, p_holm, p_reverse_holm, strict=True):
        shown, refuted = p <= LEVEL, p_reverse <= LEVEL
        # neither; or both, if slopes differ by less than the margin
        verdict = INCONCLUSIVE if shown == refuted else SUPPORTED if shown else CONTRADICTED
        comparison, claim = one.deciding(verdict), one.claim
        void = _unlearned(claim, context) if verdict == SUPPORTED else ""
        verdict = INCONCLUSIVE if void else verdict
        line: dict[str, object] = {"claim": claim.id, "statement": claim.statement, "source": claim.source}
        line |= {"assumptions": claim.assumptions, "declared": f"{declared} the run", "analysis": claim.kind}
        line |= {"measure": getattr(claim, "measure", ""), "margin": getattr(claim, "margin", NAN)}
        line |= {"verdict": verdict, "comparison": comparison.name, "unit": comparison.unit if one.comparisons else ""}
        line |= {k: round(float(getattr(comparison, k)), 10) for k in ("estimate", "low", "high", "level", "mde")}
        line |= {"p": one.p, "p_holm": p, "p_reverse": one.p_reverse, "p_reverse_holm": p_reverse}
        line |= {"family_size": size, "n_tests": len(one.comparisons), "n_clusters": comparison.n_clusters}
        corrected = correction(one.p, p, size, LEVEL)
        why = void or _reason(one, comparison, verdict, shown and refuted, corrected)
        lines.append(line | {"why": why})
    return pd.DataFrame(lines, columns=COLUMNS)


def _unlearned(claim: Any, context: EvaluationContext) -> str:
    """Return why a supported claim of no drift is void: one of its arms did not learn; empty if it is not."""
    if claim.kind != "no_drift":
        return ""
    names = context.unlearned(claim.objectives, claim.budgets_of(context.budgets)[0])
    return f"Void: not shown to have learned: {', '.join(names)}." if names else ""


def _p_all(p: Seq[float]) -> float:
    """Return the p of a conjunction: the largest; NaN if one is."""
    return max(p) if p and not any(map(math.isnan, p)) else NAN


def _p_any(p: Seq[float]) -> float:
    """Return the p of a disjunction: k times the smallest of k; untestable ones count in k."""
    known = [v for v in p if not math.isnan(v)]
    return min(1.0, len(p) * min(known)) if known else NAN


def _tested(claim: Claim, context: EvaluationContext) -> TestedClaim:
    if faults := [*claim.absent(context.objectives, list(context.axes), context.budgets)]:
        return TestedClaim(claim, untested="; ".join(faults))
    budgets, _ = claim.budgets_of(context.budgets)
    return TESTS[claim.kind](claim, context, budgets)


def _at_budgets(claim: Any, context: EvaluationContext, budgets: tuple[int, ...]) -> TestedClaim:
    """Test differences from the base, between any two objectives, or of each higher objective from each lower one."""
    if claim.kind == "ranks":
        pairs = [*itertools.product(claim.higher, claim.lower)]
    elif claim.kind in ("equivalent", "differ"):
        pairs = [*itertools.combinations(claim.objectives, 2)]
    else:
        pairs = [(o, BASE) for o in claim.objectives]
    at = [(one, other, b) for one, other in pairs for b in budgets]
    tests = context.margin_tests(claim.measure, at, claim.margin)
    if claim.kind in ("moves", "ranks", "onset"):
        up = getattr(claim, "direction", "up") == "up"
        beyond = [t.above() if up else t.below() for t in tests]
        if claim.kind == "onset":  # at most the margin at the early budgets, and more at the largest
            beyond = [c if b == budgets[-1] else c.reversed() for c, (_, _, b) in zip(beyond, at, strict=True)]
        return TestedClaim(claim, tuple(beyond))
    within = tuple(t.within() for t in tests)
    if claim.kind == "differ":
        return TestedClaim(claim, tuple(c.reversed() for c in within), every=False)
    return TestedClaim(claim, within)


def _of_trajectories(claim: Any, context: EvaluationContext, _: tuple[int, ...]) -> TestedClaim:
    """Test each objective's coupling, or each pair's slopes or difference at equal capability."""
    if claim.kind == "coupled":
        found = [context.coupling_slope(claim.measure, claim.on, o) for o in claim.objectives]
        return TestedClaim(claim, tuple(found))
    pairs, every = itertools.product(claim.higher, claim.lower), (*claim.higher, *claim.lower)
    if claim.kind == "steeper":
        return TestedClaim(claim, tuple(context.slope_difference(claim.measure, every, *pair) for pair in pairs))
    return TestedClaim(claim, tuple(context.matched_difference(claim.measure, claim.on, *pair) for pair in pairs))


def _mechanism(claim: Any, context: EvaluationContext, budgets: tuple[int, ...]) -> TestedClaim:
    """Test the probe's shares of each objective."""
    if context.probe is None:
        return TestedClaim(claim, untested="the run was not probed; run `leeway probe`")
    table = context.probe
    found = [
        c for o in claim.objectives for c in mechanism.comparisons(claim, table, budgets, context.objective_name(o), o)
    ]
    return TestedClaim(claim, tuple(found))


def _per_doubling(measure: str) -> str:
    """Return the unit of a slope of `measure` on log2(budget)."""
    return NATS_DOUBLING if measure in LOG_ODDS else DOUBLING


def _diverges(claim: Any, context: EvaluationContext, _: tuple[int, ...]) -> TestedClaim:
    """Require different slopes in log-odds (the GEE) and in points (the bootstrap): equal slopes in one differ in the
    other. Without a GEE fit: the smallest p of the pairs' slopes times their number."""
    table = context.divergence(claim.measure, claim.objectives)
    joint, check = (table[table["kind"] == k].iloc[0] for k in ("joint", "joint-check"))
    p, note = float(joint["p"]), str(joint["note"])
    if not math.isnan(p):
        p_points = float(check["p"])
        both = f"p = {p:.3g} in log-odds (GEE) and {p_points:.3g} in points (bootstrap); both must be significant"
        note = f"{both}{f'; {note}' if note else ''}"
        p = _p_all([p, p_points])
    else:
        pairs = table[table["kind"] == "pair"]
        p = _p_any([float(v) for v in pairs["p"]])
        note = f"from the slopes of {len(pairs)} pairs, because there is no joint test ({note})"
    name, estimate = "the largest slope minus the smallest", float(check["estimate"])
    reverse = context.p_slopes_within(claim.measure, claim.objectives, claim.margin)
    clusters = int(max(joint["n_clusters"], check["n_clusters"]))
    found = Comparison(
        name, estimate, unit=_per_doubling(claim.measure), p=p, p_reverse=reverse, n_clusters=clusters, note=note
    )
    return TestedClaim(claim, (found,))


TESTS: dict[str, Callable[[Any, EvaluationContext, tuple[int, ...]], TestedClaim]] = {
    **dict.fromkeys(("moves", "no_drift", "equivalent", "differ", "ranks", "onset"), _at_budgets),
    **dict.fromkeys(("steeper", "coupled", "matched"), _of_trajectories),
    "diverges": _diverges,
    "mechanism": _mechanism,
}


def _reason(tested: TestedClaim, comparison: Comparison, verdict: str, both: bool, corrected: str) -> str:
    """Return the reason for a verdict, with the numbers of the comparison it rests on."""
    claim, tests, every = tested.claim, len(tested.comparisons), tested.every
    result, margin = _result(comparison), ""
    if getattr(claim, "margin", 0.0) and comparison.unit != SLOPE and claim.kind != "diverges":
        margin = f", against a margin of {_size(claim, comparison)}"  # of slopes only the opposite has a margin
    if tested.untested:
        return f"Not tested: {tested.untested}."
    if math.isnan(comparison.p) and verdict == INCONCLUSIVE:
        return f"Withheld: {comparison.name}: {comparison.note or 'no test is possible'}."
    if both:
        return f"Both are shown: a difference, and one below the margin of {_size(claim, comparison)} ({result})."
    note = f"; {comparison.note}" if comparison.note else ""
    if verdict == CONTRADICTED:
        opposite = f"{_opposite(claim, comparison)}{_scope(tests, not every)}"
        return f"The opposite is shown ({opposite}): {result}{note}."
    if verdict == INCONCLUSIVE:
        power = ""
        if not math.isnan(comparison.mde):
            size = format_effect(comparison.mde, comparison.unit).removeprefix("+")
            power = f"; {comparison.n_clusters:,} prompts detect a true value of {size} with 80% power"
        return f"Neither the claim nor its opposite is shown: {result}{margin}{corrected}{power}{note}."
    if every and tests > 1:
        return f"Shown in {_all(tests)} comparisons; the closest: {result}{margin}{note}."
    return f"Shown{_scope(tests, every)}: {result}{margin}{note}."


def correction(p: float, p_holm: float, claims: int, level: float) -> str:
    """Return a note if the claim is significant only before Holm's correction over the claims."""
    if p <= level < p_holm:
        return f"; significant on its own (p = {p:.3f}), but not after Holm over {claims} claims (p = {p_holm:.3f})"
    return ""


def _opposite(claim: Claim, comparison: Comparison) -> str:
    size, margin = _size(claim, comparison), getattr(claim, "margin", 0.0)
    change = {"up": "rise", "down": "fall"}.get(getattr(claim, "direction", ""), "")
    return {
        "mechanism": f"no such share exceeds {size} and its control",
        "moves": f"there is no {change} by more than {size}" if margin else f"there is no {change} but the opposite",
        "no_drift": f"there is a difference of more than {size}",
        "equivalent": f"there is a difference of more than {size}",
        "differ": f"no two differ by more than {size}",
        "ranks": f"there is no lead of more than {size}" if margin else "the order is reversed",
        "steeper": "the order is reversed",
        "diverges": f"no two slopes differ by more than {size}",
        "coupled": "the slope is below 0",
        "matched": "the order is reversed",
        "onset": f"a {change} by more than {size} is present too early, or absent at the largest budget",
    }[claim.kind]


def _scope(tests: int, every: bool) -> str:
    if tests < 2:
        return ""
    return f" in {_all(tests)} comparisons, the closest" if every else f" in one of {tests} comparisons"


def _all(tests: int) -> str:
    return "both" if tests == 2 else f"all {tests}"


def _result(comparison: Comparison) -> str:
    text = f"{comparison.name} is {format_effect(comparison.estimate, comparison.unit)}"
    if not math.isnan(comparison.low):
        ends = (comparison.low, comparison.high)
        low, high = (format_effect(v, comparison.unit, with_unit=False) for v in ends)
        text += f" ({comparison.level:.0%} interval {low} to {high})"
    return text


def _size(claim: Claim, comparison: Comparison) -> str:
    return format_effect(getattr(claim, "margin", 0.0), comparison.unit).removeprefix("+")


def format_effect(value: float, unit: str, *, with_unit: bool = True) -> str:
    """Format an effect with its sign: "+3.1 points", "+0.42 points per point of capability"."""
    if unit in (SLOPE, NATS, NATS_DOUBLING):
        name = "points per point of capability" if unit == SLOPE else unit.removeprefix("difference ")
        text = f"{abs(value):.2f}"
    else:
        size = 100 * abs(value)
        text, name = f"{size:.{2 if 0 < size < 0.1 else 1}f}", "points per doubling" if unit == DOUBLING else "points"
    signed = text if float(text) == 0 else ("+" if value > 0 else MINUS) + text
    return f"{signed} {name}" if with_unit else signed
