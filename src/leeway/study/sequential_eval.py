"""Sequential stopping: run a checkpoint's evals in growing looks until every contrast with the base is decided.

The evals of an axis share one order of prompts, since a measure covers all of them. What is run depends only on the
base's rows and the checkpoint's own, so workers need not communicate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd

from leeway.evals.eval import Eval, Row
from leeway.generation.backend import Backend, Tick
from leeway.stats import sequential, split_judges
from leeway.stats.anytime import cluster_order
from leeway.stats.metrics import multi_judge_evals
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


def _prompts(evals: Sequence[Eval]) -> int:
    clusters = [e.clusters() for e in evals]
    return len({c for own in clusters for c in own}) if all(clusters) else 0


def _rule(spec: Spec) -> sequential.StoppingRule:
    return sequential.StoppingRule(len(spec.objectives), spec.evals.margin)


def run_in_looks(
    spec: Spec, evals: Sequence[Eval], base: pd.DataFrame, backend: Backend, tick: Callable[[Eval], Tick]
) -> dict[str, list[Row]]:
    """Return the rows of every eval of one axis by its key; `base`: the base's rows on it under the same condition."""
    order = cluster_order(c for e in evals for c in e.clusters())
    rows: dict[str, list[Row]] = {e.key: [] for e in evals}
    ticks = {e.key: tick(e) for e in evals}
    base, seen = _of_first_judge(base, evals), 0
    for size in sequential.looks(len(order)):
        chosen, seen = set(order[seen:size]), size
        for e in evals:
            if chosen.intersection(e.clusters()):
                rows[e.key] += e.part(chosen).run(backend, ticks[e.key])
        if size < len(order):
            own = [{**asdict(r), "objective": "checkpoint", "seed": 0, "budget": 1} for e in evals for r in rows[e.key]]
            if not _rule(spec).undecided(base, _of_first_judge(pd.DataFrame(own), evals), evals[0].name):
                break
    return rows


def _of_first_judge(rows: pd.DataFrame, evals: Sequence[Eval]) -> pd.DataFrame:
    """Return one row per response on the axis, the first judge's, as the study's rates use."""
    axis = evals[0].name
    of_axis = rows[rows["eval"] == axis]
    if not multi_judge_evals(of_axis):
        return of_axis
    first = {e.name: judges[0].name for e in evals if (judges := e.judged_by())}
    by_first = split_judges(of_axis, first)
    return by_first[by_first["eval"] == axis]


def summary(spec: Spec, evals: Iterable[Eval], rows: pd.DataFrame, conditions: Mapping[str, str]) -> dict[str, Any]:
    """Return the manifest's section: the design and, by axis, responses generated and planned, and tokens saved."""
    rule, axes = _rule(spec), sorted(sequential_axes(spec, evals))
    table = sequential.sample_sizes(sequential.with_design(rows, axes), conditions)
    totals = table.groupby("eval")[sequential.COUNTS].sum()
    sample_sizes = {str(axis): {str(k): int(v) for k, v in line.items()} for axis, line in totals.iterrows()}
    design = {"stop": "decided", "margin": rule.margin, "level": rule.level, "axes": axes}
    looks = {"first_look": sequential.FIRST, "growth": sequential.GROWTH}
    return {"sequential": {**design, **looks, "sample_sizes": sample_sizes}}
