"""From claims and rows to verdicts: supported, contradicted, or inconclusive, with the reason in one sentence.

Every claim has an opposite, and both are tested. A claim about several comparisons holds if each of them does
(intersection–union: its p is the largest, uncorrected inside; Berger 1982, Technometrics 24:295); its opposite holds if
that of one comparison does (p is k times the smallest of k). Holm runs over all claims of a family, once for the claims
and once for their opposites.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from leeway.claims.comparisons import DOUBLING, SLOPE, Comparison, EvaluationContext
from leeway.claims.schema import Claim, Claims
from leeway.stats.contrasts import holm
from leeway.stats.intervals import NAN
from leeway.stats.metrics import BASE

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
        line: dict[str, object] = {"claim": claim.id, "statement": claim.statement, "source": claim.source}
        line |= {"assumptions": claim.assumptions, "declared": f"{declared} the run", "analysis": claim.kind}
        line |= {"measure": getattr(claim, "measure", ""), "margin": getattr(claim, "margin", NAN)}
        line |= {"verdict": verdict, "comparison": comparison.name, "unit": comparison.unit if one.comparisons else ""}
        line |= {k: round(float(getattr(comparison, k)), 10) for k in ("estimate", "low", "high", "level", "mde")}
        line |= {"p": one.p, "p_holm": p, "p_reverse": one.p_reverse, "p_reverse_holm": p_reverse}
        line |= {"family_size": size, "n_tests": len(one.comparisons), "n_clusters": comparison.n_clusters}
        corrected = correction(one.p, p, size, LEVEL)
        lines.append(line | {"why": _reason(one, comparison, verdict, shown and refuted, corrected)})
    return pd.DataFrame(lines, columns=COLUMNS)


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
    found = Comparison(name, estimate, unit=DOUBLING, p=p, p_reverse=reverse, n_clusters=clusters, note=note)
    return TestedClaim(claim, (found,))


TESTS: dict[str, Callable[[Any, EvaluationContext, tuple[int, ...]], TestedClaim]] = {
    **dict.fromkeys(("moves", "no_drift", "equivalent", "differ", "ranks", "onset"), _at_budgets),
    **dict.fromkeys(("steeper", "coupled", "matched"), _of_trajectories),
    "diverges": _diverges,
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
    if unit == SLOPE:
        text, name = f"{abs(value):.2f}", "points per point of capability"
    else:
        size = 100 * abs(value)
        text, name = f"{size:.{2 if 0 < size < 0.1 else 1}f}", "points per doubling" if unit == DOUBLING else "points"
    signed = text if float(text) == 0 else ("+" if value > 0 else MINUS) + text
    return f"{signed} {name}" if with_unit else signed
