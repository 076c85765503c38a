"""From claims and rows to verdicts: supported, contradicted, or inconclusive with what was missing.

Every kind is a statement and has a contrary, and both are tested. A statement about several comparisons at once holds
where each of them does (intersection–union: its p is the largest, no correction inside; Berger 1982, Technometrics
24:295); its contrary holds where one comparison's does (p is k times the smallest of k). Holm runs over all claims of a
family, once for the statements and once for the contraries.

Why a verdict is what it is, in one plain sentence, and what would have been seen.
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

from leeway.claims import schema
from leeway.claims.comparisons import DOUBLING, NAN, SLOPE, Comparison, EvaluationContext
from leeway.claims.schema import Claim
from leeway.stats.contrasts import holm
from leeway.stats.metrics import BASE

MINUS = "\u2212"


def because(
    claim: Claim,
    part: Comparison,
    verdict: str,
    *,
    tests: int,
    every: bool,
    absent: str,
    both: bool,
    corrected: str = "",
) -> str:
    """The reason, with the numbers of the comparison that decided."""
    if absent:
        return f"Not put to the test: {absent}."
    if math.isnan(part.p) and verdict == "inconclusive":
        return f"No number: {part.what}: {part.note or 'withheld'}."
    if both:
        return f"Both can be shown: they differ, and by less than the margin of {_size(claim, part)} ({_seen(part)})."
    text = {
        "supported": _shown(claim, part, tests, every),
        "contradicted": f"The contrary is shown, that {_contrary(claim, part)}{_of(tests, not every)}: {_seen(part)}",
        "inconclusive": f"Neither it nor its contrary is shown: {_seen(part)}{_against(claim, part)}{corrected}"
        f"{_missing(part)}",
    }[verdict]
    return f"{text}{_weak(part)}."


def _shown(claim: Claim, part: Comparison, tests: int, every: bool) -> str:
    if every and tests > 1:
        return f"Shown in {_all(tests)} comparisons; the closest is {_seen(part)}{_against(claim, part)}"
    return f"Shown{_of(tests, every)}: {_seen(part)}{_against(claim, part)}"


def correction(p: float, p_holm: float, claims: int, level: float) -> str:
    """What a reader of the interval needs to know: that it was shown but for the other claims."""
    if p <= level < p_holm:
        return f"; shown by itself (p = {p:.3f}), but not after Holm over {claims} claims (p = {p_holm:.3f})"
    return ""


def _contrary(claim: Claim, part: Comparison) -> str:
    """What is so if the claim is not."""
    size, margin = _size(claim, part), getattr(claim, "margin", 0.0)
    way = {"up": "rise", "down": "fall"}.get(getattr(claim, "direction", ""), "")
    return {
        "moves": f"there is no {way} by more than {size}" if margin else f"there is no {way} but the opposite",
        "no_drift": f"there is a difference of more than {size}",
        "alike": f"there is a difference of more than {size}",
        "differ": f"no two differ by more than {size}",
        "ranks": f"there is no lead of more than {size}" if margin else "the order is the other way round",
        "steeper": "the order is the other way round",
        "diverges": f"no two slopes differ by more than {size}",
        "coupled": "the slope is below 0",
        "matched": "the order is the other way round",
        "onset": f"a {way} by more than {size} is there too early, or not there at the largest budget",
    }[claim.analysis]


def _of(tests: int, every: bool) -> str:
    if tests < 2:
        return ""
    return f" in {_all(tests)} comparisons, the closest" if every else f" in one of {tests} comparisons"


def _all(tests: int) -> str:
    return "both" if tests == 2 else f"all {tests}"


def _seen(part: Comparison) -> str:
    text = f"{part.what} is {written(part.estimate, part.unit)}"
    if not math.isnan(part.low):
        low, high = (written(v, part.unit, with_unit=False) for v in (part.low, part.high))
        text += f" ({part.level:.0%} interval {low} to {high})"
    return text


def _against(claim: Claim, part: Comparison) -> str:
    margin = getattr(claim, "margin", 0.0)
    if not margin or part.unit == SLOPE or claim.analysis == "diverges":  # there only the contrary has a margin
        return ""
    return f", held against a margin of {_size(claim, part)}"


def _size(claim: Claim, part: Comparison) -> str:
    return written(getattr(claim, "margin", 0.0), part.unit).removeprefix("+")


def _missing(part: Comparison) -> str:
    if math.isnan(part.mde):
        return ""
    size = written(part.mde, part.unit).removeprefix("+")
    return f"; with {part.n_clusters:,} prompts, a true value of {size} is seen with 80% power"


def _weak(part: Comparison) -> str:
    return f"; {part.note}" if part.note else ""


def written(value: float, unit: str, *, with_unit: bool = True) -> str:
    """+3.1 points; +0.42 points per point."""
    if unit == SLOPE:
        text, name = f"{abs(value):.2f}", "points per point of capability"
    else:
        size = 100 * abs(value)
        text, name = f"{size:.{2 if 0 < size < 0.1 else 1}f}", "points per doubling" if unit == DOUBLING else "points"
    signed = text if float(text) == 0 else ("+" if value > 0 else MINUS) + text
    return f"{signed} {name}" if with_unit else signed


LEVEL = 0.05
SUPPORTED, CONTRADICTED, INCONCLUSIVE = "supported", "contradicted", "inconclusive"
COLUMNS = [
    "claim",
    "says",
    "source",
    "ours",
    "written",
    "analysis",
    "measure",
    "margin",
    "verdict",
    "where",
    "estimate",
]
COLUMNS += ["low", "high", "level", "unit", "p", "p_holm", "p_reverse", "p_contrary_holm", "family_size", "mde"]
COLUMNS += ["n_tests", "n_clusters", "why"]


@dataclass(frozen=True)
class Tested:
    """A claim with the comparisons it is made of. `every`: it holds where all do; otherwise where one does."""

    claim: schema.Claim
    parts: tuple[Comparison, ...] = ()
    every: bool = True
    absent: str = ""  # why it could not be put to these rows at all

    @property
    def p(self) -> float:
        return _of_all([t.p for t in self.parts]) if self.every else _of_some([t.p for t in self.parts])

    @property
    def p_reverse(self) -> float:
        found = [t.p_reverse for t in self.parts]
        return _of_some(found) if self.every else _of_all(found)

    def deciding(self, verdict: str) -> Comparison:
        """The comparison on which the verdict rests: the weakest where all have to hold, else the strongest."""
        if not self.parts:
            return Comparison("")
        withheld = [t for t in self.parts if math.isnan(t.p)]
        if verdict == CONTRADICTED:
            known = [t.turned() for t in self.parts if not math.isnan(t.p_reverse)]
            return _strength(known, weakest=not self.every).turned()
        if withheld and (self.every or len(withheld) == len(self.parts)):
            return withheld[0]
        return _strength([t for t in self.parts if not math.isnan(t.p)], weakest=self.every)


def _strength(parts: Seq[Comparison], *, weakest: bool) -> Comparison:
    ordered = sorted(parts, key=lambda t: (-t.p, t.room))
    return ordered[0 if weakest else -1]


def judge(
    claims: schema.Claims, bench: EvaluationContext, written: Literal["before", "after"] = "before"
) -> pd.DataFrame:
    """One line per claim, in their order; where a number is withheld the claim is inconclusive, with the reason."""
    bench.claims = len(claims.claims)
    tested = [_tested(claim, bench) for claim in claims.claims]
    p_holm, contrary_holm = _holm([t.p for t in tested]), _holm([t.p_reverse for t in tested])
    sizes = int(np.isfinite([t.p for t in tested]).sum())
    lines = []
    for one, p, contrary in zip(tested, p_holm, contrary_holm, strict=True):
        verdict = _verdict(p, contrary)
        part = one.deciding(verdict)
        line: dict[str, object] = {"claim": one.claim.id, "says": one.claim.says, "source": one.claim.source}
        line |= {"ours": one.claim.ours, "written": f"{written} the run", "analysis": one.claim.analysis}
        line |= {"measure": getattr(one.claim, "measure", ""), "margin": getattr(one.claim, "margin", NAN)}
        line |= {"verdict": verdict, "where": part.what, "unit": part.unit if one.parts else ""}
        line |= {k: round(float(getattr(part, k)), 10) for k in ("estimate", "low", "high", "level", "mde")}
        line |= {"p": one.p, "p_holm": p, "p_reverse": one.p_reverse, "p_contrary_holm": contrary}
        line |= {"family_size": sizes, "n_tests": len(one.parts), "n_clusters": part.n_clusters}
        both = p <= LEVEL and contrary <= LEVEL
        lost = correction(one.p, p, sizes, LEVEL)
        why = because(
            one.claim,
            part,
            verdict,
            tests=len(one.parts),
            every=one.every,
            absent=one.absent,
            both=both,
            corrected=lost,
        )
        lines.append(line | {"why": why})
    return pd.DataFrame(lines, columns=COLUMNS)


def _verdict(p: float, contrary: float) -> str:
    shown, refuted = p <= LEVEL, contrary <= LEVEL
    if shown == refuted:  # neither; or both, where slopes differ by less than what counts
        return INCONCLUSIVE
    return SUPPORTED if shown else CONTRADICTED


def _of_all(p: Seq[float]) -> float:
    """What holds where all hold: as strong as the weakest, and unknown where one is."""
    return max(p) if p and not any(map(math.isnan, p)) else NAN


def _of_some(p: Seq[float]) -> float:
    """What holds where one holds: the smallest of k, times k; one that cannot be tested still counts."""
    known = [v for v in p if not math.isnan(v)]
    return min(1.0, len(p) * min(known)) if known else NAN


def _holm(p: Seq[float]) -> list[float]:
    """Holm's p over those that were tested."""
    found = np.array(p, dtype=float)
    known = np.isfinite(found)
    found[known] = holm(found[known])
    return [round(float(v), 10) for v in found]


