"""What the rows say about each rule at each checkpoint: asked of `leeway.stats` once for all of them."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property
from typing import Any

import pandas as pd

from leeway import stats
from leeway.errors import LeewayError
from leeway.gate.decide import FEW, Evidence, Finding
from leeway.gate.resolve import KEY, Place, Task
from leeway.gate.rules import BASE, Kind, Rule, Worse
from leeway.report.results import Results
from leeway.stats.pairing import OWN

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
        if finding.outcome != "inconclusive" or e.withheld or finding.undermined or e.n_clusters < FEW:
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
