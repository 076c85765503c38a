"""Logs of Inspect and lm-eval as checkpoints to compare: `PATH` or `NAME=PATH`, each a file or a folder."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from leeway.errors import LeewayError, first_line
from leeway.integrations import lm_eval_logs
from leeway.io import expand
from leeway.report.compare.logs.match import LogOptions
from leeway.report.compare.logs.samples import Checkpoint, TaskLog

if TYPE_CHECKING:
    from leeway.report.compare.logs.compare import LogComparison

EVAL, JSON = ".eval", ".json"
FIX = "give .eval files of Inspect, samples_*.jsonl files of lm-eval, or folders of one of them"


def compare_logs(
    logs: Seq[str],
    *,
    metrics: Seq[str] = (),
    margins: Mapping[str, float] | float | None = None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    cluster_by: str | None = None,
    allow: bool = False,
) -> LogComparison:
    """Compare checkpoints by their logs of Inspect or lm-eval; the first one is the base.

    `logs` are `PATH` or `NAME=PATH`, files or folders; equal names are one checkpoint. `metrics`: names or patterns of
    metrics, tasks or `task/metric` (default: all). `margins`: of equivalence, one for all or by name, as fractions.
    `ranges`: lowest and highest possible score of metrics outside [0, 1]. `cluster_by`: a metadata field (lm-eval: of
    the document). `allow`: compare although settings differ, and list them. Raises LeewayError.
    """
    from leeway.report.compare.logs.compare import compare

    given = {"*": float(margins)} if isinstance(margins, int | float) else dict(margins or {})
    options = LogOptions(tuple(metrics), dict(ranges or {}), given, cluster_by, allow)
    return compare(read_checkpoints(logs), options)


def compare_and_write(
    logs: Seq[str],
    out: Path,
    metrics: Seq[str] | None = None,
    margins: Seq[str] | None = None,
    ranges: Seq[str] | None = None,
    cluster_by: str | None = None,
    *,
    allow: bool = False,
    rule: Path | None = None,
) -> str:
    """Compare logs with options as on the command line, write the folder, and return the table and the page's path.

    `rule` is a file of the gate's rules, whose faults are raised before the work.
    """
    from leeway.gate import rules
    from leeway.report.compare.logs import output

    if rule:
        rules.load(rule)
    bounds, by_name = parse_margins(margins or ()), parse_ranges(ranges or ())
    made = compare_logs(logs, metrics=metrics or (), margins=bounds, ranges=by_name, cluster_by=cluster_by, allow=allow)
    page = output.write(made, out)
    return f"{output.text(made)}\n{page.resolve()}"


def are_logs(arguments: Seq[str]) -> bool:
    """Return whether any argument names logs, not a run directory of Leeway."""
    for argument in arguments:
        name, path = split(argument)
        if name or path.suffix in (EVAL, JSON, ".jsonl"):
            return True
        if path.is_dir() and not (path / "rows.parquet").exists() and _log_files(path):
            return True
    return False


def split(argument: str) -> tuple[str, Path]:
    """Return name and path of `NAME=PATH`; no name where the whole argument is a path."""
    name, equals, rest = argument.partition("=")
    if not equals or expand(argument).exists() or "/" in name:
        return "", expand(argument)
    return name, expand(rest)


def parse_margins(given: Seq[str]) -> dict[str, float]:
    """Return margins by name from `X` (every measure, `*`) and `NAME=X`; raises LeewayError."""
    found = {}
    for text in given:
        name, _, value = text.rpartition("=")
        try:
            found[name or "*"] = float(value)
        except ValueError as error:
            raise LeewayError(f"--margin {text}: {value!r} is not a number", fix="--margin 0.05") from error
    return found


def parse_ranges(given: Seq[str]) -> dict[str, tuple[float, float]]:
    """Return lowest and highest scores by name from `NAME=LOW:HIGH`; raises LeewayError."""
    found = {}
    for text in given:
        name, _, value = text.rpartition("=")
        try:
            low, high = (float(part) for part in value.split(":"))
        except ValueError as error:
            raise LeewayError(f"--range {text}: not NAME=LOW:HIGH", fix="--range score=0:10") from error
        if not (name and low < high):
            raise LeewayError(f"--range {text}: not NAME=LOW:HIGH with LOW below HIGH", fix="--range score=0:10")
        found[name] = (low, high)
    return found


def read_checkpoints(arguments: Seq[str]) -> list[Checkpoint]:
    """Read the logs of every checkpoint; raises LeewayError for a path without logs, or two logs of one task."""
    by_name: dict[str, list[tuple[str, TaskLog]]] = {}
    unnamed: list[tuple[list[tuple[str, TaskLog]], Path]] = []
    order: list[object] = []
    for argument in arguments:
        name, path = split(argument)
        logs = _read(path)
        if name:
            order += [] if name in by_name else [name]
            by_name.setdefault(name, []).extend(logs)
        else:
            unnamed.append((logs, path))
            order.append(len(unnamed) - 1)
    models = [_model(logs, path) for logs, path in unnamed]
    taken = [*models, *by_name]
    found = []
    for key in order:
        if isinstance(key, str):
            found.append(_checkpoint(key, by_name[key]))
        elif isinstance(key, int):
            logs, path = unnamed[key]
            name = models[key] if taken.count(models[key]) == 1 else path.name if path.is_dir() else path.stem
            found.append(_checkpoint(name, logs))
    return found


def _model(logs: list[tuple[str, TaskLog]], path: Path) -> str:
    """Return the model of a checkpoint's logs."""
    models = list(dict.fromkeys(log.model for _, log in logs))
    if len(models) > 1:
        what = f"{path}: logs of {len(models)} models ({', '.join(models)})"
        raise LeewayError(what, fix="give each checkpoint's own: base=PATH tuned=PATH")
    return models[0]


