"""What a gate leaves behind: gate.json for programs, gate.xml (JUnit) for CI, gate.md for people.

None of them holds a time: the same rows give the same bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from leeway.errors import LeewayError, first_line
from leeway.gate.decide import EXIT, Decision, Finding
from leeway.gate.words import HEADS, Gate, cells, reference, rule, title, why
from leeway.report.tables import dump, write_atomically

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
    for name, text in zip(NAMES, (dump(machine(gate, told)), junit(gate), markdown(gate)), strict=True):
        try:
            write_atomically(folder / name, text)
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
    found |= {name: _number(getattr(e, name)) for name in NUMBERS}
    found |= {"p_exceeded_holm": _number(finding.p_holm), "n": e.n, "n_clusters": e.n_clusters}
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


def _number(value: float) -> float | None:
    return round(value, 10) if math.isfinite(value) else None
