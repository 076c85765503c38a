"""Match the items of several checkpoints' logs: what differs is an error or listed, what does not pair is counted."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from statistics import fmean
from typing import Any, TypeVar

import pandas as pd

from leeway.errors import LeewayError
from leeway.report.compare.logs.samples import SUBTASKS, Checkpoint, ScoredAnswer, TaskLog, shorten
from leeway.report.results import ROW_COLUMNS
from leeway.stats.metrics import AT, BASE, MAX_UNSCORED
from leeway.yaml_config import nearest

NOT_RECORDED = "–"
ALLOWED, LISTED, LEFT_OUT = "allowed", "listed", "left out"
WILD = re.compile(r"[*?\[]")
SCORER = "scorer."  # settings of one scorer
T = TypeVar("T")


@dataclass(frozen=True)
class LogOptions:
    """What to compare, and how."""

    metrics: Seq[str] = ()  # names or patterns: `match`, `gsm8k/*`; empty: all
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # lowest and highest score, by name
    margins: Mapping[str, float] = field(default_factory=dict)  # of equivalence, by name; "*" is every measure
    cluster_by: str | None = None  # a metadata field
    allow: bool = False  # compare although tasks or settings differ


@dataclass(frozen=True)
class Matched:
    """Rows of all checkpoints, one per item and measure, and everything that does not agree between the logs."""

    names: list[str]  # of the checkpoints, base first
    rows: pd.DataFrame  # ROW_COLUMNS; the base's objective is `base`
    measures: dict[str, tuple[str, str]]  # task and metric
    differences: list[dict[str, str]]  # keys: what, effect, and each checkpoint's name
    ranges: dict[str, tuple[float, float]]  # of measures that were scaled to [0, 1]
    unscored: pd.DataFrame  # answers without a score: measure, checkpoint, reason, answers
    answers: dict[tuple[str, str], int]  # by measure and checkpoint, repeats included
    by_subtask: list[str]  # measures that are means over the subtasks of a group, whatever their sizes


def match(checkpoints: Seq[Checkpoint], options: LogOptions) -> Matched:
    """Match the logs item by item; raises LeewayError with one line if they cannot be compared."""
    names = [c.name for c in checkpoints]
    _check_names(checkpoints)
    differences = _task_differences(checkpoints, options)
    tasks = [t for t in checkpoints[0].tasks if all(t in c.tasks for c in checkpoints)]
    if not tasks:
        listed = "; ".join(f"{c.name}: {', '.join(c.tasks)}" for c in checkpoints)
        raise LeewayError(f"compare: no task is in every log ({listed})", fix="compare logs of the same tasks")
    chosen, ranges, left_out = _measures(checkpoints, tasks, options)
    differences += left_out
    for task in dict.fromkeys(t for t, _ in chosen.values()):
        for other in checkpoints[1:]:
            _check_content(checkpoints[0], other, task)
        differences += _setting_differences([(c.name, c.tasks[task]) for c in checkpoints], task, options)
    rows, reasons, answers, by_subtask = [], Counter[tuple[str, str, str]](), {}, list[str]()
    for measure, (task, metric) in chosen.items():
        clusters = _clusters(checkpoints, task, options.cluster_by)
        equal_subtasks = _by_subtask(checkpoints, task, metric)
        by_subtask += [measure] if equal_subtasks else []
        for checkpoint in checkpoints:
            log = checkpoint.tasks[task]
            objective = BASE if checkpoint is checkpoints[0] else checkpoint.name
            made = _rows(measure, log, metric, objective, clusters, ranges.get(measure))
            rows += (
                [row | {"attack": str(row["item_id"]).rpartition("/")[0]} for row in made] if equal_subtasks else made
            )
            answers[measure, checkpoint.name] = len(with_metric(log, metric))
            reasons.update((measure, checkpoint.name, a.reasons[metric]) for a in log.answers if metric in a.reasons)
    lines = [(*key, n) for key, n in reasons.items()]
    unscored = pd.DataFrame(lines, columns=["measure", "checkpoint", "reason", "answers"])
    table = pd.DataFrame(rows, columns=ROW_COLUMNS)
    return Matched(names, table, chosen, differences, ranges, unscored, answers, by_subtask)


def _check_names(checkpoints: Seq[Checkpoint]) -> None:
    if len(checkpoints) < 2:
        raise LeewayError("compare: needs the logs of two or more checkpoints", fix="give the base first, then others")
    names = [c.name for c in checkpoints]
    if twice := [n for n, count in Counter(names).items() if count > 1]:
        what = f"compare: two checkpoints are named {twice[0]}"
        raise LeewayError(what, fix="name them: base=PATH tuned=PATH")
    if BASE in names[1:]:
        raise LeewayError(f"compare: {BASE} is the name of the first checkpoint", fix="give it first, or another name")
    tools = {c.tool: c.name for c in checkpoints}
    if len(tools) > 1:
        listed = " and ".join(f"{name} is a log of {tool}" for tool, name in tools.items())
        raise LeewayError(f"compare: {listed}, so inputs cannot be matched", fix="compare logs of one tool")


def _task_differences(checkpoints: Seq[Checkpoint], options: LogOptions) -> list[dict[str, str]]:
    found = []
    for task in dict.fromkeys(t for c in checkpoints for t in c.tasks):
        metrics = dict.fromkeys(m for c in checkpoints if task in c.tasks for m in c.tasks[task].metrics)
        if options.metrics and not any(selects(p, task, m) for p in options.metrics for m in metrics):
            continue
        has = {c.name: "yes" if task in c.tasks else NOT_RECORDED for c in checkpoints}
        if NOT_RECORDED in has.values():
            missing = next(n for n, v in has.items() if v == NOT_RECORDED)
            if not options.allow:
                other = ", ".join(next(c for c in checkpoints if c.name == missing).tasks)
                what = f"compare: {missing} has no task {task} (it has {other})"
                raise LeewayError(what, fix="give logs of the same tasks, or --allow to leave it out")
            found.append({"what": f"task {task}", "effect": f"{LEFT_OUT}: not in every log", **has})
    return found


def _setting_differences(logs: list[tuple[str, TaskLog]], task: str, options: LogOptions) -> list[dict[str, str]]:
    """Return what differs between the logs of one task; raises LeewayError for a setting, unless it is allowed."""
    found = []
    for key in dict.fromkeys(k for _, log in logs for k in log.settings):
        values = {name: log.settings.get(key, NOT_RECORDED) for name, log in logs}
        if len(set(values.values())) == 1 or (key.startswith(SCORER) and NOT_RECORDED in values.values()):
            continue
        found.append({"what": f"{task}: {key}", "effect": ALLOWED, **values})
    if any(log.incomplete for _, log in logs):
        ended = {name: log.incomplete or "complete" for name, log in logs}
        found.insert(0, {"what": f"{task}: completeness", "effect": ALLOWED, **ended})
    prompts = _prompt_differences(logs)
    if prompts:
        found.append({"what": f"{task}: rendered prompts", "effect": ALLOWED, **prompts})
    if found and not options.allow:
        first = found[0]
        listed = ", ".join(f"{name}: {shorten(first[name])}" for name, _ in logs)
        more = f", and {len(found) - 1} more" if len(found) > 1 else ""
        what = f"compare: {first['what']} differs ({listed}){more}"
        raise LeewayError(what, fix="compare logs made with the same settings, or add --allow")
    for key in dict.fromkeys(k for _, log in logs for k in log.facts):
        values = {name: log.facts.get(key, NOT_RECORDED) for name, log in logs}
        if len(set(values.values())) > 1:
            found.append({"what": f"{task}: {key}", "effect": LISTED, **values})
    return found


def _prompt_differences(logs: list[tuple[str, TaskLog]]) -> dict[str, str]:
    """Return how many rendered prompts differ from the base's, by checkpoint; empty if none does."""
    base = {a.key: a.prompt for a in logs[0][1].answers if a.prompt}
    found = {logs[0][0]: f"{len(base)} prompts"}
    for name, log in logs[1:]:
        own = {a.key: a.prompt for a in log.answers if a.prompt}
        shared = [i for i in own if i in base]
        differ = sum(own[i] != base[i] for i in shared)
        found[name] = f"{differ} of {len(shared)} differ" if differ else "equal"
    return found if any(v.endswith("differ") for v in found.values()) else {}


