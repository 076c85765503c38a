"""Carry a study out: base and trajectories, every checkpoint measured, rows, ledger, report; finished work is kept."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from leeway.data.ledger import check_matched
from leeway.errors import LeewayError
from leeway.objectives import Objective
from leeway.study.executor import carry_out, workers_for
from leeway.study.manifest import check_unchanged, manifest
from leeway.study.prepare import Prepared, prepare
from leeway.study.progress import Reporter
from leeway.study.spec import Spec
from leeway.study.store import Store
from leeway.study.work import BASE, Piece, Work, kind_of
from leeway.training import checkpoints
from leeway.training.trajectory import check_line

Read = Callable[[Path], dict[str, Any]]
NEEDED_DISK = 64 << 20  # bytes


def run(spec: Spec, out: Path, reporter: Reporter, command: str, workers: int | None = None) -> Path:
    """Run `spec` into `out`, going on where an earlier run stopped; returns the report's path."""
    from leeway.report import build

    store = Store(out)
    reporter.say(f"{spec.name}: reading the data")
    prepared = prepare(spec)
    with store.claimed(spec.hash, spec.to_yaml()):
        _check_disk(out)
        work = Work(prepared, store, lambda *_: None)
        pieces = _pieces(work)
        _count_work(work, pieces, reporter)
        facts = store.read_manifest()
        if facts:
            check_unchanged(prepared, facts, out)
        else:
            facts = manifest(prepared, work.base(), command)
            store.write_manifest(facts)
        busy = [p for p in pieces if _unfinished(work, p)]
        reporter.workers = min(workers or workers_for(spec, len(pieces)), max(1, len(busy)))
        with reporter:
            finished = [p for p in pieces if p not in busy]
            check_matched(_lines(work, finished, checkpoints.verified_ledger))
            for piece in carry_out(prepared, store, busy, reporter.workers, reporter.heard):
                finished.append(piece)
                check_matched(_lines(work, finished))
        rows = _collect(work, pieces, facts)
        reporter.say(f"{spec.name}: {rows:,} rows; drawing the report")
        return build(out)


def _pieces(work: Work) -> list[Piece]:
    """The base and every trajectory, the most work first, so that no worker ends long after the others."""
    prepared = work.prepared
    trajectories = [Piece(alias, seed) for seed in prepared.spec.seeds for alias in prepared.objectives]
    trajectories.sort(key=lambda p: -relative_cost(prepared.objectives[p.alias]))
    return [Piece(BASE, 0), *trajectories]


def _unfinished(work: Work, piece: Piece) -> bool:
    return any(
        work.pending(who)
        or (
            piece.alias != BASE and not checkpoints.finished(work.store.checkpoint(who.objective, who.seed, who.budget))
        )
        for who in work.whos(piece)
    )


def _lines(work: Work, pieces: list[Piece], read: Read = checkpoints.read_ledger) -> list[dict[str, Any]]:
    """The ledger lines of finished trajectories, held against what this study's data give."""
    lines = []
    for piece in pieces:
        for who in work.whos(piece) if piece.alias != BASE else []:
            folder = work.store.checkpoint(who.objective, who.seed, who.budget)
            mark = next(m for m in work.prepared.schedules[piece.alias, piece.seed].marks if m.budget == who.budget)
            lines.append(read(folder))
            check_line(lines[-1], mark, folder)
    return lines


def _collect(work: Work, pieces: list[Piece], facts: dict[str, Any]) -> int:
    """Put ledger and rows together from what the pieces left; returns the number of rows."""
    lines = _lines(work, pieces)
    check_matched(lines)
    parts = {work.part(who, e): who.condition.name for p in pieces for who in work.whos(p) for e in work.prepared.evals}
    work.store.write_ledger(lines)
    rows = work.store.write_rows(list(parts))
    work.store.write_manifest({**facts, "conditions": work.store.conditions(parts)})
    return rows


def _count_work(work: Work, pieces: list[Piece], reporter: Reporter) -> None:
    """Tell the clock what is left to do, so that it can say for how long."""
    for piece in pieces:
        for who in work.whos(piece):
            for e in work.pending(who):
                reporter.clock.add(kind_of(e), len(e))
        if piece.alias != BASE:
            reporter.clock.add("train", _tokens_left(work.prepared, work.store, piece))


def _tokens_left(prepared: Prepared, store: Store, piece: Piece) -> float:
    marks = prepared.schedules[piece.alias, piece.seed].marks
    done = [m for m in marks if checkpoints.finished(store.checkpoint(piece.alias, piece.seed, m.budget))]
    left = marks[-1].source_tokens - (done[-1].source_tokens if done else 0)
    return left * relative_cost(prepared.objectives[piece.alias])


def relative_cost(objective: Objective) -> float:
    """Training work per source token: a pair is two sequences, a reference pass about half of one."""
    sequences = 2.0 if objective.needs_pairs else 1.0
    return sequences * (1.0 if objective.needs_reference == "nothing" else 1.5)


def _check_disk(out: Path) -> None:
    free = shutil.disk_usage(out).free
    if free < NEEDED_DISK:
        raise LeewayError(
            f"{out}: no disk space ({free >> 20} MiB left, {NEEDED_DISK >> 20} MiB needed)",
            fix="free some, or give another --out",
        )