def _tested(claim: schema.Claim, bench: EvaluationContext) -> Tested:
    if faults := [*claim.absent(bench.objectives, list(bench.axes), bench.budgets)]:
        return Tested(claim, absent="; ".join(faults))
    budgets, _ = claim.budgets_of(bench.budgets)
    return MAKERS[claim.analysis](claim, bench, budgets)


def _moves(claim: Any, bench: EvaluationContext, budgets: tuple[int, ...]) -> Tested:
    pairs = [(o, BASE, b) for o in claim.objectives for b in budgets]
    cells = bench.cells(claim.measure, pairs, claim.margin)
    return Tested(claim, tuple(c.higher() if claim.direction == "up" else c.lower() for c in cells))


def _no_drift(claim: Any, bench: EvaluationContext, budgets: tuple[int, ...]) -> Tested:
    pairs = [(o, BASE, b) for o in claim.objectives for b in budgets]
    return Tested(claim, _within(claim, bench, pairs))


def _alike(claim: Any, bench: EvaluationContext, budgets: tuple[int, ...]) -> Tested:
    pairs = [(o, other, b) for o, other in itertools.combinations(claim.objectives, 2) for b in budgets]
    return Tested(claim, _within(claim, bench, pairs))


def _differ(claim: Any, bench: EvaluationContext, budgets: tuple[int, ...]) -> Tested:
    return Tested(claim, tuple(t.turned() for t in _alike(claim, bench, budgets).parts), every=False)


