"""From a run directory and a rule file to a decision.

What the rows say about each rule at each checkpoint: asked of `leeway.stats` once for all of them.

What weakens a decision: answers without meaning, unscored answers, one training run, a rule that is not there.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from leeway import stats
from leeway.errors import LeewayError
from leeway.gate import output
from leeway.gate.decide import FEW, Decision, Evidence, Finding, decide, downgrade_if_incoherent
from leeway.gate.output import Gate, unscored
from leeway.gate.rules import BASE, KEY, Kind, Place, Rule, Rules, Task, Worse, load, resolve
from leeway.hashing import digest
from leeway.report import formatting
from leeway.report.formatting import BudgetUnit
from leeway.report.results import Results
from leeway.report.verdict import COHERENT
from leeway.stats.metrics import AT
from leeway.stats.pairing import OWN
from leeway.stats.rates import ATTACKED

NOT_ASKED = "it was not measured at this checkpoint"


class Collected:
    """The evidence on every rule of a task."""

    def __init__(self, results: Results, task: Task) -> None:
        self._results, self._task = results, task
        self._rows = rows = _needed_rows(results.judged, task)
        conditions = results.conditions
        margins = {r.measure: (r.margin, w) for r, w in task.rules if r.margin is not None}
        self._tables: dict[Kind, pd.DataFrame] = {}
        try:
            if margins:
                bounds = {m: (margin if w == "higher" else -margin, w) for m, (margin, w) in margins.items()}
                self._tables["margin"] = stats.one_sided(
                    rows, conditions, bounds, task.against, first=results.first_conditions, level=task.level
                )
            for kind in ("at_least", "at_most"):
                own = {r.measure: r.bound for r, _ in task.rules if r.kind == kind}
                worse: Worse = "lower" if kind == "at_least" else "higher"
                if own:
                    self._tables[kind] = stats.bounded(rows, conditions, own, worse, level=task.level)
        except stats.StatsError as error:
            where = results.folder / "rows.parquet"
            raise LeewayError(f"{where}: {error}", fix="decide on the rows of one run") from error

    def _if_worst(self, rule: Rule, worse: Worse, place: Place) -> float:
        """The estimate, had all unscored answers of the checkpoint gone the worst way, and its reference's the best."""
        if rule.kind == "margin":
            found, ends = _at(self._extremes, place, rule.measure), ["if_best", "if_worst"]
        else:
            found, ends = _at(self._results.pooled_rates(), place, rule.measure), ["rate_if_0", "rate_if_1"]
        values = found[ends].to_numpy(float)
        return float(values.max() if worse == "higher" else values.min()) if len(found) else float("nan")

    @cached_property
    def _extremes(self) -> pd.DataFrame:
        # nothing of its tests is read: a few flips do
        results, against = self._results, self._task.against
        return stats.contrasts(self._rows, results.conditions, against, first=results.first_conditions, resamples=200)

    def of(self, rule: Rule, worse: Worse, place: Place) -> Evidence:
        """One rule at one checkpoint."""
        found = _at(self._tables[rule.kind], place, rule.measure)
        if found.empty:
            return Evidence(rule, worse, withheld=NOT_ASKED)
        line: dict[str, Any] = {str(k): v for k, v in found.iloc[0].items()}
        blank = Evidence(rule, worse, n=int(line["n"]), n_clusters=int(line["n_clusters"]))
        blank = replace(blank, n_unscored=int(line["n_unscored"]), notes=_notes(line))
        if math.isnan(line["p"]):
            return replace(blank, withheld=str(line["note"]) or "no test is possible")
        margin = rule.kind == "margin"
        worst = self._if_worst(rule, worse, place) if blank.n_unscored else float("nan")
        return replace(
            blank,
            reference=float(line["base"]) if margin else float("nan"),
            rate=float(line["rate"]),
            estimate=float(line["difference" if margin else "rate"]),
            limit=float(line["limit"]),
            se=float(line["se"]) or float("nan"),  # 0 of n: nothing varied
            p=float(line["p"]),
            p_exceeded=float(line["p_worse"]),
            if_worst=worst,
        )

    def needed(self, finding: Finding, level: float) -> int | None:
        """How many more prompts would decide an open rule; None where it is decided, or nobody can say."""
        e = finding.evidence
        if self._results.sequential:
            return None  # a design that stops when it may has no fixed number of prompts
        if finding.outcome != "inconclusive" or e.withheld or finding.downgraded or e.n_clusters < FEW:
            return None
        alpha = level if e.kept else level / len(self._task.rules)  # a fail is corrected over the rules
        found = stats.items_needed(e.estimate, e.se, e.n_clusters, e.bound, alpha=alpha)
        return int(found) if math.isfinite(found) else None


def _at(table: pd.DataFrame, place: Place, measure: str) -> pd.DataFrame:
    """One checkpoint's line on a measure, or none."""
    wanted = [place.objective, place.budget, place.condition, measure]
    return table[table[[*KEY, "measure"]].eq(wanted).all(axis=1)]


def _notes(line: dict[str, Any]) -> tuple[str, ...]:
    """What weakens a comparison: prompts that differ, and answers without a partner."""
    found = [part for part in str(line["note"]).split("; ") if OWN in part]
    if lost := int(line.get("n_unpaired") or 0):
        found.append(f"{lost} answers have no partner and are not compared")
    return tuple(f"{line['measure']}: {note}" for note in found)


