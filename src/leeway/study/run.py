"""Carry a study out: base and trajectories, every checkpoint measured, rows, ledger, report; finished work is kept.

A study from Python: load it, run it, read what came out.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from leeway.data.ledger import check_matched
from leeway.errors import LeewayError
from leeway.io import remove_partial
from leeway.model.reference_cache import ReferenceCache
from leeway.report.results import Results
from leeway.study import lr_sweep, sequential_eval, worker
from leeway.study.executors.local import Executor, LocalExecutor, requires_single_worker
from leeway.study.jobs import Job, eval_targets, jobs_of, relative_cost, schedule_of
from leeway.study.load import load
from leeway.study.manifest import check_unchanged, matching
from leeway.study.prepare import PairSampling, Prepared, prepare
from leeway.study.progress import Reporter
from leeway.study.run_dir import RunDir
from leeway.study.spec import Spec
from leeway.study.worker import Worker
from leeway.training import checkpoints
from leeway.training.distributed import check

NEEDED_DISK = 64 << 20  # bytes


def run(
    spec: Spec,
    out: Path,
    reporter: Reporter,
    command: str,
    workers: int | None = None,
    executor: Literal["local", "ray"] = "local",
) -> Path:
    """Run `spec` into `out`, going on where an earlier run stopped; returns the report's path."""
    from leeway.report import build

    requires_single_worker(spec, workers)  # a number of workers that cannot be is refused before anything is written
    if executor == "local":
        check(spec.processes, spec.device)
    store = RunDir(out)
    with store.claimed(spec.hash, spec.to_yaml()), _executor(executor, workers, reporter) as hands:
        _check_disk(out)
        for line in spec.resolved_defaults:
            reporter.say(f"{spec.name}: auto: {line}")
        reporter.say(f"{spec.name}: reading the data")
        drawing = PairSampling(store.pairs, True, _drawing_teller(spec, reporter), store.kept)
        prepared = prepare(spec, drawing)
        work = Worker(prepared, store, lambda *_: None)
        pieces = jobs_of(prepared)
        _count_work(work, pieces, reporter)
        facts = store.read_manifest()
        if facts:
            check_unchanged(prepared, facts, out)
        else:
            facts = hands.facts(work, command)
            store.write_manifest(facts)
        busy = [p for p in pieces if work.unfinished(p)]
        reporter.workers = hands.workers(prepared, len(busy)) if busy else 1
        with reporter:
            lines = [line for p in pieces if p not in busy for line in work.ledger(p, checkpoints.verified_ledger)]
            check_matched(lines, matching(prepared))
            for done, piece in enumerate(hands.carry_out(work, busy, reporter.heard), 1):
                reporter.workers = min(reporter.workers, max(1, len(busy) - done))
                lines += work.ledger(piece)
                check_matched(lines, matching(prepared))
        remove_partial(store.folder)  # of a worker that was lost, where others went on
        rows = _collect(work, pieces, facts)
        worker.forget(store.answers)
        reporter.say(f"{spec.name}: {rows:,} rows; drawing the report")
        return build(out)


@contextmanager
def _executor(name: Literal["local", "ray"], workers: int | None, reporter: Reporter) -> Iterator[Executor]:
    if name == "local":
        yield LocalExecutor(workers)
        return
    from leeway.study.executors.ray import RayExecutor

    with RayExecutor(workers, reporter.say) as cluster:
        yield cluster


def _drawing_teller(spec: Spec, reporter: Reporter) -> Callable[[int], None]:
    """A line for every thousand answers that the base model was asked for."""
    asked = 0

    def tell(n: int) -> None:
        nonlocal asked
        if (asked + n) // 1000 > asked // 1000 or asked == 0:
            reporter.say(f"{spec.name}: {asked + n:,} answers of the base model drawn for {spec.pairs.from_}")
        asked += n

    return tell


def _collect(work: Worker, pieces: list[Job], facts: dict[str, Any]) -> int:
    """Put ledger and rows together from what the pieces left; returns the number of rows."""
    lines = [line for piece in pieces for line in work.ledger(piece)]
    check_matched(lines, matching(work.prepared))
    parts = {
        work.part(who, e): who.condition.name
        for piece in pieces
        for who in eval_targets(work.prepared, piece)
        for e in work.prepared.evals
    }
    work.store.write_ledger(lines)
    rows = work.store.write_rows(list(parts))
    chosen = {p.alias: lr_sweep.read(work.store.tuning(p.alias)).to_json() for p in pieces if p.kind == "tune"}
    conditions, known = work.store.conditions(parts), sequential_eval.facts(work.prepared.spec, work.prepared.evals)
    asked = sequential_eval.summary(pd.read_parquet(work.store.rows_path), conditions, known) if known else {}
    found: dict[str, Any] = {"conditions": conditions, "tuning": chosen, "file_hashes": work.store.file_hashes()}
    if work.store.references.is_dir():
        sequences, tokens, size = ReferenceCache(work.store.references).size()
        found["references"] = {"sequences": sequences, "tokens": tokens, "bytes": size}
    first = {alias: objective.conditions[0].name for alias, objective in work.prepared.objectives.items()}
    work.store.write_manifest({**facts, **found, **asked, "first_conditions": first})
    return rows


def _count_work(work: Worker, pieces: list[Job], reporter: Reporter) -> None:
    """Tell the clock what is left to do, so that it can say for how long."""
    tune = work.prepared.spec.optim.tune
    for piece in pieces:
        for who in eval_targets(work.prepared, piece):
            for e in work.pending(who):
                reporter.clock.add(e.work, len(e))
        if piece.kind == "train":
            reporter.clock.add("train", _tokens_left(work.prepared, work.store, piece))
        elif piece.kind == "tune" and work.unfinished(piece):
            cost = relative_cost(work.prepared.objectives[piece.alias])
            reporter.clock.add("train", len(tune.lrs) * tune.budget * cost)
            reporter.clock.add("generate", len(tune.lrs) * tune.items)


def _tokens_left(prepared: Prepared, store: RunDir, piece: Job) -> float:
    marks = schedule_of(prepared, piece).marks
    done = [m for m in marks if checkpoints.finished(store.checkpoint(piece.alias, piece.seed, m.budget))]
    left = marks[-1].source_tokens - (done[-1].source_tokens if done else 0)
    return left * relative_cost(prepared.objectives[piece.alias])


def _check_disk(out: Path) -> None:
    free = shutil.disk_usage(out).free
    if free < NEEDED_DISK:
        raise LeewayError(
            f"{out}: no disk space ({free >> 20} MiB left, {NEEDED_DISK >> 20} MiB needed)",
            fix="free some, or give another --out",
        )


@dataclass(frozen=True)
class Study:
    """A checked study file."""

    spec: Spec

    @classmethod
    def load(cls, path: str | Path, *overrides: str) -> Study:
        """From a file or a preset's name, with `key=value` overrides; raises LeewayError with all faults at once."""
        return cls(load(str(path), overrides))

    def run(
        self,
        out: str | Path,
        *,
        quiet: bool = False,
        workers: int | None = 1,
        executor: Literal["local", "ray"] = "local",
    ) -> Results:
        """Run into `out`, going on where one stopped; several workers or `processes` need a `__main__` guard.

        With `executor="ray"` workers are those of a Ray cluster; `workers=None` is as many as there is room for.
        """
        command = f"Study.load({self.spec.name!r}).run({str(out)!r})"
        run(self.spec, Path(out), Reporter(quiet=quiet), command, workers, executor)
        return Results.load(Path(out))
