"""What a gate leaves behind: gate.json for programs, gate.xml (JUnit) for CI, gate.md for people.

None of them holds a time: the same rows give the same bytes.

A decision in words and cells: the same for the screen, the Markdown summary and JUnit.

The gate on standard output: a table on a terminal, plain lines of the same elsewhere.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from leeway.errors import LeewayError, first_line
from leeway.gate.decide import EXIT, FEW, Decision, Evidence, Finding, Outcome, worst
from leeway.gate.rules import BASE
from leeway.io import write_file
from leeway.report import formatting
from leeway.report.formatting import BudgetUnit, percent, points, to_json

if TYPE_CHECKING:
    from rich.console import Console


HEADS = ("measure", "rule", "reference", "checkpoint", "estimate", "limit", "p", "outcome")
LONGEST = 2_000


@dataclass(frozen=True)
class Gate:
    """All that a gate found."""

    name: str  # of the study
    decisions: tuple[Decision, ...]
    against: tuple[str, int | None] | None
    level: float
    scale: BudgetUnit
    warnings: tuple[str, ...] = ()

    @property
    def outcome(self) -> Outcome:
        """Every checkpoint has to pass."""
        return worst([d.outcome for d in self.decisions])


def title(decision: Decision, scale: BudgetUnit) -> str:
    """SFT at 400k tokens; CFT <SAFE> at 400k tokens."""
    place = decision.place
    return safe(f"{formatting.objective_name(place.objective, place.condition)} {scale.at(place.budget)}")


def reference(gate: Gate) -> str:
    """What was compared with."""
    if gate.against is None:
        return BASE
    objective, budget = gate.against
    at = "at the same budget" if budget is None else gate.scale.at(budget)
    return safe(f"{formatting.objective_name(objective)} {at}")


def cells(finding: Finding) -> tuple[str, ...]:
    """One line of the table, as HEADS says."""
    e = finding.evidence
    p = finding.p_holm if finding.outcome == "fail" else e.p
    shown = formatting.p_value(p) + (" broken" if finding.outcome == "fail" else " kept")  # of which of the two tests
    found = (rule(e), percent(e.reference), percent(e.rate), told(e, e.estimate), told(e, e.limit), shown)
    return (safe(e.rule.measure), *found, finding.outcome)


def rule(evidence: Evidence) -> str:
    """≤ +2.0 for a difference in points, ≥ 60.0% for a rate; as many decimals as the bound has."""
    sign = "≤" if evidence.worse == "higher" else "≥"
    return f"{sign} {_formatted(evidence, evidence.bound, max(1, min(4, _decimals(100 * evidence.bound))))}"


def told(evidence: Evidence, value: float) -> str:
    """A difference in points, or a rate; with more decimals where one alone would put it on the bound."""
    close = (d for d in (1, 2, 3) if _formatted(evidence, value, d) != _formatted(evidence, evidence.bound, d))
    return _formatted(evidence, value, next(close, 3) if value != evidence.bound else 1)


def _formatted(evidence: Evidence, value: float, digits: int) -> str:
    return points(value, digits) if evidence.rule.kind == "margin" else percent(value, digits)


def why(finding: Finding) -> str:
    """Why the outcome is what it is, in a sentence."""
    e = finding.evidence
    what = safe(f"{e.rule.measure} {rule(e)}")
    if e.withheld:
        return f"{what}: no number is given ({safe(e.withheld)})"
    seen = f"{told(e, e.estimate)}, limit {told(e, e.limit)}"
    if finding.downgraded:
        return f"{what}: {seen} would pass, but {finding.downgraded}"
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
    return formatting.escape_invisible(text.replace("\n", " ").replace("\t", " "), LONGEST)[0]


def _of(p: float) -> str:
    told = formatting.p_value(p)
    return told if told.startswith("<") else f"= {told}"


def _decimals(value: float) -> int:
    text = f"{round(value, 6):.6f}".rstrip("0")
    return len(text.partition(".")[2]) if math.isfinite(value) else 0


FORMAT = 1  # of gate.json
NAMES = ("gate.json", "gate.xml", "gate.md")
MARK = {"pass": "✅ pass", "fail": "❌ fail", "inconclusive": "❔ inconclusive"}
MARKDOWN = re.compile(r"([\\`*_{}\[\]<>()#|~!$&])")
NUMBERS = ("reference", "rate", "estimate", "limit", "if_worst", "se", "p", "p_exceeded")


def clear(folder: Path) -> None:
    """Remove an earlier decision: where this one ends in a mistake, the old one must not stand for it."""
    for name in NAMES:
        (folder / name).unlink(missing_ok=True)


def write(gate: Gate, folder: Path, told: dict[str, Any]) -> None:
    """Write the three files; `told` is what the run and the rule file say of themselves."""
    for name, text in zip(NAMES, (to_json(machine(gate, told)), junit(gate), markdown(gate)), strict=True):
        try:
            write_file(folder / name, text)
        except OSError as error:
            what = f"{folder / name} cannot be written ({first_line(error)})"
            raise LeewayError(what, fix="free the disk, or give another --out") from error


def machine(gate: Gate, told: dict[str, Any]) -> dict[str, Any]:
    """gate.json as Python values; null where there is no number."""
    found: dict[str, Any] = {"format": FORMAT, **told, "study": gate.name, "level": gate.level}
    found |= {"against": reference(gate), "outcome": gate.outcome, "exit": EXIT[gate.outcome]}
    return found | {"warnings": [*gate.warnings], "checkpoints": [_checkpoint(d) for d in gate.decisions]}


def _checkpoint(decision: Decision) -> dict[str, Any]:
    place = decision.place
    found: dict[str, Any] = {"objective": place.objective, "budget": place.budget, "condition": place.condition}
    found |= {"seeds": [*decision.seeds], "outcome": decision.outcome, "warnings": [*decision.warnings]}
    return found | {"rules": [_rule(f) for f in decision.findings]}


def _rule(finding: Finding) -> dict[str, Any]:
    e = finding.evidence
    found: dict[str, Any] = {"measure": e.rule.measure, "kind": e.rule.kind, e.rule.kind: e.rule.bound}
    found |= {"worse": e.worse, "bound": e.bound, "outcome": finding.outcome, "why": why(finding)}
    found |= {name: _rounded(getattr(e, name)) for name in NUMBERS}
    found |= {"p_exceeded_holm": _rounded(finding.p_holm), "n": e.n, "n_clusters": e.n_clusters}
    return found | {"n_unscored": e.n_unscored, "more_prompts": finding.needed, "notes": [*e.notes]}


def junit(gate: Gate) -> str:
    """JUnit XML: a suite per checkpoint, a case per rule.

    Inconclusive is an `error`: viewers show it as not passed and apart from failures. `skipped` would be green in most.
    """
    tally = [f.outcome for d in gate.decisions for f in d.findings]
    root = ElementTree.Element("testsuites", {"name": "leeway gate", **_tally(tally)})
    for decision in gate.decisions:
        name = title(decision, gate.scale)
        counts = _tally([f.outcome for f in decision.findings])
        suite = ElementTree.SubElement(root, "testsuite", {"name": _xml(name), **counts, "skipped": "0"})
        for finding in decision.findings:
            _case(suite, name, finding)
        if decision.warnings:
            ElementTree.SubElement(suite, "system-out").text = _xml("\n".join(decision.warnings))
    ElementTree.indent(root, " ")
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _tally(outcomes: Sequence[str]) -> dict[str, str]:
    failures, errors = outcomes.count("fail"), outcomes.count("inconclusive")
    # a gate times nothing; viewers want the attribute
    return {"tests": str(len(outcomes)), "failures": str(failures), "errors": str(errors), "time": "0"}


def _case(suite: ElementTree.Element, name: str, finding: Finding) -> None:
    e = finding.evidence
    named = _xml(f"{e.rule.measure} {rule(e)}")
    case = ElementTree.SubElement(suite, "testcase", {"name": named, "classname": _xml(f"leeway.{name}"), "time": "0"})
    if finding.outcome != "pass":
        kind = "failure" if finding.outcome == "fail" else "error"
        told = {"type": finding.outcome, "message": _xml(why(finding))}
        ElementTree.SubElement(case, kind, told).text = _xml("\n".join([why(finding), *e.notes]))
    else:
        ElementTree.SubElement(case, "system-out").text = _xml("\n".join([why(finding), *e.notes]))


def markdown(gate: Gate) -> str:
    """A summary for $GITHUB_STEP_SUMMARY or a pull request."""
    parts = [f"## Leeway gate: {MARK[gate.outcome]}\n"]
    for decision in gate.decisions:
        head = f"{_md(title(decision, gate.scale))}, against {_md(reference(gate))}: {MARK[decision.outcome]}"
        rows = [HEADS, ("---", "---", "--:", "--:", "--:", "--:", "--:", "---")]
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        for finding in decision.findings:
            *found, outcome = cells(finding)
            lines.append("| " + " | ".join([*map(_md, found), MARK[outcome]]) + " |")
        open_ = [f"- {_md(why(f))}" for f in decision.findings if f.outcome != "pass"]
        notes = [f"- Note: {_md(w)}" for w in decision.warnings]
        parts.append("\n".join([f"### {head}\n", *lines, "", *open_, *notes]).rstrip() + "\n")
    parts += [f"Note: {_md(w)}\n" for w in gate.warnings]
    share = f"{100 * gate.level:g}%"
    text = f"Differences in points, checkpoint − reference; limits and p-values one-sided at {share}, the p of a fail"
    text += " corrected over its checkpoint's rules. A pass is shown, not assumed; *inconclusive* means that neither a"
    text += " pass nor a fail was shown."
    return "\n".join([*parts, text]) + "\n"


def _md(text: str) -> str:
    return MARKDOWN.sub(r"\\\1", text)


def _xml(text: str) -> str:
    """XML has no control characters but tab and line ends, and no surrogates or non-characters."""
    return re.sub(r"[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)


def _rounded(value: float) -> float | None:
    return round(value, 10) if math.isfinite(value) else None


COLOUR = {"pass": "green", "fail": "bold red", "inconclusive": "yellow"}
RIGHT = range(2, 7)  # the columns of numbers
FEWER = (0, 1, 4, 5, 7)  # what a narrow terminal has room for


def show(gate: Gate, console: Console) -> None:
    """Print every decision, what stands open, what weakens it, and the outcome of all."""
    from rich.markup import escape

    for decision in gate.decisions:
        told = f"{title(decision, gate.scale)}, against {reference(gate)}"
        if console.is_terminal:
            console.print(f"[bold]{escape(told)}[/bold]: {_coloured(decision.outcome)}")
            console.print(_table(decision, console.width))
        else:
            _print(console, f"{told}: {decision.outcome}", *_lines(decision))
        _print(console, *(why(f) for f in decision.findings if f.outcome != "pass"), indent=2)
        _print(console, *(f"note: {w}" for w in decision.warnings), indent=2)
        console.print()
    _print(console, *(f"note: {w}" for w in gate.warnings))
    console.print(f"gate: {_coloured(gate.outcome)}" if console.is_terminal else f"gate: {gate.outcome}")


def _coloured(outcome: str) -> str:
    return f"[{COLOUR[outcome]}]{outcome}[/]"


def _print(console: Console, *lines: str, indent: int = 0) -> None:
    """Text as it stands: names and notes are no markup, and a file of them is not wrapped."""
    from rich.padding import Padding
    from rich.text import Text

    for line in lines:
        if console.is_terminal:
            console.print(Padding(Text(line), (0, 0, 0, indent)))
        else:
            console.print(" " * indent + line, markup=False, highlight=False, soft_wrap=True)


def _table(decision: Decision, width: int) -> object:
    from rich.table import Table
    from rich.text import Text

    columns = range(len(HEADS)) if width >= sum(w + 2 for w in _widths(decision)) else FEWER
    table = Table(box=None, padding=(0, 1), pad_edge=True)
    for n in columns:
        table.add_column(HEADS[n], justify="right" if n in RIGHT else "left", no_wrap=n != 0, overflow="fold")
    for finding in decision.findings:
        row = [Text(cell) for cell in cells(finding)]
        row[-1].stylize(COLOUR[finding.outcome])
        table.add_row(*(row[n] for n in columns))
    return table


def _widths(decision: Decision) -> list[int]:
    rows = [HEADS, *(cells(f) for f in decision.findings)]
    return [max(len(row[n]) for row in rows) for n in range(len(HEADS))]


def _lines(decision: Decision) -> list[str]:
    rows = [HEADS, *(cells(f) for f in decision.findings)]
    width = _widths(decision)
    aligned = (
        [c.rjust(w) if n in RIGHT else c.ljust(w) for n, (c, w) in enumerate(zip(row, width, strict=True))]
        for row in rows
    )
    return ["  " + "  ".join(row).rstrip() for row in aligned]