def _check_content(base: Checkpoint, other: Checkpoint, task: str) -> None:
    """Raise LeewayError if an item has the same id and another input, other choices or another target."""
    known = {a.key: a.content for a in base.tasks[task].answers}
    for answer in other.tasks[task].answers:
        own = known.get(answer.key)
        if own is None or own == answer.content:
            continue
        part = next(k for k in {**own, **answer.content} if own.get(k) != answer.content.get(k))
        where = f"compare: {answer.part or task}, item {answer.item}"
        what = f"{where}: {base.name} and {other.name} have different {part}s under one id"
        raise LeewayError(what, fix="compare logs of the same version of the data, with the same shuffling")


def _measures(
    checkpoints: Seq[Checkpoint], tasks: list[str], options: LogOptions
) -> tuple[dict[str, tuple[str, str]], dict[str, tuple[float, float]], list[dict[str, str]]]:
    """Return the measures to compare, the ranges of those that are scaled, and what is left out."""
    found: dict[str, tuple[str, str]] = {}
    ranges: dict[str, tuple[float, float]] = {}
    left_out: list[dict[str, str]] = []
    known = []
    for task in tasks:
        logs = {c.name: c.tasks[task] for c in checkpoints}
        known += [(task, m) for m in dict.fromkeys(m for log in logs.values() for m in (*log.metrics, *log.unusable))]
    _check_patterns([*options.metrics, *options.ranges], known)
    for task, metric in known:
        measure, logs = measure_name(task, metric), {c.name: c.tasks[task] for c in checkpoints}
        patterns = [p for p in options.metrics if selects(p, task, metric)]
        if options.metrics and not patterns:
            continue
        bounds = by_name(options.ranges, task, metric)
        if reason := _unusable(logs, measure, metric, bounds):
            if any(not WILD.search(p) for p in patterns):
                raise LeewayError(f"compare: {measure} {reason}", fix="name another --metric")
            left_out.append({"what": measure, "effect": f"{LEFT_OUT}: {reason}", **dict.fromkeys(logs, "")})
            continue
        found[measure] = (task, metric)
        if bounds:
            ranges[measure] = bounds
    if not found:
        listed = "; ".join(f"{d['what']} {d['effect']}" for d in left_out) or "the logs hold no scores"
        raise LeewayError(f"compare: no metric is left ({listed})", fix="see the metrics of the logs")
    _check_patterns(options.margins, list(found.values()))
    return found, ranges, left_out


