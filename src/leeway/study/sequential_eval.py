"""A checkpoint asked in looks of growing size, until every declared contrast with the base is decided.

All evals of an axis are asked together, since a measure is taken over all of them: their prompts in one order. What was
asked depends on the base's rows and on the checkpoint's own alone, so that workers need not talk to each other.
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
    """The evals of every axis that is asked until decided: none without `stop: decided`.

    An axis with an eval that cannot be asked in parts, or with no more prompts than the first look, is asked whole.
    """
    if spec.evals.stop != "decided":
        return {}
    found: dict[str, list[Eval]] = {}
    for e in evals:
        found.setdefault(e.name, []).append(e)
    return {axis: own for axis, own in found.items() if _prompts(own) > sequential.FIRST}


def _prompts(evals: Seq[Eval]) -> int:
    clusters = [e.clusters() for e in evals]
    return len({c for own in clusters for c in own}) if all(clusters) else 0


def facts(spec: Spec, evals: Iterable[Eval]) -> dict[str, Any]:
    """The design as the manifest names it; nothing for a fixed one."""
    axes = sequential_axes(spec, evals)
    if spec.evals.stop != "decided":
        return {}
    rule = rule_of(spec)
    told = {"stop": "decided", "margin": rule.margin, "level": rule.level, "axes": sorted(axes)}
    return {"sequential": {**told, "first_look": sequential.FIRST, "growth": sequential.GROWTH}}


def rule_of(spec: Spec) -> sequential.StoppingRule:
    return sequential.StoppingRule(len(spec.objectives), spec.evals.margin)


@dataclass(frozen=True)
class SequentialEvaluator:
    """One axis: its evals, and the base's rows on it under the checkpoint's test-time prompt."""

    rule: sequential.StoppingRule
    axis: str
    evals: Seq[Eval]
    base: pd.DataFrame

    @classmethod
    def of(cls, spec: Spec, axis: str, evals: Seq[Eval], store: RunDir, parts: Seq[Path]) -> SequentialEvaluator:
        """With the base's rows from its finished `parts`."""
        base = pd.concat([store.read_part(p).to_pandas() for p in parts], ignore_index=True)
        return cls(rule_of(spec), axis, evals, base)

    def ask(self, backend: Backend, tick: Callable[[Eval], Tick]) -> dict[str, list[Row]]:
        """The rows of every eval, by its key."""
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
        own = pd.DataFrame([{**asdict(r), "objective": "asked", "seed": 0, "budget": 1} for r in rows])
        return self.rule.undecided(self._of_first_judge(self.base), self._of_first_judge(own), self.axis)

    def _of_first_judge(self, rows: pd.DataFrame) -> pd.DataFrame:
        """The axis's rows, once an answer: what the study's rates are made of."""
        of_axis = rows[rows["eval"] == self.axis]
        if not multi_judge_evals(of_axis):
            return of_axis
        first = {e.name: judges[0].name for e in self.evals if (judges := e.judged_by())}
        told = split_judges(of_axis, first)
        return told[told["eval"] == self.axis]


def summary(rows: pd.DataFrame, conditions: Mapping[str, str], known: dict[str, Any]) -> dict[str, Any]:
    """The design with what came of it: answers asked of how many, and the tokens saved, by axis."""
    if not known:
        return {}
    table = sequential.sample_sizes(sequential.with_design(rows, known["sequential"]["axes"]), conditions)
    totals = table.groupby("eval")[sequential.COUNTS].sum()
    asked = {str(axis): {str(k): int(v) for k, v in line.items()} for axis, line in totals.iterrows()}
    return {"sequential": {**known["sequential"], "asked": asked}}
