"""The gate's outputs: gate.json for programs, gate.xml (JUnit) for CI, gate.md for people, and the terminal.

The files contain no times: equal rows give equal bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from leeway.errors import LeewayError, first_line
from leeway.gate.rules import EXIT, MIN_PROMPTS, Decision, Evidence, Outcome, RuleResult, worst
from leeway.io import write_file
from leeway.report import formatting
from leeway.report.formatting import BudgetUnit, change, level, percent, to_json
from leeway.stats import ContrastReference
from leeway.stats.metrics import BASE

if TYPE_CHECKING:
    from rich.console import Console

FORMAT = 1  # of gate.json
FILES = ("gate.json", "gate.xml", "gate.md")
HEADS = ("measure", "rule", "reference", "checkpoint", "estimate", "limit", "p", "outcome")
NUMERIC = range(2, 7)  # columns of HEADS
NARROW = (0, 1, 4, 5, 7)  # columns of HEADS that fit a narrow terminal
NUMBERS = ("reference", "rate", "estimate", "limit", "if_worst", "se", "p", "p_exceeded")
MARK = {"pass": "✅ pass", "fail": "❌ fail", "inconclusive": "❔ inconclusive"}
COLOUR = {"pass": "green", "fail": "bold red", "inconclusive": "yellow"}
MARKDOWN = re.compile(r"([\\`*_{}\[\]<>()#|~!$&])")
MAX_NAME = 2_000  # characters


@dataclass(frozen=True)
class Gate:
    """The result of a gate."""

    name: str  # of the study
    decisions: tuple[Decision, ...]
    against: ContrastReference | None
    level: float
    scale: BudgetUnit
    warnings: tuple[str, ...] = ()

    @property
    def outcome(self) -> Outcome:
        """Pass only if every checkpoint does."""
        return worst([d.outcome for d in self.decisions])


def clear(folder: Path) -> None:
    """Remove the files of an earlier decision, so that they do not outlive a failing call."""
    for name in FILES:
        (folder / name).unlink(missing_ok=True)


def write(gate: Gate, folder: Path, provenance: dict[str, Any]) -> None:
    """Write the three files; `provenance` is added to gate.json."""
    for name, text in zip(FILES, (to_json(gate_values(gate, provenance)), junit(gate), markdown(gate)), strict=True):
        try:
            write_file(folder / name, text)
        except OSError as error:
            what = f"{folder / name} cannot be written ({first_line(error)})"
            raise LeewayError(what, fix="free the disk, or give another --out") from error


def gate_values(gate: Gate, provenance: dict[str, Any]) -> dict[str, Any]:
    """Return gate.json as Python values; missing numbers are null."""
    found: dict[str, Any] = {"format": FORMAT, **provenance, "study": gate.name, "level": gate.level}
    found |= {"against": reference_name(gate), "outcome": gate.outcome, "exit": EXIT[gate.outcome]}
    checkpoints = []
    for d in gate.decisions:
        line = vars(d.checkpoint) | {"seeds": [*d.seeds], "outcome": d.outcome, "warnings": [*d.warnings]}
        line["replication"] = _replication_json(d)
        checkpoints.append(line | {"rules": [_rule_json(r) for r in d.results]})
    return found | {"warnings": [*gate.warnings], "checkpoints": checkpoints}


def _replication_json(decision: Decision) -> dict[str, Any] | None:
    if decision.replication is None:
        return None
    own = decision.replication
    found = {"sets": own.sets, "flip_rate": _rounded(decision.flip_rate), "outcomes": own.again}
    return found | {"no_drift": own.no_drift or None, "no_drift_of": "all rules" if own.all_margins else "margins"}


def _rule_json(result: RuleResult) -> dict[str, Any]:
    e = result.evidence
    found: dict[str, Any] = {"measure": e.rule.measure, "kind": e.rule.kind, e.rule.kind: e.rule.bound}
    found |= {"worse": e.worse, "bound": e.bound, "outcome": result.outcome, "why": explain(result)}
    found |= {name: _rounded(getattr(e, name)) for name in NUMBERS}
    found |= {"p_exceeded_holm": _rounded(result.p_holm), "n": e.n, "n_clusters": e.n_clusters}
    return found | {"n_unscored": e.n_unscored, "more_prompts": result.prompts_needed, "notes": [*e.notes]}


def _rounded(value: float) -> float | None:
    return round(value, 10) if math.isfinite(value) else None


def junit(gate: Gate) -> str:
    """Return JUnit XML with a suite per checkpoint and a case per rule.

    Inconclusive is an `error`, which viewers show as neither passed nor failed; most show `skipped` in green.
    """
    outcomes = [r.outcome for d in gate.decisions for r in d.results]
    root = ElementTree.Element("testsuites", {"name": "leeway gate", **_counts(outcomes)})
    for decision in gate.decisions:
        name = title(decision, gate.scale)
        counts = _counts([r.outcome for r in decision.results])
        suite = ElementTree.SubElement(root, "testsuite", {"name": _xml(name), **counts, "skipped": "0"})
        for result in decision.results:
            _add_case(suite, name, result)
        if notes := [*replication_lines(decision), *decision.warnings]:
            ElementTree.SubElement(suite, "system-out").text = _xml("\n".join(notes))
    ElementTree.indent(root, " ")
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _counts(outcomes: Sequence[str]) -> dict[str, str]:
    failures, errors = outcomes.count("fail"), outcomes.count("inconclusive")
    # viewers require a time; a gate has none
    return {"tests": str(len(outcomes)), "failures": str(failures), "errors": str(errors), "time": "0"}


def _add_case(suite: ElementTree.Element, name: str, result: RuleResult) -> None:
    e = result.evidence
    case_name, text = _xml(f"{e.rule.measure} {rule_text(e)}"), _xml("\n".join([explain(result), *e.notes]))
    attributes = {"name": case_name, "classname": _xml(f"leeway.{name}"), "time": "0"}
    case = ElementTree.SubElement(suite, "testcase", attributes)
    if result.outcome == "pass":
        ElementTree.SubElement(case, "system-out").text = text
    else:
        kind = "failure" if result.outcome == "fail" else "error"
        message = {"type": result.outcome, "message": _xml(explain(result))}
        ElementTree.SubElement(case, kind, message).text = text


def _xml(text: str) -> str:
    """Replace what XML does not allow: control characters other than tab and line ends, surrogates, non-characters."""
    return re.sub(r"[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)


def markdown(gate: Gate) -> str:
    """Return a summary for $GITHUB_STEP_SUMMARY or a pull request."""
    parts = [f"## Leeway gate: {MARK[gate.outcome]}\n"]
    for decision in gate.decisions:
        head = f"{_md(title(decision, gate.scale))}, against {_md(reference_name(gate))}: {MARK[decision.outcome]}"
        rows = [HEADS, ("---", "---", "--:", "--:", "--:", "--:", "--:", "---")]
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        for result in decision.results:
            *found, outcome = table_row(result)
            lines.append("| " + " | ".join([*map(_md, found), MARK[outcome]]) + " |")
        reasons = [f"- {_md(explain(r))}" for r in decision.results if r.outcome != "pass"]
        notes = [f"- {_md(line)}" for line in replication_lines(decision)]
        notes += [f"- Note: {_md(w)}" for w in decision.warnings]
        parts.append("\n".join([f"### {head}\n", *lines, "", *reasons, *notes]).rstrip() + "\n")
    parts += [f"Note: {_md(w)}\n" for w in gate.warnings]
    text = "Differences are checkpoint − reference, in points (trait and acquiescence: in log-odds). Limits and "
    text += f"p-values are one-sided at {100 * gate.level:g}%;"
    text += " the p of a fail is corrected over its checkpoint's rules. *Inconclusive* means that neither a pass nor a"
    text += " fail was shown."
    return "\n".join([*parts, text]) + "\n"


def _md(text: str) -> str:
    return MARKDOWN.sub(r"\\\1", text)


def print_gate(gate: Gate, console: Console) -> None:
    """Print every decision, the reasons and warnings, and the overall outcome."""
    from rich.markup import escape

    for decision in gate.decisions:
        head = f"{title(decision, gate.scale)}, against {reference_name(gate)}"
        if console.is_terminal:
            console.print(f"[bold]{escape(head)}[/bold]: {_coloured(decision.outcome)}")
            console.print(_rich_table(decision, console.width))
        else:
            align = [f"{'>' if n in NUMERIC else '<'}{width}" for n, width in enumerate(_widths(decision))]
            rows = [HEADS, *(table_row(r) for r in decision.results)]
            table = ("  " + "  ".join(map(format, row, align)).rstrip() for row in rows)
            _print_literal(console, f"{head}: {decision.outcome}", *table)
        _print_literal(console, *(explain(r) for r in decision.results if r.outcome != "pass"), indent=2)
        _print_literal(console, *replication_lines(decision), indent=2)
        _print_literal(console, *(f"note: {w}" for w in decision.warnings), indent=2)
        console.print()
    _print_literal(console, *(f"note: {w}" for w in gate.warnings))
    console.print(f"gate: {_coloured(gate.outcome)}" if console.is_terminal else f"gate: {gate.outcome}")


def _coloured(outcome: str) -> str:
    return f"[{COLOUR[outcome]}]{outcome}[/]"


def _print_literal(console: Console, *lines: str, indent: int = 0) -> None:
    """Print text without markup; unwrapped unless in a terminal."""
    from rich.padding import Padding
    from rich.text import Text

    for line in lines:
        if console.is_terminal:
            console.print(Padding(Text(line), (0, 0, 0, indent)))
        else:
            console.print(" " * indent + line, markup=False, highlight=False, soft_wrap=True)


def _rich_table(decision: Decision, width: int) -> object:
    from rich.table import Table
    from rich.text import Text

    columns = range(len(HEADS)) if width >= sum(w + 2 for w in _widths(decision)) else NARROW
    table = Table(box=None, padding=(0, 1), pad_edge=True)
    for n in columns:
        table.add_column(HEADS[n], justify="right" if n in NUMERIC else "left", no_wrap=n != 0, overflow="fold")
    for result in decision.results:
        row = [Text(cell) for cell in table_row(result)]
        row[-1].stylize(COLOUR[result.outcome])
        table.add_row(*(row[n] for n in columns))
    return table


def _widths(decision: Decision) -> list[int]:
    rows = [HEADS, *(table_row(r) for r in decision.results)]
    return [max(len(row[n]) for row in rows) for n in range(len(HEADS))]


def title(decision: Decision, scale: BudgetUnit) -> str:
    """Return the checkpoint's name: "SFT at 400k tokens", "CFT <SAFE> at 400k tokens"."""
    own = decision.checkpoint
    return safe(f"{formatting.objective_name(own.objective, own.condition)} {scale.at(own.budget)}".rstrip())