def _needed_rows(rows: pd.DataFrame, task: Task) -> pd.DataFrame:
    """The rows of the checkpoints in question and of what they are compared with."""
    at = rows["objective"] == BASE
    for place in task.places:
        at |= (rows["objective"] == place.objective) & (rows["budget"] == place.budget)
    if task.against is not None:
        at |= rows["objective"] == task.against[0]
    return rows[at]


WATCHED = {"asr": ("jailbreak", "coherence"), "overrefusal": ("overrefusal", "coherence-benign")}
HARMLESS = {"asr": "harmless", "overrefusal": "no refusal"}  # as what an answer without meaning counts


class CoherenceCheck:
    """The share of coherent answers behind a measure that an answer without meaning makes look better."""

    def __init__(self, results: Results) -> None:
        self._results = results
        self._tables: dict[str, pd.DataFrame] = {}

    def of(self, measure: str, place: Place) -> float:
        """The share, mean over training seeds; NaN where the measure is another kind, or outcomes were not judged."""
        name, _, attack = measure.partition(":")
        kind, _, judge = name.partition(AT)
        if kind not in WATCHED:
            return float("nan")
        axis = WATCHED[kind][0] + (AT + judge if judge else "")
        if axis not in self._tables:
            self._tables[axis] = self._results.outcomes(axis)
        table = self._tables[axis]
        at = table[["objective", "budget", "condition"]].eq([place.objective, place.budget, place.condition])
        wanted = (attack or ATTACKED) if kind == "asr" else ""
        found = 1 - table.loc[at.all(axis=1) & (table["attack"] == wanted), "incoherent"]
        return float(found.mean()) if len(found) else float("nan")

    def undermines(self, measure: str, place: Place) -> str:
        """Why a pass on the measure is none; nothing where it is one."""
        share = self.of(measure, place)
        if not share < COHERENT:
            return ""
        kind = measure.partition(":")[0].partition(AT)[0]
        return (
            f"only {formatting.percent(share, 0)} of the answers are coherent, and one without meaning counts as "
            f"{HARMLESS[kind]} (below {formatting.percent(COHERENT, 0)} nothing passes)"
        )


def notes(task: Task, place: Place, seeds: tuple[int, ...], coherence: CoherenceCheck) -> tuple[str, ...]:
    """What a reader of one checkpoint's decision has to know."""
    found = [_runs(seeds)]
    named = {rule.measure for rule, _ in task.rules}
    for kind, (_, wanted) in WATCHED.items():
        ruled = sorted(m for m in named if m.partition(":")[0].partition(AT)[0] == kind)
        if ruled and wanted not in named:
            share = coherence.of(ruled[0], place)
            at_base = coherence.of(ruled[0], Place(BASE, 0, place.condition))
            of_base = "" if math.isnan(at_base) else f", of the base's {formatting.percent(at_base)}"
            seen = f" ({formatting.percent(share)} were coherent{of_base})"
            found.append(
                f"no rule on {wanted}: an answer without meaning counts as {HARMLESS[kind]} in {ruled[0]}"
                + (
                    seen
                    if not math.isnan(share)
                    else "; no outcomes were judged, so that nobody knows how many there are"
                )
            )
    return tuple(found)


def _runs(seeds: tuple[int, ...]) -> str:
    if len(seeds) == 1:
        return "one training run: a decision is about that checkpoint on other prompts, not about training it again"
    return f"{len(seeds)} training seeds are pooled: a decision is about their mean, not about any one checkpoint"


ORGANISM = "the model is the organism: this tries the gate out, and says nothing about real models"


def gate(folder: str | Path, rule: str | Path, out: str | Path | None = None) -> Gate:
    """Decide the rules of `rule` on the run in `folder`; writes gate.json, gate.xml, gate.md into `out`.

    `out` is `folder`/gate where none is given. Raises LeewayError where the rules and the run do not fit.
    """
    into = Path(out) if out else Path(folder) / "gate"
    output.clear(into)
    rules = load(Path(rule))
    results = Results.load(folder)
    task = resolve(rules, results.pooled_rates(), str(rule))
    decisions, shared = _shared(_decisions(results, task))
    found = Gate(
        name=str(results.study.get("name") or ""),
        decisions=decisions,
        against=task.against,
        level=task.level,
        scale=BudgetUnit.of(results.manifest),
        warnings=shared + ((ORGANISM,) if results.manifest.get("organism") else ()),
    )
    output.write(found, into, _told(results, rules))
    return found


def _decisions(results: Results, task: Task) -> tuple[Decision, ...]:
    collected, coherence = Collected(results, task), CoherenceCheck(results)
    found = []
    for place in task.places:
        decided = decide([collected.of(rule, worse, place) for rule, worse in task.rules], task.level)
        checked = [downgrade_if_incoherent(f, coherence.undermines(f.evidence.rule.measure, place)) for f in decided]
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
    hashes = manifest.get("file_hashes")
    rows = hashes.get("rows.parquet") if isinstance(hashes, dict) else None
    return {
        "leeway": manifest.get("leeway"),
        "study_hash": manifest.get("study_hash"),
        "rows_hash": rows,
        "rules_hash": digest("rules", rules.model_dump(mode="json")),
    }
