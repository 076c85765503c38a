"""Read logs of Inspect (`.eval`, or `.json`) for a comparison.

Letters count as in Inspect: C is 1, P is 0.5, I and N are 0. A sample with an error and no score, and a score that
Inspect itself leaves out (NaN), are unscored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from leeway.errors import LeewayError, first_line
from leeway.report.compare.logs.match import SCORER
from leeway.report.compare.logs.samples import ScoredAnswer, TaskLog, content_digest, flatten, plain, shorten

try:
    import inspect_ai.log as inspect_log
except ImportError as error:
    raise LeewayError("reading Inspect's logs needs Inspect", fix="pip install 'leeway[inspect]'") from error

TOOL = "Inspect"
LETTERS = {"C": 1.0, "P": 0.5, "I": 0.0, "N": 0.0}
WORDS = {"yes": 1.0, "true": 1.0, "no": 0.0, "false": 0.0}
UNREAD = {"messages", "output", "store", "events", "events_data", "timelines", "attachments"}
LIMITS = ["message_limit", "token_limit", "token_limit_type", "turn_limit", "time_limit", "working_limit", "cost_limit"]
RUN_ONLY = {"max_retries", "timeout", "attempt_timeout", "stream_idle_timeout", "max_connections", "cache", "batch"}
RUN_ONLY |= {"adaptive_connections", "extra_headers", "cache_prompt", "seed"}  # settings that do not change the request
MESSAGE_KEYS = ("role", "content", "tool_calls", "tool_call_id", "function")  # ids of messages are random


def find(folder: Path) -> list[Path]:
    """Return the log files below a folder."""
    return sorted(p for p in folder.rglob("*.eval") if p.is_file())


def read(path: Path) -> TaskLog:
    """Read one log; raises LeewayError."""
    try:
        log = inspect_log.read_eval_log(str(path), exclude_fields=UNREAD)
    except Exception as error:  # zip, JSON, pydantic and fsspec each raise their own
        what = f"{path}: not a readable Inspect log ({shorten(first_line(error))})"
        raise LeewayError(what, fix="give an .eval or .json file that Inspect wrote") from error
    if not log.samples:
        known = "only a header" if log.results is not None or log.eval.dataset.samples else "no samples"
        fix = "run the eval with its samples logged (without --no-log-samples)"
        raise LeewayError(f"{path}: {known}, status {log.status}", fix=fix)
    answers, unusable = _answers(path, log.samples)
    if not any(a.scores or a.reasons for a in answers) and not unusable:
        errors = sum(s.error is not None for s in log.samples)
        what = f"{path}: no scores ({len(log.samples)} samples, {errors} with an error, status {log.status})"
        raise LeewayError(what, fix="score it with `inspect score`, or run the eval again")
    ended = "" if log.status == "success" else f"status {log.status}, {len(log.samples)} samples"
    made = TaskLog(log.eval.task, path, log.eval.model, _settings(log), _facts(log), answers, unusable, ended)
    return replace(made, run=log.eval.task_id)


def _settings(log: Any) -> dict[str, str]:
    """Return what defines the task: version, arguments, solver, generation, limits, scorers, graders."""
    spec = log.eval
    found = {"version": plain(spec.task_version)}
    found |= flatten(spec.task_args, "task_args")
    found["solver"] = plain([{"solver": s.solver, "params": s.params} for s in log.plan.steps])
    generate = _set(spec.model_generate_config) | _set(log.plan.config)
    found |= flatten({k: v for k, v in generate.items() if k not in RUN_ONLY}, "generate")
    found |= {k: v for key in LIMITS for k, v in flatten(getattr(spec.config, key, None), key).items()}
    for scorer in spec.scorers or []:
        found[f"{SCORER}{scorer.name}"] = plain(scorer.options or {})
    for role, config in (spec.model_roles or {}).items():
        configs = config if isinstance(config, list) else [config]
        found[f"model_roles.{role}"] = ", ".join(str(c.model) for c in configs)
    return found | flatten(getattr(spec.sandbox, "type", None), "sandbox")


def _set(config: Any) -> dict[str, Any]:
    return {k: v for k, v in config.model_dump(mode="json").items() if v is not None}


def _facts(log: Any) -> dict[str, str]:
    spec = log.eval
    found = {"model": str(spec.model), "created": str(spec.created)}
    found |= flatten({k: getattr(spec.config, k) for k in ("epochs", "limit", "sample_id")}, "config")
    found |= flatten(spec.model_args, "model_args") | flatten(_set(spec.model_generate_config).get("seed"), "seed")
    return found | flatten(dict(spec.packages), "packages")


def _answers(path: Path, samples: list[Any]) -> tuple[list[ScoredAnswer], dict[str, str]]:
    """Return an answer per sample and epoch, and the metrics that have no number per sample."""
    unusable: dict[str, str] = {}
    found = [(s, dict(_values(s))) for s in samples]
    metrics: dict[str, None] = {}
    for _, values in found:
        for metric, value in values.items():
            metrics[metric] = None
            if not isinstance(value, float):
                unusable.setdefault(metric, value[0])
    scored = [(name, score) for s in samples for name, score in (s.scores or {}).items()]
    whole = {name for name, score in scored if isinstance(score.value, Mapping)}  # their NaN stands for all keys
    metrics = {m: None for m in metrics if m not in whole and m not in unusable}
    answers, seen = [], set()
    for sample, values in found:
        if (sample.id, sample.epoch) in seen:
            what = f"{path}: sample {sample.id} occurs twice in epoch {sample.epoch}"
            raise LeewayError(what, fix="give the log of one run")
        seen.add((sample.id, sample.epoch))
        scores, reasons = {}, {}
        for metric in metrics:
            value = values.get(metric, math.nan)
            if isinstance(value, float) and math.isfinite(value) and not sample.invalidation:
                scores[metric] = value
            else:
                reasons[metric] = _reason(sample, metric)
        content = {"input": content_digest(_input(sample.input)), "target": content_digest(sample.target)}
        content |= {"choice": content_digest(sample.choices)} if sample.choices else {}
        fields = sample.metadata or {}
        answers.append(
            ScoredAnswer(str(sample.id), sample.epoch - 1, content, fields=fields, scores=scores, reasons=reasons)
        )
    return answers, {m: why for m, why in unusable.items() if m not in whole}


def _values(sample: Any) -> Iterator[tuple[str, float | tuple[str]]]:
    """Yield each metric's number, NaN where it is missing, or a tuple that says what it is instead."""
    for scorer, score in (sample.scores or {}).items():
        if isinstance(score.value, Mapping):
            for key, value in score.value.items():
                yield f"{scorer}/{key}", _number(value)
        else:
            yield scorer, _number(score.value)


def _number(value: Any) -> float | tuple[str]:
    if value is None:
        return math.nan
    if isinstance(value, bool | int | float):
        return float(value)
    if isinstance(value, str):
        known = LETTERS.get(value, WORDS.get(value.lower()))
        if known is not None:
            return known
        try:
            return float(value)
        except ValueError:
            return (f"text such as {shorten(value, 20)!r}",)
    return (f"a {type(value).__name__} per sample",)


def _reason(sample: Any, metric: str) -> str:
    """Return why a sample has no score."""
    if sample.invalidation:
        return "invalidated"
    score = next((s for n, s in (sample.scores or {}).items() if metric == n or metric.startswith(f"{n}/")), None)
    if score is not None:
        return f"unscored: {shorten(score.reason)}" if score.reason else "unscored"
    if sample.error is not None:
        return f"error: {shorten(sample.error.message)}"
    return f"no score ({sample.limit.type} limit)" if sample.limit else "no score"


def _input(value: Any) -> Any:
    """Return an input as text, or as messages without their random ids."""
    if isinstance(value, str):
        return value
    dumped = [m.model_dump(mode="json", exclude_none=True) for m in value]
    return [{k: v for k, v in m.items() if k in MESSAGE_KEYS} for m in dumped]