def reference_name(gate: Gate) -> str:
    if gate.against is None:
        return BASE
    objective, budget = gate.against
    at = "at the same budget" if budget is None else gate.scale.at(budget)
    return safe(f"{formatting.objective_name(objective)} {at}".rstrip())


def table_row(result: RuleResult) -> tuple[str, ...]:
    """Return one line of the table, with the columns of HEADS."""
    e = result.evidence
    p = result.p_holm if result.outcome == "fail" else e.p
    tested = formatting.p_value(p) + (" broken" if result.outcome == "fail" else " holds")  # which of the two tests
    own = (level(e.reference, e.rule.measure), level(e.rate, e.rule.measure))
    values = (*own, _value_text(e, e.estimate), _value_text(e, e.limit), tested)
    return (safe(e.rule.measure), rule_text(e), *values, result.outcome)


def rule_text(evidence: Evidence) -> str:
    """Return "≤ +2.0" for a difference in points, "≥ 60.0%" for a rate, with as many decimals as the bound."""
    sign = "≤" if evidence.worse == "higher" else "≥"
    decimals = len(f"{100 * evidence.bound:.6f}".rstrip("0").partition(".")[2])
    return f"{sign} {_formatted(evidence, evidence.bound, max(1, min(4, decimals)))}"


def _value_text(evidence: Evidence, value: float) -> str:
    """Return a difference in points, or a rate, with enough decimals to differ from the bound."""
    distinct = (d for d in (1, 2, 3) if _formatted(evidence, value, d) != _formatted(evidence, evidence.bound, d))
    return _formatted(evidence, value, next(distinct, 3) if value != evidence.bound else 1)


