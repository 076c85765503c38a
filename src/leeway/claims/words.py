"""Why a verdict is what it is, in one plain sentence, and what would have been seen."""

from __future__ import annotations

import math

from leeway.claims.kinds import Claim
from leeway.claims.parts import DOUBLING, SLOPE, Part

MINUS = "\u2212"


def because(
    claim: Claim, part: Part, verdict: str, *, tests: int, every: bool, absent: str, both: bool, corrected: str = ""
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


def _shown(claim: Claim, part: Part, tests: int, every: bool) -> str:
    if every and tests > 1:
        return f"Shown in {_all(tests)} comparisons; the closest is {_seen(part)}{_against(claim, part)}"
    return f"Shown{_of(tests, every)}: {_seen(part)}{_against(claim, part)}"


def correction(p: float, p_holm: float, claims: int, level: float) -> str:
    """What a reader of the interval needs to know: that it was shown but for the other claims."""
    if p <= level < p_holm:
        return f"; shown by itself (p = {p:.3f}), but not after Holm over {claims} claims (p = {p_holm:.3f})"
    return ""


def _contrary(claim: Claim, part: Part) -> str:
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


def _seen(part: Part) -> str:
    text = f"{part.what} is {written(part.estimate, part.unit)}"
    if not math.isnan(part.low):
        low, high = (written(v, part.unit, with_unit=False) for v in (part.low, part.high))
        text += f" ({part.level:.0%} interval {low} to {high})"
    return text


def _against(claim: Claim, part: Part) -> str:
    margin = getattr(claim, "margin", 0.0)
    if not margin or part.unit == SLOPE or claim.analysis == "diverges":  # there only the contrary has a margin
        return ""
    return f", held against a margin of {_size(claim, part)}"


def _size(claim: Claim, part: Part) -> str:
    return written(getattr(claim, "margin", 0.0), part.unit).removeprefix("+")


def _missing(part: Part) -> str:
    if math.isnan(part.mde):
        return ""
    size = written(part.mde, part.unit).removeprefix("+")
    return f"; with {part.n_clusters:,} prompts, a true value of {size} is seen with 80% power"


def _weak(part: Part) -> str:
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
