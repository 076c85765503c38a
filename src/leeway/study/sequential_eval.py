"""Sequential stopping: run a checkpoint's evals in growing looks until every contrast with the base is decided.

The evals of an axis share one order of prompts, since a measure covers all of them. What is run depends only on the
base's rows and the checkpoint's own, so workers need not communicate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from leeway.evals.eval import Eval, Row, Tick
from leeway.generation.backend import Backend
from leeway.stats import sequential, split_judges
from leeway.stats.anytime import cluster_order
from leeway.stats.metrics import multi_judge_evals
from leeway.study.run_dir import RunDir
from leeway.study.spec import Spec


def sequential_axes(spec: Spec, evals: Iterable[Eval]) -> dict[str, list[Eval]]:
    """Return the evals of every axis that stops early; none without `stop: decided`.

    An axis runs as a whole if one of its evals has no parts or the first look would cover all of its prompts.
    """
    if spec.evals.stop != "decided":
        return {}
    axes: dict[str, list[Eval]] = {}
    for e in evals:
        axes.setdefault(e.name, []).append(e)
    return {axis: own for axis, own in axes.items() if _prompts(own) > sequential.FIRST}


def _prompts(evals: Seq[Eval]) -> int:
    clusters = [e.clusters() for e in evals]
    return len({c for own in clusters for c in own}) if all(clusters) else 0


def facts(spec: Spec, evals: Iterable[Eval]) -> dict[str, Any]:
    """Return the design for the manifest; empty for a fixed one."""
    axes = sequential_axes(spec, evals)
    if spec.evals.stop != "decided":
        return {}
    rule = rule_of(spec)
    design = {"stop": "decided", "margin": rule.margin, "level": rule.level, "axes": sorted(axes)}
    return {"sequential": {**design, "first_look": sequential.FIRST, "growth": sequential.GROWTH}}


def rule_of(spec: Spec) -> sequential.StoppingRule:
    return sequential.StoppingRule(len(spec.objectives), spec.evals.margin)


@dataclass(frozen=True)
class SequentialEvaluator:
    """The evals of one axis, and the base's rows on it under the same condition."""

    rule: sequential.StoppingRule
    axis: str
    evals: Seq[Eval]
    base: pd.DataFrame

    @classmethod
    def of(cls, spec: Spec, axis: str, evals: Seq[Eval], store: RunDir, parts: Seq[Path]) -> SequentialEvaluator:
        """Read the base's rows from its finished `parts`."""
        base = pd.concat([store.read_part(p).to_pandas() for p in parts], ignore_index=True)
        return cls(rule_of(spec), axis, evals, base)

    def run(self, backend: Backend, tick: Callable[[Eval], Tick]) -> dict[str, list[Row]]:
        """Return the rows of every eval by its key."""
        order = cluster_order(c for e in self.evals for c in e.clusters())
        rows: dict[str, list[Row]] = {e.key: [] for e in self.evals}
        ticks = {e.key: tick(e) for e in self.evals}
        seen = 0
        for size in sequential.looks(len(order)):
            chosen, seen = set(order[seen:size]), size
            for e in self.evals:
                if chosen.intersection(e.clusters()):
                    rows[e.key] += e.part(chosen).run(backend, ticks[e.key])
            if size < len(order) and not self._undecided([r for own in rows.values() for r in own]):
                break
        return rows

    def _undecided(self, rows: Seq[Row]) -> list[str]:
        own = pd.DataFrame([{**asdict(r), "objective": "checkpoint", "seed": 0, "budget": 1} for r in rows])
        return self.rule.undecided(self._of_first_judge(self.base), self._of_first_judge(own), self.axis)

    def _of_first_judge(self, rows: pd.DataFrame) -> pd.DataFrame:
        """Return one row per response, the first judge's, as the study's rates use."""
        of_axis = rows[rows["eval"] == self.axis]
        if not multi_judge_evals(of_axis):
            return of_axis
        first = {e.name: judges[0].name for e in self.evals if (judges := e.judged_by())}
        by_first = split_judges(of_axis, first)
        return by_first[by_first["eval"] == self.axis]


def summary(rows: pd.DataFrame, conditions: Mapping[str, str], known: dict[str, Any]) -> dict[str, Any]:
    """Return the design with, by axis, the responses generated, the responses planned and the tokens saved."""
    if not known:
        return {}
    table = sequential.sample_sizes(sequential.with_design(rows, known["sequential"]["axes"]), conditions)
    totals = table.groupby("eval")[sequential.COUNTS].sum()
    sample_sizes = {str(axis): {str(k): int(v) for k, v in line.items()} for axis, line in totals.iterrows()}
    return {"sequential": {**known["sequential"], "sample_sizes": sample_sizes}}
