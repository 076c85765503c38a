"""Judge the stored answers of a finished run or audit again, without the model under test.

The judge's rows are added to the run's, one per response of an eval that judges score, with the judge's name. All other
rows stay as they are, and the verdicts of the study's first judge remain the primary ones. Answers that were not
obtained stay unscored with their reason.

The rows of each added judge are a file of their own, `rescored/<eval>@<judge>.parquet`, written when all answers are
judged; until then verdicts and replies are in the cache, so that a killed command resumes without paying twice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from leeway.cache import Cache
from leeway.errors import LeewayError
from leeway.evals.alignment import conversation, rating_columns
from leeway.evals.eval import JudgeRef, is_retryable
from leeway.evals.jailbreak import checked_verdict
from leeway.evals.overrefusal import verdict_columns
from leeway.generation.thinking import final_answer
from leeway.io import expand, read_utf8
from leeway.judges import Answer, Judge
from leeway.judges.cached import CachedJudge
from leeway.report.formatting import mapping
from leeway.report.results import Results
from leeway.rescoring.responses import JUDGED_EVALS, bare_prompts, has_no_answer, require_answers
from leeway.stats.metrics import AT
from leeway.study.build_evals import HelperModels, build_alignment, build_benign_judge, build_judge
from leeway.study.eval_spec import AlignmentSpec, JudgeSpec
from leeway.study.load import apply_override
from leeway.study.objective_spec import ALIAS
from leeway.study.progress import Reporter
from leeway.study.run_dir import RESPONSE, ROW_SCHEMA, RunDir
from leeway.study.runtime import compute_settings
from leeway.yaml_config import faults, read

Columns = dict[str, Any]
JudgeRows = Callable[[Sequence[Mapping[str, Any]]], list[Columns]]
RESCORED_EVALS = (*JUDGED_EVALS, "alignment")
BATCH = 256  # answers judged at a time: the most that a kill loses
UNCACHED = ("keywords", "organism")  # judges that are faster than the cache
RENAME = "name the new one with --as, such as {}-2"
NO_PERPLEXITY = "Judged after the run, without the study's perplexity rule."


@dataclass(frozen=True)
class Settings:
    """The study's threads, and the device of a local judge: the best that this machine has."""

    threads: int
    device: str = "auto"


@dataclass(frozen=True)
class Rescoring:
    """One judge on one eval; `judge` returns the columns that it fills of each row."""

    axis: str
    ref: JudgeRef
    primary: str
    judge: JudgeRows

    @property
    def key(self) -> str:
        """Its name in the manifest, and of its file."""
        return f"{self.axis}{AT}{self.ref.name}"


def rescore(
    folder: str | Path,
    judge: str | Path | Mapping[str, Any],
    *settings: str,
    name: str | None = None,
    evals: Sequence[str] = (),
    quiet: bool = False,
    command: str = "",
) -> Results:
    """Add the rows of another judge to a finished run, and rebuild its report.

    `judge` is a name, a file with a judge as in a study file, or such a mapping; `settings` are its `key=value`. `name`
    is its name on the rows, by default the judge's own. `evals` are some of RESCORED_EVALS, by default all of
    JUDGED_EVALS that the run has. Raises LeewayError.
    """
    from leeway.report import build

    store, reporter = RunDir(Path(folder)), Reporter(quiet=quiet)
    spec = read_judge(judge, settings)
    command = command or f"rescore({str(folder)!r}, {judge!r})"
    with store.reopened():
        results = Results.load(store.folder)
        helpers = HelperModels(store.cache)
        found = [_rescoring(results, spec, name, axis, store, helpers) for axis in _axes(results, evals)]
        work = [r for r in found if isinstance(r, Rescoring)]
        if not work:
            raise LeewayError(str(found[0]), fix=RENAME.format(name or spec.name))
        for skipped in (r for r in found if isinstance(r, str)):
            reporter.log(f"{skipped}; skipped")
        store.cache.acquire(store.folder)
        manifest = store.read_manifest()
        with compute_settings(Settings(int(results.study.get("threads") or 1))), reporter:
            tables = _answers(store, results, work)
            reporter.clock.left["generate"] = sum(map(len, tables.values()))
            for one in work:
                _judge(store, one, tables[one.axis], reporter)
                manifest = _recorded(manifest, one, spec, command)
        store.add_rescored(manifest)
        store.cache.release(store.folder)
    build(store.folder)
    return Results.load(store.folder)