def _within(claim: Any, bench: EvaluationContext, pairs: Seq[tuple[str, str, int]]) -> tuple[Comparison, ...]:
    cells = bench.cells(claim.measure, pairs, claim.margin)
    return tuple(c.within() for c in cells)


def _ranks(claim: Any, bench: EvaluationContext, budgets: tuple[int, ...]) -> Tested:
    pairs = [(h, low, b) for h in claim.higher for low in claim.lower for b in budgets]
    return Tested(claim, tuple(c.higher() for c in bench.cells(claim.measure, pairs, claim.margin)))


def _steeper(claim: Any, bench: EvaluationContext, _: tuple[int, ...]) -> Tested:
    together = (*claim.higher, *claim.lower)
    pairs = itertools.product(claim.higher, claim.lower)
    return Tested(claim, tuple(bench.steeper(claim.measure, together, h, low) for h, low in pairs))


def _diverges(claim: Any, bench: EvaluationContext, _: tuple[int, ...]) -> Tested:
    """Shown where slopes differ in log-odds (the GEE) and in points (its check), for equal ones in one differ in the
    other; without a fit, the smallest p of the pairs' slopes times their number."""
    table = bench.divergence(claim.measure, claim.objectives)
    joint, check = (table[table["kind"] == k].iloc[0] for k in ("joint", "joint-check"))
    p, note = float(joint["p"]), str(joint["note"])
    if not math.isnan(p):
        in_points = float(check["p"])
        said = f"p = {p:.3g} in log-odds (GEE), {in_points:.3g} in points (draws), both have to show it"
        note = f"{said}{f'; {note}' if note else ''}"
        p = _of_all([p, in_points])
    else:
        p = _of_some([float(v) for v in table.loc[table["kind"] == "pair", "p"]])
        note = f"by the slopes of {(table['kind'] == 'pair').sum()} pairs, for there is no joint test ({note})"
    part = Comparison(
        "the largest slope minus the smallest",
        float(check["estimate"]),
        unit=DOUBLING,
        p=p,
        p_reverse=bench.slopes_within(claim.measure, claim.objectives, claim.margin),
        n_clusters=int(max(joint["n_clusters"], check["n_clusters"])),
        note=note,
    )
    return Tested(claim, (part,))


def _coupled(claim: Any, bench: EvaluationContext, _: tuple[int, ...]) -> Tested:
    return Tested(claim, tuple(bench.coupled(claim.measure, claim.on, o) for o in claim.objectives))


def _matched(claim: Any, bench: EvaluationContext, _: tuple[int, ...]) -> Tested:
    pairs = itertools.product(claim.higher, claim.lower)
    return Tested(claim, tuple(bench.matched(claim.measure, claim.on, h, low) for h, low in pairs))


def _onset(claim: Any, bench: EvaluationContext, budgets: tuple[int, ...]) -> Tested:
    """Not beyond the margin at the early budgets, and beyond it at the largest."""
    pairs = [(o, BASE, b) for o in claim.objectives for b in budgets]
    found = []
    for (_, _, budget), cell in zip(pairs, bench.cells(claim.measure, pairs, claim.margin), strict=True):
        moved = cell.higher() if claim.direction == "up" else cell.lower()
        found.append(moved if budget == budgets[-1] else moved.turned())
    return Tested(claim, tuple(found))


MAKERS: dict[str, Callable[[Any, EvaluationContext, tuple[int, ...]], Tested]] = {
    "moves": _moves,
    "no_drift": _no_drift,
    "alike": _alike,
    "differ": _differ,
    "ranks": _ranks,
    "steeper": _steeper,
    "diverges": _diverges,
    "coupled": _coupled,
    "matched": _matched,
    "onset": _onset,
}