def _check_patterns(patterns: Iterable[str], known: Seq[tuple[str, str]]) -> None:
    """Raise LeewayError for a pattern that selects no metric."""
    for pattern in patterns:
        if not any(selects(pattern, task, metric) for task, metric in known):
            names = [measure_name(task, metric) for task, metric in known]
            words = [*names, *(metric for _, metric in known)]  # either may be given
            what = f"compare: no metric {pattern!r}{nearest(pattern, words)} (the logs have {', '.join(names)})"
            raise LeewayError(what, fix="name one of them")


def measure_name(task: str, metric: str) -> str:
    """Return the name of a metric of a task; `@` separates judges in names of measures."""
    return f"{task}/{metric}".replace(AT, "_at_")


def selects(pattern: str, task: str, metric: str) -> bool:
    """Return whether a pattern names a measure, a metric (with or without lm-eval's filter), or a task."""
    names = (measure_name(task, metric), metric, metric.partition(",")[0], task)
    return any(fnmatchcase(name, pattern) for name in (*names, *(n.replace(AT, "_at_") for n in names)))


def by_name(values: Mapping[str, T], task: str, metric: str) -> T | None:
    """Return the value whose name is most specific for a measure, None if no name selects it.

    First the measure's own name, then names without wildcards, then the longest pattern.
    """
    own, given = (task, metric), [name for name in values if selects(name, task, metric)]
    given.sort(key=lambda n: (n.replace(AT, "_at_") != measure_name(*own), bool(WILD.search(n)), -len(n), n))
    return values[given[0]] if given else None