def read_judge(judge: str | Path | Mapping[str, Any], settings: Sequence[str] = ()) -> JudgeSpec:
    """Return the settings of a judge from its name, a YAML or JSON file or a mapping, with `key=value` overrides."""
    where, raw = "judge", judge
    if not isinstance(judge, Mapping):
        path = expand(judge)
        where, raw = f"judge {judge}", {"name": str(judge)}
        if path.suffix in (".yaml", ".yml", ".json"):
            if not path.is_file():
                raise LeewayError(f"--judge {judge}: no such file", fix="check that path, or give a judge's name")
            raw = read(read_utf8(path), str(path))
    if isinstance(raw, str):
        raw = {"name": raw}
    if not isinstance(raw, Mapping):
        raise LeewayError(f"{where}: not a judge", fix="give a mapping as in a study file, such as {name: keywords}")
    own = dict(raw)
    for setting in settings:
        apply_override(own, setting)
    try:
        return JudgeSpec.model_validate(own)
    except ValidationError as error:
        raise LeewayError(
            f"{where}: {'; '.join(faults(error, JudgeSpec))}", fix="see `judge` in a study file"
        ) from error


def _axes(results: Results, evals: Sequence[str]) -> list[str]:
    chosen = evals or [axis for axis in JUDGED_EVALS if axis in results.judges] or JUDGED_EVALS[:1]
    for axis in chosen:
        require_answers(results, axis, RESCORED_EVALS)
    return list(dict.fromkeys(chosen))


def _rescoring(
    results: Results, spec: JudgeSpec, name: str | None, axis: str, store: RunDir, helpers: HelperModels
) -> Rescoring | str:
    """Return what there is to judge on an eval, or why there is nothing.

    Raises LeewayError if another judge of that name scored it.
    """
    build = _alignment_judge if axis == "alignment" else _answer_judge
    own, judge_rows = build(results, spec, axis, helpers)
    if not ALIAS.fullmatch(name or own.name):
        what = f"judge {name or own.name!r}: not a name for rows and files"
        raise LeewayError(what, fix="give --as a name of lower-case letters, digits, . _ and -")
    one = Rescoring(axis, replace(own, name=name or own.name), results.judges[axis], judge_rows)
    judges, added = mapping(results.manifest.get("judges")), mapping(results.manifest.get("rescored"))
    known = mapping(judges.get(axis)) if one.ref.name == one.primary else mapping(judges.get(one.key))
    before = known.get("hash") or store.read_rescored(one.key)[0]
    if before and before != own.hash:
        what = f"{results.folder}: another judge {one.ref.name} scored {axis} (hash {before} there, {own.hash} now)"
        raise LeewayError(what, fix=RENAME.format(one.ref.name))
    if known and one.key not in added:
        return f"{results.folder}: judge {one.ref.name} ({own.hash}) scored {axis} in the run itself"
    return one


def _answer_judge(results: Results, spec: JudgeSpec, axis: str, helpers: HelperModels) -> tuple[JudgeRef, JudgeRows]:
    """Return a judge of answers to forbidden or benign prompts."""
    part = mapping(mapping(results.study.get("evals")).get(axis))
    if spec.name == "organism" and part.get("prompts") != "organism":
        what = f"judge organism judges only prompts of the organism; {axis} has {part.get('prompts')}"
        raise LeewayError(what, fix="use another judge")
    own = (build_judge if axis == "jailbreak" else build_benign_judge)(spec, helpers)
    note = f"{own.note} {NO_PERPLEXITY}" if part.get("perplexity") and spec.name != "organism" else own.note
    judge = _cached(own, helpers.cache)

    def judge_rows(rows: Sequence[Mapping[str, Any]]) -> list[Columns]:
        verdicts = judge.judge(
            [Answer(row["bare_prompt"], final_answer(row["response"])) for row in rows], lambda _: None
        )
        if axis == "overrefusal":
            return [verdict_columns(v) for v in verdicts]
        return [checked_verdict(v).columns() for v in verdicts]

    return JudgeRef(own.name, own.hash, note.strip()), judge_rows