def _formatted(evidence: Evidence, value: float, digits: int) -> str:
    return change(value, evidence.rule.measure, digits) if evidence.rule.kind == "margin" else percent(value, digits)


def explain(result: RuleResult) -> str:
    e = result.evidence
    rule = safe(f"{e.rule.measure} {rule_text(e)}")
    if e.withheld:
        return f"{rule}: withheld ({safe(e.withheld)})"
    estimate = _value_text(e, e.estimate)
    seen = f"{estimate}, limit {_value_text(e, e.limit)}"
    if result.downgrade_reason:
        return f"{rule}: {seen} would pass, but {result.downgrade_reason}"
    if result.outcome == "pass":
        return f"{rule}: shown ({seen})"
    if result.outcome == "fail":
        p = formatting.p_value(result.p_holm)
        equals = p if p.startswith("<") else f"= {p}"
        return f"{rule}: shown to be broken ({estimate}, p {equals} over the checkpoint's rules)"
    return f"{rule}: not shown either way ({seen}); {_prompts_needed_text(result)}"


def _prompts_needed_text(result: RuleResult) -> str:
    e = result.evidence
    if e.n_clusters < MIN_PROMPTS:
        return f"{e.n_clusters} prompts are too few to estimate how many more would decide it"
    if result.prompts_needed is None:
        return "no number of prompts would decide it: the estimate is on the bound"
    if result.prompts_needed == 0:
        return "the formula requires no more prompts, but the exact test does"
    outcome = "to hold" if e.satisfies(e.estimate) else "to be broken"
    return f"if the estimate is true, about {result.prompts_needed:,} more prompts would show it {outcome} (80% power)"