def _unusable(logs: Mapping[str, TaskLog], measure: str, metric: str, bounds: tuple[float, float] | None) -> str:
    """Return why a metric cannot be compared; empty if it can."""
    low, high = bounds or (0.0, 1.0)
    values: list[float] = []
    for name, log in logs.items():
        if metric in log.unusable:
            return f"has no number per answer in {name} ({log.unusable[metric]})"
        own = [a.scores[metric] for a in log.answers if metric in a.scores]
        if not own:
            return f"has no score in {name}"
        values += own
    if min(values) < low or max(values) > high:
        what = f"has values from {min(values):g} to {max(values):g}"
        if bounds:
            raise LeewayError(f"compare: {measure} {what}, outside {low:g} to {high:g}", fix="give a wider --range")
        return f"{what}, and tests need bounds: give --range {measure}=LOW:HIGH"
    return ""


def _by_subtask(checkpoints: Seq[Checkpoint], task: str, metric: str) -> bool:
    """Return whether a group's score is the mean over its subtasks, as in its logs; if unknown, it is over items."""
    known = {c.name: c.tasks[task].weights[metric] for c in checkpoints if metric in c.tasks[task].weights}
    if len(set(known.values())) > 1:
        listed = ", ".join(f"{name}: {what}" for name, what in known.items())
        what = f"compare: {measure_name(task, metric)} weighs other things equally ({listed})"
        raise LeewayError(what, fix="run the group of tasks with the same weight_by_size")
    return SUBTASKS in known.values()


def _clusters(checkpoints: Seq[Checkpoint], task: str, by: str | None) -> dict[tuple[str, str], str]:
    """Return each item's cluster: the item itself, or the value of a metadata field."""
    found: dict[tuple[str, str], str] = {}
    for checkpoint in checkpoints:
        for answer in checkpoint.tasks[task].answers:
            if by is None:
                found[answer.key] = item_id(answer.part or task, answer.item)
                continue
            if answer.fields.get(by) is None:
                known = ", ".join(answer.fields) or "none"
                what = f"compare --cluster-by: {task}, item {answer.item} of {checkpoint.name} has no field {by!r}"
                raise LeewayError(f"{what} (it has {known})", fix="name a metadata field that every item has")
            own = f"{task}/{answer.fields[by]}"
            if found.setdefault(answer.key, own) != own:
                what = f"compare --cluster-by: {task}, item {answer.item} has two values of {by!r}"
                raise LeewayError(what, fix="name a field that is the same in every log")
    return found


def _rows(
    measure: str,
    log: TaskLog,
    metric: str,
    objective: str,
    clusters: Mapping[tuple[str, str], str],
    bounds: tuple[float, float] | None,
) -> list[dict[str, Any]]:
    """Return one row per item: the mean over its repeats. Texts stay in the logs."""
    low, high = bounds or (0.0, 1.0)
    by_item: dict[tuple[str, str], list[ScoredAnswer]] = {}
    for answer in with_metric(log, metric):
        by_item.setdefault(answer.key, []).append(answer)
    rows = []
    for (part, item), answers in by_item.items():
        scored = [(a.scores[metric] - low) / (high - low) for a in answers if metric in a.scores]
        reason = None
        if len(answers) - len(scored) > MAX_UNSCORED * len(answers):
            reasons = dict.fromkeys(a.reasons[metric] for a in answers if metric in a.reasons)
            repeats = f"{len(answers) - len(scored)} of {len(answers)} repeats: " if len(answers) > 1 else ""
            reason = repeats + "; ".join(reasons)
        row: dict[str, Any] = dict.fromkeys(ROW_COLUMNS, "")
        row |= {
            "objective": objective,
            "seed": 0,
            "budget": 0,
            "eval": measure,
            "item_id": item_id(part or log.task, item),
        }
        row |= {
            "cluster": clusters[part, item],
            "sample": 0,
            "outcome": None,
            "new_tokens": 0,
            "unscored_reason": reason,
        }
        row |= {"score": math.nan if reason else fmean(scored), "judge": metric}
        row["judge_raw"] = json.dumps({"scores": scored}) if len(answers) > 1 else ""
        rows.append(row)
    return rows


def with_metric(log: TaskLog, metric: str) -> list[ScoredAnswer]:
    """Return the answers that a metric is for: subtasks of a group may have others."""
    return [a for a in log.answers if metric in a.scores or metric in a.reasons]


def item_id(task: str, item: str) -> str:
    """Return `task/item`; a slash inside the item's own id is written %2F, as the last one ends the task's name."""
    return f"{task}/{item.replace('%', '%25').replace('/', '%2F')}"