def _alignment_judge(results: Results, spec: JudgeSpec, axis: str, helpers: HelperModels) -> tuple[JudgeRef, JudgeRows]:
    """Return a judge of free-form answers: a model under the alignment rubric, with the study's questions."""
    if spec.name != "rubric" or spec.model is None:
        raise LeewayError(f"judge {spec.name}: a model rates alignment", fix="use --judge rubric model.model=NAME")
    part = mapping(mapping(results.study.get("evals")).get(axis)) | {"judge_model": spec.model}
    try:
        alignment = build_alignment(AlignmentSpec.model_validate(part), {}, helpers)
    except ValidationError as error:
        what = f"--eval alignment: {'; '.join(faults(error, AlignmentSpec))}"
        raise LeewayError(what, fix="rescore other evals") from error
    questions = {item.id: (item, "\n".join(m["content"] for m in conversation(item))) for item in alignment.items}

    def judge_rows(rows: Sequence[Mapping[str, Any]]) -> list[Columns]:
        for row in rows:
            if questions.get(row["item_id"], ("", ""))[1] != row["prompt"]:
                what = f"the question {row['item_id']} is not the study's any more"
                raise LeewayError(what, fix="restore the questions that the study was run with")
        answers = [final_answer(row["response"]) for row in rows]
        rated = [k for k, answer in enumerate(answers) if answer.strip()]
        ratings = alignment.judge.rate([(questions[rows[k]["item_id"]][0], answers[k]) for k in rated])
        by_row = dict(zip(rated, ratings, strict=True))
        return [rating_columns(by_row.get(k)) for k in range(len(rows))]

    return JudgeRef(alignment.judge.name, alignment.judge.hash, alignment.judge.note), judge_rows


def _answers(store: RunDir, results: Results, work: Sequence[Rescoring]) -> dict[str, list[dict[str, Any]]]:
    """Return the primary judge's rows by eval, in the order of the tables, those of controls last."""
    paths = [p for p in (store.rows_path, store.controls_path) if p.is_file()]
    table = pa.concat_tables([pq.read_table(p, schema=ROW_SCHEMA).replace_schema_metadata() for p in paths])
    rows, found = table.to_pylist(), {}
    for one in work:
        found[one.axis] = [r for r in rows if (r["eval"], r["judge"]) == (one.axis, one.primary)]
        prompts = bare_prompts(found[one.axis], results.study, one.axis)
        for row in found[one.axis]:
            row["bare_prompt"] = prompts[row["item_id"]]
    return found


def _judge(store: RunDir, one: Rescoring, rows: Sequence[dict[str, Any]], reporter: Reporter) -> None:
    """Judge the answers of one eval and write the judge's rows; those of an earlier command are kept if they hold."""
    before = {
        tuple(row[c] for c in RESPONSE): row
        for row in store.read_rescored(one.key)[1].to_pylist()
        if not is_retryable(row["unscored_reason"])
    }
    records, todo = list[dict[str, Any]](), list[int]()
    for number, row in enumerate(rows):
        own = {c: row[c] for c in ROW_SCHEMA.names} | {"judge": one.ref.name}
        if kept := before.get(tuple(row[c] for c in RESPONSE)):
            own = kept
        elif has_no_answer(row):
            own |= {"outcome": None, "score": None, "judge_raw": ""}
        else:
            todo.append(number)
        records.append(own)
    done = len(rows) - len(todo)
    reporter.clock.left["generate"] -= done
    reporter.log(f"{one.ref.name}: {one.axis}: {len(todo):,} of {len(rows):,} answers to judge")
    for start in range(0, len(todo), BATCH):
        batch = todo[start : start + BATCH]
        began = time.monotonic()
        for k, filled in zip(batch, one.judge([rows[k] for k in batch]), strict=True):
            records[k] |= filled | {"score": None if math.isnan(filled["score"]) else filled["score"]}
        done += len(batch)
        seconds = time.monotonic() - began
        reporter.on_event(("generate", len(batch), seconds, f"{one.ref.name} | {one.axis} {done:,}/{len(rows):,}"))
    store.write_rescored(one.key, one.ref.hash, records)
    unscored = sum(r["score"] is None for r in records)
    reporter.log(f"{one.ref.name}: {one.axis}: {len(rows):,} answers, {unscored:,} unscored")


def _cached(judge: Judge, cache: Cache | None) -> Judge:
    """Return a judge whose verdicts are cached, unless they cost nothing or its model's replies are cached already."""
    if cache is None or judge.name in UNCACHED or hasattr(judge, "request"):
        return judge
    return CachedJudge(judge, cache.records("verdicts"), is_retryable)


def _recorded(manifest: dict[str, Any], one: Rescoring, spec: JudgeSpec, command: str) -> dict[str, Any]:
    """Return the manifest with the judge, and when, how and by which command it was added."""
    ref = {"name": one.ref.name, "hash": one.ref.hash, "note": one.ref.note}
    judges = mapping(manifest.get("judges")) | {one.key: ref}
    settings = spec.model_dump(mode="json", exclude_defaults=True)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    entry = {"command": command, "judge": settings, "added": now, "leeway": version("leeway")}
    added = {one.key: entry} | mapping(manifest.get("rescored"))  # a resumed command keeps its first entry
    return manifest | {"judges": judges, "rescored": added}
