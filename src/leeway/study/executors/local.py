"""Who carries the pieces out: this process, or worker processes on this machine. The bytes are the same either way."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from collections.abc import Sequence as Seq
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from leeway.errors import LeewayError
from leeway.io import open_lock
from leeway.study.jobs import Checkpoint, Job
from leeway.study.manifest import manifest
from leeway.study.prepare import PairSampling, Prepared, prepare
from leeway.study.progress import Kind
from leeway.study.run_dir import RunDir
from leeway.study.spec import Spec
from leeway.study.worker import Worker
from leeway.training.distributed import exit_with_parent

Event = tuple[Kind, float, float, str]  # kind of work, units, seconds, what
Listen = Callable[[Event], None]


class Executor(Protocol):
    """Who carries a study's pieces out."""

    def workers(self, prepared: Prepared, pieces: int) -> int:
        """How many at once."""

    def facts(self, work: Worker, command: str) -> dict[str, Any]:
        """The manifest of a run that begins."""

    def carry_out(self, work: Worker, pieces: Seq[Job], listen: Listen) -> Iterator[Job]:
        """Yield each piece once it is finished, none before what it waits for; the first failure ends the others."""


@dataclass(frozen=True)
class LocalExecutor:
    """This process, or worker processes beside it."""

    asked: int | None

    def workers(self, prepared: Prepared, pieces: int) -> int:
        return min(workers_for(prepared.spec, pieces, self.asked), pieces)

    def facts(self, work: Worker, command: str) -> dict[str, Any]:
        return manifest(work.prepared, work.base(), command)

    def carry_out(self, work: Worker, pieces: Seq[Job], listen: Listen) -> Iterator[Job]:
        return execute_in_process(work, pieces, self.workers(work.prepared, len(pieces)), listen)


def requires_single_worker(spec: Spec, asked: int | None) -> bool:
    """Whether somebody is asked under a budget, which each of several processes would have to itself.

    Raises LeewayError where several are asked for all the same.
    """
    limited = next((s for s in spec.evals.model_refs() if s.budgeted), None)
    if limited is not None and asked is not None and asked > 1:
        raise LeewayError(
            f"--workers {asked}: the budget of {limited.model} (max_calls, max_dollars) would be each worker's own",
            fix="leave --workers out, or the budget",
        )
    return limited is not None


def workers_for(spec: Spec, pieces: int, asked: int | None = None) -> int:
    """As many as are asked for; else one on a GPU, and on a CPU as many as its cores hold at the study's threads.

    One where somebody is asked under a budget. Raises LeewayError where more are asked for all the same.
    """
    import torch

    if requires_single_worker(spec, asked):
        return 1
    if asked is not None:
        return asked
    if spec.device.startswith("cuda") or (spec.device == "auto" and torch.cuda.is_available()):
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores // (spec.threads * spec.processes), pieces))


def execute_in_process(work: Worker, pieces: Seq[Job], workers: int, listen: Listen) -> Iterator[Job]:
    """Yield each piece once it is finished, none before what it waits for; the first failure ends the others.

    In this process it is done with the model that `work` has loaded, and gives away; worker processes load their own.
    """
    here, left = replace(work, tell=timed(listen)), list(pieces)
    work.release()
    if workers <= 1 or len(pieces) <= 1:
        while left:
            piece = next(p for p in left if p.begins(left, work.there))
            here.carry_out(piece)
            left.remove(piece)
            yield piece
    else:
        here.release()
        yield from _in_processes(work, pieces, min(workers, len(pieces)), listen)


def timed(listen: Listen) -> Callable[[Kind, float, str], None]:
    """Events with the seconds since the last one."""
    last = time.perf_counter()

    def tell(kind: Kind, units: float, what: str) -> None:
        nonlocal last
        now = time.perf_counter()
        listen((kind, units, now - last, what))
        last = now

    return tell


def _in_processes(work: Worker, pieces: Seq[Job], workers: int, listen: Listen) -> Iterator[Job]:
    context, spec = multiprocessing.get_context("spawn"), work.prepared.spec
    events: Any = context.Queue()
    begin = (os.getpid(), spec.model_dump(mode="json", by_alias=True), work.store.folder, events)
    pool = ProcessPoolExecutor(workers, context, _start_worker, begin)
    left, busy = list(pieces), dict[Future[None], Job]()
    try:
        while left:
            busy |= _submit(pool, ready(left, busy.values(), work.there)[: workers - len(busy)])
            done, _ = wait(busy, timeout=0.2, return_when=FIRST_COMPLETED)
            _drain(events, listen)
            for future in done:
                future.result()
                left.remove(busy[future])
                yield busy.pop(future)
    except BrokenProcessPool as error:
        raise LeewayError(
            "a worker process was killed, by the system for want of memory perhaps",
            fix="run the same command again, it carries on; with --workers 1 it needs less memory",
        ) from error
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.kill()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def ready(left: Seq[Job], busy: Collection[Job], there: Callable[[Checkpoint], bool]) -> list[Job]:
    """The pieces that nobody is at and that wait for nothing, the most urgent first."""
    return [p for p in left if p not in busy and p.begins(left, there)]


def _submit(pool: ProcessPoolExecutor, pieces: Seq[Job]) -> dict[Future[None], Job]:
    """Hand pieces out. Workers are born in here, and a Ctrl-C waits until each of them is known to the pool."""
    with _defer_sigint():
        return {pool.submit(_do, piece): piece for piece in pieces}


@contextmanager
def _defer_sigint() -> Iterator[None]:
    """Ctrl-C is heeded at the end. What is born in here has it blocked until it says otherwise.

    Blocking it does not keep it from us: another thread may take it, and Python still raises in this one. So it is
    also taken down in place of raised.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)  # runs the handler for what had to wait
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)
    if heard and before is not signal.SIG_IGN:
        raise KeyboardInterrupt


def _drain(events: Any, listen: Listen) -> None:
    while True:
        try:
            listen(events.get_nowait())
        except queue.Empty:
            return


_work: Worker | None = None  # one per worker process, set when it begins


def _start_worker(parent: int, raw_spec: dict[str, Any], folder: Path, events: Any) -> None:
    """Set a worker process up: it dies with its parent, and holds the folder for as long as it lives."""
    global _work  # noqa: PLW0603 - a pool's initialiser has no other place to put it
    exit_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    hold = open_lock(folder / ".workers")
    fcntl.flock(hold, fcntl.LOCK_SH)
    store = RunDir(folder)
    prepared = prepare(Spec.model_validate(raw_spec), PairSampling(store.pairs, kept=store.kept))
    _work = Worker(prepared, store, timed(events.put))
    _work.__dict__["_hold"] = hold


def _do(piece: Job) -> None:
    assert _work is not None
    _work.carry_out(piece)
