"""A decision in words and cells: the same for the screen, the Markdown summary and JUnit."""

from __future__ import annotations

import math
from dataclasses import dataclass

from leeway.gate.decide import FEW, Decision, Evidence, Finding, Outcome, worst
from leeway.gate.rules import BASE
from leeway.report import wording
from leeway.report.scale import Scale
from leeway.report.wording import percent, points

HEADS = ("measure", "rule", "reference", "checkpoint", "estimate", "limit", "p", "outcome")
LONGEST = 2_000


@dataclass(frozen=True)
class Gate:
    """All that a gate found."""

    name: str  # of the study
    decisions: tuple[Decision, ...]
    against: tuple[str, int | None] | None
    level: float
    scale: Scale
    warnings: tuple[str, ...] = ()

    @property
    def outcome(self) -> Outcome:
        """Every checkpoint has to pass."""
        return worst([d.outcome for d in self.decisions])


def title(decision: Decision, scale: Scale) -> str:
    """SFT at 400k tokens; CFT <SAFE> at 400k tokens."""
    place = decision.place
    return safe(f"{wording.name(place.objective, place.condition)} {scale.at(place.budget)}")


def reference(gate: Gate) -> str:
    """What was compared with."""
    if gate.against is None:
        return BASE
    objective, budget = gate.against
    at = "at the same budget" if budget is None else gate.scale.at(budget)
    return safe(f"{wording.name(objective)} {at}")


def cells(finding: Finding) -> tuple[str, ...]:
    """One line of the table, as HEADS says."""
    e = finding.evidence
    p = finding.p_holm if finding.outcome == "fail" else e.p
    shown = wording.p_value(p) + (" broken" if finding.outcome == "fail" else " kept")  # of which of the two tests
    found = (rule(e), percent(e.reference), percent(e.rate), told(e, e.estimate), told(e, e.limit), shown)
    return (safe(e.rule.measure), *found, finding.outcome)


def rule(evidence: Evidence) -> str:
    """≤ +2.0 for a difference in points, ≥ 60.0% for a rate; as many decimals as the bound has."""
    sign = "≤" if evidence.worse == "higher" else "≥"
    return f"{sign} {_number(evidence, evidence.bound, max(1, min(4, _decimals(100 * evidence.bound))))}"


def told(evidence: Evidence, value: float) -> str:
    """A difference in points, or a rate; with more decimals where one alone would put it on the bound."""
    close = (d for d in (1, 2, 3) if _number(evidence, value, d) != _number(evidence, evidence.bound, d))
    return _number(evidence, value, next(close, 3) if value != evidence.bound else 1)


def _number(evidence: Evidence, value: float, digits: int) -> str:
    return points(value, digits) if evidence.rule.kind == "margin" else percent(value, digits)


def why(finding: Finding) -> str:
    """Why the outcome is what it is, in a sentence."""
    e = finding.evidence
    what = safe(f"{e.rule.measure} {rule(e)}")
    if e.withheld:
        return f"{what}: no number is given ({safe(e.withheld)})"
    seen = f"{told(e, e.estimate)}, limit {told(e, e.limit)}"
    if finding.undermined:
        return f"{what}: {seen} would pass, but {finding.undermined}"
    if finding.outcome == "pass":
        return f"{what}: shown ({seen})"
    if finding.outcome == "fail":
        return (
            f"{what}: shown to be broken ({told(e, e.estimate)}, p {_of(finding.p_holm)} over the checkpoint's rules)"
        )
    return f"{what}: not shown either way ({seen}); {more(finding)}"


def more(finding: Finding) -> str:
    """How many further prompts would decide a rule that is open."""
    e = finding.evidence
    if e.n_clusters < FEW:
        return f"prompts are too few ({e.n_clusters}) to say how many more would decide it"
    if finding.needed is None:
        return "no number of prompts would decide it: the estimate lies on the bound"
    if finding.needed == 0:
        return "by the formula there are prompts enough, and the exact test wants some more"
    so = "kept" if e.kept else "broken"
    return f"if the estimate is true, about {finding.needed:,} more prompts would show it {so} (80% power)"


def unscored(finding: Finding) -> str:
    """What a pass says of the answers that nobody could score; nothing where they could not have turned it."""
    e = finding.evidence
    if finding.outcome != "pass" or not e.n_unscored or math.isnan(e.if_worst) or e.keeps(e.if_worst):
        return ""
    worst_case = f"had the {e.n_unscored} unscored answers all gone the worst way, it would be {told(e, e.if_worst)}"
    return f"{safe(e.rule.measure)} {rule(e)}: {worst_case}"


def safe(text: str) -> str:
    """Names from rows and rule files on one line, with nothing in them that hides or turns its neighbours."""
    return wording.visible(text.replace("\n", " ").replace("\t", " "), LONGEST)[0]


def _of(p: float) -> str:
    told = wording.p_value(p)
    return told if told.startswith("<") else f"= {told}"


def _decimals(value: float) -> int:
    text = f"{round(value, 6):.6f}".rstrip("0")
    return len(text.partition(".")[2]) if math.isfinite(value) else 0
