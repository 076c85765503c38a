"""Export a finished run as Inspect logs: one `.eval` file per checkpoint, test condition and eval.

Ids and times come from the manifest and the rows, so the same run gives the same logs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd

from leeway import stats
from leeway.errors import LeewayError
from leeway.hashing import digest
from leeway.report.results import ReportError, Results

try:
    import inspect_ai.log as logs
    import inspect_ai.model as chat

    from leeway.integrations.inspect.tasks import score_of
except ImportError as error:
    raise LeewayError("Inspect is not installed", fix="pip install 'leeway[inspect]'") from error

GROUPS = ["objective", "seed", "budget", "condition", "eval", "judge"]
METADATA = ["objective", "seed", "budget", "condition", "eval", "attack", "item_id", "cluster"]
METADATA += ["outcome", "unscored_reason", "template_hash", "adapter_hash", "new_tokens"]
MAX_NAME = 100  # characters of one part of a file's name
SCORE = "judged"  # as the tasks name it


@dataclass(frozen=True)
class Group:
    """The rows of one log, and the facts they share."""

    facts: dict[str, Any]
    rows: pd.DataFrame

    @property
    def target(self) -> str:
        """The checkpoint and its condition: `base`, `sft-s0-25000`, `cft-s0-25000-under-safe`."""
        f = self.facts
        trained = "" if f["objective"] == "base" else f"-s{f['seed']}-{f['budget']}"
        under = "" if f["condition"] == "plain" else f"-under-{_plain_name(f['condition']).lower()}"
        return f"{f['objective']}{trained}{under}"


def export(folder: Path, out: Path | None = None) -> list[Path]:
    """Write the logs of the run in `folder` into `out` (default: its `inspect/`); return their paths in order.

    Raises LeewayError if `folder` has no finished run.
    """
    results = Results.load(folder)
    out = out or folder / "inspect"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise LeewayError(f"{out} is a file", fix="give --out a folder") from error
    paths = []
    for group in groups(results):
        log = log_of(group, results)
        name = f"{_plain_name(log.eval.created)}_{log.eval.task}_{_plain_name(group.target)}_{log.eval.task_id}.eval"
        paths.append(out / name)
        logs.write_eval_log(log, paths[-1])
    return paths


def groups(results: Results) -> Iterator[Group]:
    """Yield the rows of every log, base first; each judge or grader has its own log."""
    rows = results.rows.astype(object).where(results.rows.notna(), None)
    rows["condition"] = [results.conditions.get(h or "", "plain" if not h else h[:8]) for h in rows["template_hash"]]
    found = [Group(dict(zip(GROUPS, key, strict=True)), part) for key, part in rows.groupby(GROUPS, sort=True)]
    yield from sorted(found, key=lambda g: g.facts["objective"] != "base")


def log_of(group: Group, results: Results) -> Any:
    """Return an EvalLog: header, every row as a sample, the rates with their intervals."""
    manifest, facts = results.manifest, group.facts
    run = str(manifest.get("study_hash") or digest(results.study))
    at = _time(manifest)
    name = str((manifest.get("model") or {}).get("name") or "model").rstrip("/").rsplit("/", 1)[-1]
    model = f"{name}/{group.target}"
    identity = digest(run, at, {**facts, "who": group.target})
    samples = [_sample(row, model, at, identity) for row in _records(group.rows)]
    ids = [s.id for s in samples if s.epoch == 1]
    tokens = int(sum(group.rows["new_tokens"]))
    environment = manifest.get("environment") or {}
    libraries = {k: str(environment[k]) for k in ("torch", "transformers", "peft") if k in environment}
    usage = chat.ModelUsage(output_tokens=tokens, total_tokens=tokens)
    return logs.EvalLog(
        status="success",
        eval=logs.EvalSpec(
            created=at,
            eval_id=identity,
            run_id=run,
            task_id=digest(identity),
            task=_task_name(group),
            task_version=_eval_hash(group, manifest),
            task_args=_task_args(group, results.study),
            dataset=logs.EvalDataset(name=_task_name(group), samples=len(ids), sample_ids=ids),
            model=model,
            config=logs.EvalConfig(epochs=max(s.epoch for s in samples)),
            packages={"leeway": str(manifest.get("leeway", "")), **libraries},
            tags=[group.target, str(facts["condition"])],
            metadata=_header(group, results),
        ),
        results=_results(group, results.conditions),
        stats=logs.EvalStats(started_at=at, completed_at=at, model_usage={model: usage}),
        samples=samples,
    )


def _records(rows: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(k): v for k, v in row.items()} for row in rows.to_dict("records")]


def _sample(row: dict[str, Any], model: str, at: str, identity: str) -> Any:
    name = f"{row['attack']}/{row['item_id']}" if row["attack"] else row["item_id"]
    uid = digest(identity, name, row["sample"])
    prompt = chat.ChatMessageUser(id=digest(uid, "prompt"), content=row["prompt"], source="input")
    response = {"content": row["response"], "model": model, "source": "generate"}
    answer = chat.ChatMessageAssistant(id=digest(uid, "answer"), **response)
    reason, tokens = row["unscored_reason"], row["new_tokens"]
    usage = chat.ModelUsage(output_tokens=tokens, total_tokens=tokens)
    return logs.EvalSample(
        id=name,
        epoch=row["sample"] + 1,
        uuid=uid,
        input=row["prompt"],
        target="",
        messages=[prompt, answer],
        output=chat.ModelOutput(
            model=model,
            choices=[chat.ChatCompletionChoice(message=answer)],
            usage=usage,
            error=reason if reason and reason.startswith("no answer") else None,
        ),
        scores={SCORE: score_of(row)},
        metadata={k: row[k] for k in METADATA},
        model_usage={model: usage},
        started_at=at,
        completed_at=at,
    )


def _results(group: Group, conditions: dict[str, str]) -> Any:
    """Return leeway's rates over this log's rows; a rate without enough scores is NaN, with its reason."""
    rows = group.rows.assign(score=group.rows["score"].astype(float))
    metrics: dict[str, Any] = {}
    for line in stats.rates(rows, conditions).to_dict("records"):
        name = line["measure"]
        details = {k: line[k] for k in ("label", "n", "n_unscored", "n_clusters", "method", "reason")}
        metrics[name] = logs.EvalMetric(name=name, value=line["rate"], metadata={**details, "level": 0.95})
        if line["primary"]:
            for end in ("low", "high"):
                metrics[f"{name} {end}"] = logs.EvalMetric(name=f"{name} {end}", value=line[end])
    missing = int(rows["score"].isna().sum())
    metrics["unscored"] = logs.EvalMetric(name="unscored", value=missing)
    score = logs.EvalScore(
        name=SCORE,
        scorer=SCORE,
        scored_samples=len(rows) - missing,
        unscored_samples=missing,
        params={"judge": group.facts["judge"]},
        metrics=metrics,
    )
    return logs.EvalResults(
        total_samples=len(rows),
        completed_samples=len(rows),
        scores=[score],
        headline=logs.HeadlineMetric(scorer=SCORE, metric=next(iter(metrics))),
    )


def _header(group: Group, results: Results) -> dict[str, Any]:
    manifest, facts = results.manifest, group.facts
    ledger = results.ledger.astype(object).where(results.ledger.notna(), None)
    at = [c for c in ("objective", "seed", "budget") if c in ledger]
    line = next((r for r in _records(ledger) if all(r[c] == facts[c] for c in at)), None)
    shared = ("leeway", "command", "started", "study_hash", "organism", "model", "attacks", "judges")
    return {
        **facts,
        "adapter_hash": sorted({h or "" for h in group.rows["adapter_hash"]}),
        "template_hash": sorted({h or "" for h in group.rows["template_hash"]}),
        "ledger": line,
        "manifest": {k: manifest[k] for k in shared if k in manifest},
    }


def _task_name(group: Group) -> str:
    """Return `jailbreak`, `persona`, …; capability with its task, as a study can have several."""
    axis = str(group.facts["eval"])
    parts = {str(i).rsplit("/", 1)[0] for i in group.rows["item_id"]}
    name = f"{axis}-{parts.pop()}" if axis == "capability" and len(parts) == 1 else axis
    return _plain_name(name)


def _eval_hash(group: Group, manifest: dict[str, Any]) -> str | int:
    known = manifest.get("evals") or {}
    facts = known.get(_task_name(group)) or known.get(group.facts["eval"])
    same_axis = [e for key, e in known.items() if key.startswith(f"{group.facts['eval']}-")]
    facts = facts or (same_axis[0] if len(same_axis) == 1 else None)
    return str(facts["hash"]) if isinstance(facts, dict) and "hash" in facts else 0


def _task_args(group: Group, study: dict[str, Any]) -> dict[str, Any]:
    evals = study.get("evals")
    settings = evals.get(group.facts["eval"]) if isinstance(evals, dict) else None
    return settings if isinstance(settings, dict) else {"settings": settings} if settings else {}


def _time(manifest: dict[str, Any]) -> str:
    started = str(manifest.get("started") or "1970-01-01T00:00:00+00:00")
    try:
        return datetime.fromisoformat(started).isoformat(timespec="seconds")
    except ValueError as error:
        raise ReportError(f"manifest.json: started is {started!r}, not a time", fix="restore it") from error


def _plain_name(text: str) -> str:
    """Replace all but letters, digits, points, plus and minus: Inspect splits a log's name at underscores."""
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", text).strip("-")[:MAX_NAME]