def _checkpoint(name: str, logs: list[tuple[str, TaskLog]]) -> Checkpoint:
    tools = list(dict.fromkeys(tool for tool, _ in logs))
    if len(tools) > 1:
        raise LeewayError(f"compare: {name} has logs of {' and of '.join(tools)}", fix="give logs of one tool")
    tasks: dict[str, TaskLog] = {}
    for _, log in logs:
        other = tasks.get(log.task)
        tasks[log.task] = _one_of(name, other, log) if other else log
    merged = lm_eval_logs.merge_groups(list(tasks.values()))
    return Checkpoint(name, tools[0], {log.task: log for log in merged})


def _one_of(name: str, one: TaskLog, other: TaskLog) -> TaskLog:
    """Return the complete log of a run and its retry; raises LeewayError for two runs."""
    if one.run and one.run == other.run and bool(one.incomplete) != bool(other.incomplete):
        kept, retried = (other, one) if one.incomplete else (one, other)
        return replace(kept, facts={**kept.facts, "retry of": retried.path.name})
    what = f"compare: {name} has two logs of task {one.task} ({one.path} and {other.path})"
    raise LeewayError(what, fix="give one of the files, or name two checkpoints")


def _log_files(folder: Path) -> list[Path]:
    return sorted([*(p for p in folder.rglob(f"*{EVAL}") if p.is_file()), *lm_eval_logs.find(folder)])


def _read(path: Path) -> list[tuple[str, TaskLog]]:
    try:
        return _read_logs(path)
    except (TypeError, AttributeError, KeyError, ValueError, ArithmeticError, RecursionError) as error:
        what = f"{path}: not a readable log ({type(error).__name__}: {first_line(error)[:160]})"
        raise LeewayError(what, fix=FIX) from error


def _read_logs(path: Path) -> list[tuple[str, TaskLog]]:
    if path.is_dir():
        files = _log_files(path)
        if not files:
            raise LeewayError(f"{path}: no logs of Inspect or lm-eval in this folder", fix=FIX)
        return [one for file in files for one in _read(file)]
    if not path.is_file():
        raise LeewayError(f"{path}: no such file or folder", fix=FIX)
    if path.suffix == EVAL or (path.suffix == JSON and not path.name.startswith("results")):
        from leeway.integrations.inspect import logs

        return [(logs.TOOL, logs.read(path))]
    if path.suffix == ".jsonl":
        return [(lm_eval_logs.TOOL, lm_eval_logs.read(path))]
    if path.suffix == JSON:
        raise LeewayError(f"{path}: lm-eval's results without samples", fix="give its folder, or samples_*.jsonl")
    raise LeewayError(f"{path}: not a log", fix=FIX)
