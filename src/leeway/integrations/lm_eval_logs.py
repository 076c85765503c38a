"""Read sample logs of the lm-evaluation-harness: `samples_<task>_<date>.jsonl`, with the run's `results_<date>.json`.

`lm_eval … --log_samples --output_path DIR` writes them. lm-eval itself is not needed to read them. A metric under a
filter is named as in lm-eval's results, `exact_match,strict-match`; without a filter, `acc`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from leeway.errors import LeewayError
from leeway.io import refuse_special
from leeway.report.compare.logs.samples import (
    ITEMS,
    SUBTASKS,
    ScoredAnswer,
    TaskLog,
    content_digest,
    flatten,
    plain,
)

TOOL = "lm-eval"
SAMPLES = re.compile(r"samples_(?P<task>.+?)(_(?P<date>\d{4}-\d\d-\d\dT[0-9.:-]+))?\.jsonl")
MAX_SCORE = 1e300  # JSON spells integers that no float holds
UNNAMED = "samples"  # the task of a file with another name
REQUIRED = ("doc_id", "doc", "target")
NO_FILTER = "none"
# what defines the questions and their scores; other keys hold paths, or texts for display
CONFIG = ["dataset_name", "test_split", "validation_split", "fewshot_split", "process_docs", "doc_to_text"]
CONFIG += ["doc_to_target", "doc_to_choice", "process_results", "use_prompt", "description", "target_delimiter"]
CONFIG += ["fewshot_delimiter", "fewshot_config", "metric_list", "filter_list", "output_type", "generation_kwargs"]
CONFIG += ["repeats", "should_decontaminate", "gen_prefix"]
SHARED = ["system_instruction", "chat_template_sha", "fewshot_as_multiturn"]  # of the results file
FACTS = ["lm_eval_version", "transformers_version", "git_hash"]
RUN_FACTS = ["model_args", "model_revision", "model_sha", "model_dtype", "batch_size", "limit", "random_seed"]
RUN_FACTS += ["numpy_seed", "torch_seed", "fewshot_seed"]


def find(folder: Path) -> list[Path]:
    """Return the sample files below a folder."""
    return sorted(p for p in folder.rglob("samples_*.jsonl") if p.is_file())


def read(path: Path) -> TaskLog:
    """Read one sample file and its results file; raises LeewayError."""
    named = SAMPLES.fullmatch(path.name)
    task = named["task"] if named else UNNAMED
    results = _results(path, named["date"]) if named and named["date"] else {}
    answers, unusable = _answers(path)
    if not answers:
        raise LeewayError(f"{path}: no samples", fix="run lm_eval with --log_samples")
    model = str(results.get("model_name") or path.parent.name)
    subtasks = results.get("group_subtasks") or {}
    group = _group(subtasks, task)
    weights = _weights(results, group, _leaves(subtasks, group)) if group else {}
    facts = _facts(results)
    return TaskLog(task, path, model, _settings(results, task), facts, answers, unusable, group=group, weights=weights)


def _group(subtasks: Mapping[str, list[str]], task: str) -> str:
    """Return the outermost group of tasks that holds a task; empty if none does."""
    found = next((g for g, own in subtasks.items() if task in own), "")
    return (_group(subtasks, found) or found) if found else ""


def _leaves(subtasks: Mapping[str, list[str]], task: str) -> list[str]:
    """Return the tasks of a group and of the groups in it; a task is its own."""
    own = subtasks.get(task)
    return [task] if own is None else [leaf for t in own for leaf in _leaves(subtasks, t)]


def _weights(results: Mapping[str, Any], group: str, tasks: list[str]) -> dict[str, str]:
    """Return what counts equally in a group's own score, by metric: its subtasks or its documents, as lm-eval did.

    The results file does not hold `weight_by_size`, so it is read off the score. A metric is left out if the group has
    no score of it, or if both give the same.
    """
    scores, sizes = results.get("results") or {}, results.get("n-samples") or {}
    found = {}
    for key, value in (scores.get(group) or {}).items():
        metric, comma, filtered = key.partition(",")
        own = [t for t in tasks if comma and isinstance((scores.get(t) or {}).get(key), int | float)]
        if not isinstance(value, int | float) or len(own) < 2 or any(t not in sizes for t in own):
            continue
        values, n = [float(scores[t][key]) for t in own], [int(sizes[t]["effective"]) for t in own]
        by_task = fmean(values)
        by_document = sum(v * k for v, k in zip(values, n, strict=True)) / max(sum(n), 1)
        if math.isclose(by_task, by_document, abs_tol=1e-9):
            continue
        name = metric if filtered == NO_FILTER else key
        if math.isclose(value, by_task, abs_tol=1e-9):
            found[name] = SUBTASKS
        elif math.isclose(value, by_document, abs_tol=1e-9):
            found[name] = ITEMS
    return found


def merge_groups(logs: Seq[TaskLog]) -> list[TaskLog]:
    """Return the logs with the subtasks of each group as one task; a single subtask stays a task."""
    groups: dict[str, list[TaskLog]] = {}
    for log in logs:
        groups.setdefault(log.group or log.task, []).append(log)
    return [own[0] if len(own) == 1 else _merged(name, own) for name, own in groups.items()]


def _merged(name: str, logs: list[TaskLog]) -> TaskLog:
    settings = {f"{log.task}: {k}": v for log in logs for k, v in log.settings.items()}
    answers = [replace(a, part=log.task) for log in logs for a in log.answers]
    unusable = {m: why for log in logs for m, why in log.unusable.items()}
    weights = {m: what for log in logs for m, what in log.weights.items()}
    return replace(logs[0], task=name, settings=settings, answers=answers, unusable=unusable, weights=weights)


def _results(path: Path, date: str) -> dict[str, Any]:
    """Return the results file of the same run; empty without one."""
    found = path.with_name(f"results_{date}.json")
    if not found.is_file():
        return {}
    try:
        value = json.loads(found.read_text("utf-8"))
    except ValueError as error:
        raise LeewayError(f"{found}: not JSON ({error})", fix="restore it, or run lm_eval again") from error
    if not isinstance(value, dict) or "configs" not in value:
        raise LeewayError(f"{found}: not a results file of lm-eval", fix="restore it, or run lm_eval again")
    return value


def _settings(results: Mapping[str, Any], task: str) -> dict[str, str]:
    if not results:
        return {}
    config = (results.get("configs") or {}).get(task) or {}
    found = {"version": plain((results.get("versions") or {}).get(task))}
    shots = (results.get("n-shot") or {}).get(task)
    found["few-shot examples"] = plain(config.get("num_fewshot") if shots is None else shots)
    for key in CONFIG:
        found |= flatten(config.get(key), key)
    for key in SHARED:
        found |= flatten(results.get(key), key)
    return found | flatten((results.get("config") or {}).get("gen_kwargs"), "gen_kwargs")


def _facts(results: Mapping[str, Any]) -> dict[str, str]:
    run = results.get("config") or {}
    found = {k: v for key in FACTS for k, v in flatten(results.get(key), key).items()}
    return found | {k: v for key in RUN_FACTS for k, v in flatten(run.get(key), key).items()}


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    refuse_special(path)
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise LeewayError(f"{path}: not UTF-8 text", fix="give a samples_*.jsonl file of lm-eval") from error
    except OSError as error:
        raise LeewayError(f"{path}: cannot be read ({error.strerror})", fix="give another file") from error
    for n, line in enumerate(text.split("\n"), 1):  # a string may hold other line ends, such as U+2028
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise LeewayError(f"{path}, line {n}: not JSON, as in a truncated file", fix="run lm_eval again") from error
        if not isinstance(value, dict) or (missing := [k for k in REQUIRED if k not in value]):
            what = f"without {', '.join(missing)}" if isinstance(value, dict) else "not an object"
            raise LeewayError(f"{path}, line {n}: {what}", fix="give a samples_*.jsonl file of lm-eval")
        yield n, value


def _answers(path: Path) -> tuple[list[ScoredAnswer], dict[str, str]]:
    """Return one answer per document with the metrics of all filters, and metrics without a number per document."""
    found: dict[str, dict[str, Any]] = {}
    unusable: dict[str, str] = {}
    every: dict[str, None] = {}
    seen = set()
    for n, line in _lines(path):
        item, filtered = str(line["doc_id"]), str(line.get("filter") or NO_FILTER)
        if (item, filtered) in seen:
            what = f"{path}, line {n}: document {item} occurs twice under filter {filtered}"
            raise LeewayError(what, fix="give the samples of one run")
        seen.add((item, filtered))
        content = {"document": content_digest(line["doc"]), "target": content_digest(line["target"])}
        fields = line["doc"] if isinstance(line["doc"], dict) else {}
        made = found.setdefault(item, {"content": content, "prompt": _prompt(line), "fields": fields, "scores": {}})
        if made["content"] != content:
            raise LeewayError(f"{path}, line {n}: document {item} has two texts", fix="give the samples of one run")
        listed = line.get("metrics") or []
        if not isinstance(listed, list) or not all(isinstance(m, str) for m in listed):
            raise LeewayError(f"{path}, line {n}: metrics is no list of names", fix="run lm_eval again")
        for metric in listed:
            name = metric if filtered == NO_FILTER else f"{metric},{filtered}"
            every[name], value = None, line.get(metric)
            if isinstance(value, bool | int | float):
                made["scores"][name] = float(value) if abs(value) < MAX_SCORE else math.inf
            elif value is not None:
                unusable[name] = f"a {type(value).__name__} per document, which lm-eval aggregates over the task"
    metrics = [m for m in every if m not in unusable]
    return [_answer(item, made, metrics) for item, made in found.items()], unusable


def _answer(item: str, made: dict[str, Any], metrics: list[str]) -> ScoredAnswer:
    scores, reasons = {}, {}
    for metric in metrics:
        value = made["scores"].get(metric)
        if value is None or not math.isfinite(value):
            reasons[metric] = "no score" if value is None else "not a finite number"
        else:
            scores[metric] = value
    return ScoredAnswer(
        item, 0, made["content"], prompt=made["prompt"], fields=made["fields"], scores=scores, reasons=reasons
    )


def _prompt(line: dict[str, Any]) -> str:
    """Return a digest of the first rendered context; empty if the log has none."""
    if known := line.get("prompt_hash"):
        return str(known)
    arguments = line.get("arguments")
    first = next(iter(arguments.values()), None) if isinstance(arguments, dict) else arguments
    return content_digest(first) if first else ""