def replication_lines(decision: Decision) -> list[str]:
    """Return how often other prompts would decide otherwise, and what is decided where there is no drift."""
    own = decision.replication
    if own is None:
        return []
    lines = [f"flip rate {percent(decision.flip_rate, 0)}: {own.sets} re-drawn sets of prompts {_outcomes(own.again)}"]
    if own.no_drift:
        rules = "" if own.all_margins else " (rules with a margin alone)"
        changed = "as many answers changed as observed, in random directions"
        lines.append(f"without drift{rules}: {_outcomes(own.no_drift)} if {changed}")
    return lines


def _outcomes(shares: Mapping[Outcome, float]) -> str:
    """Return "pass 81%, are inconclusive 19%"…, without outcomes that did not occur."""
    words = {"pass": "pass in", "inconclusive": "are inconclusive in", "fail": "fail in"}
    return ", ".join(f"{words[o]} {percent(share, 0)}" for o, share in shares.items() if share)


def unscored_warning(result: RuleResult) -> str:
    """Return a warning for a pass that the unscored responses could have changed; else empty."""
    e = result.evidence
    if result.outcome != "pass" or not e.n_unscored or math.isnan(e.if_worst) or e.satisfies(e.if_worst):
        return ""
    extreme = f"with the worst score for all {e.n_unscored} unscored answers it would be {_value_text(e, e.if_worst)}"
    return f"{safe(e.rule.measure)} {rule_text(e)}: {extreme}"


def safe(text: str) -> str:
    """Return a name from rows or rule files on one line, without characters that hide or reorder text."""
    return formatting.escape_invisible(text.replace("\n", " ").replace("\t", " "), MAX_NAME)[0]
