"""From a run directory and a rule file to a decision."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from leeway.gate import files
from leeway.gate.caveats import Coherence, notes
from leeway.gate.decide import Decision, decide, undermine
from leeway.gate.evidence import Collected
from leeway.gate.resolve import Place, Task, resolve
from leeway.gate.rules import Rules, load
from leeway.gate.words import Gate, unscored
from leeway.hashing import digest
from leeway.report.results import Results
from leeway.report.scale import Scale

ORGANISM = "the model is the organism: this tries the gate out, and says nothing about real models"


def gate(folder: str | Path, rule: str | Path, out: str | Path | None = None) -> Gate:
    """Decide the rules of `rule` on the run in `folder`; writes gate.json, gate.xml, gate.md into `out`.

    `out` is `folder`/gate where none is given. Raises LeewayError where the rules and the run do not fit.
    """
    into = Path(out) if out else Path(folder) / "gate"
    files.clear(into)
    rules = load(Path(rule))
    results = Results.load(folder)
    task = resolve(rules, results.pooled_rates(), str(rule))
    decisions, shared = _shared(_decisions(results, task))
    found = Gate(
        name=str(results.study.get("name") or ""),
        decisions=decisions,
        against=task.against,
        level=task.level,
        scale=Scale.of(results.manifest),
        warnings=shared + ((ORGANISM,) if results.manifest.get("organism") else ()),
    )
    files.write(found, into, _told(results, rules))
    return found


def _decisions(results: Results, task: Task) -> tuple[Decision, ...]:
    collected, coherence = Collected(results, task), Coherence(results)
    found = []
    for place in task.places:
        decided = decide([collected.of(rule, worse, place) for rule, worse in task.rules], task.level)
        checked = [undermine(f, coherence.undermines(f.evidence.rule.measure, place)) for f in decided]
        findings = tuple(replace(f, needed=collected.needed(f, task.level)) for f in checked)
        seeds = _seeds(results, place)
        warnings = [*notes(task, place, seeds, coherence), *filter(None, map(unscored, findings))]
        warnings += dict.fromkeys(note for f in findings for note in f.evidence.notes)
        found.append(Decision(place, seeds, findings, tuple(warnings)))
    return tuple(found)


def _shared(decisions: tuple[Decision, ...]) -> tuple[tuple[Decision, ...], tuple[str, ...]]:
    """What is to be said of every one of several checkpoints is said once."""
    common = [w for w in decisions[0].warnings if all(w in d.warnings for d in decisions)] if len(decisions) > 1 else []
    kept = (replace(d, warnings=tuple(w for w in d.warnings if w not in common)) for d in decisions)
    return tuple(kept), tuple(common)


def _seeds(results: Results, place: Place) -> tuple[int, ...]:
    rows = results.rows
    at = (rows["objective"] == place.objective) & (rows["budget"] == place.budget)
    return tuple(sorted(int(s) for s in rows.loc[at, "seed"].unique()))


def _told(results: Results, rules: Rules) -> dict[str, object]:
    """What the run and the rule file say of themselves, without a time or a path."""
    manifest = results.manifest
    written = manifest.get("written")
    rows = written.get("rows.parquet") if isinstance(written, dict) else None
    return {
        "leeway": manifest.get("leeway"),
        "study_hash": manifest.get("study_hash"),
        "rows_hash": rows,
        "rules_hash": digest("rules", rules.model_dump(mode="json")),
    }
