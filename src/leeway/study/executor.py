"""Who carries the pieces out: this process, or worker processes on this machine. The bytes are the same either way."""

from __future__ import annotations

import ctypes
import fcntl
import multiprocessing
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from leeway.study.prepare import Prepared, prepare
from leeway.study.spec import Spec
from leeway.study.store import Store
from leeway.study.work import Kind, Piece, Work

Event = tuple[Kind, float, float, str]  # kind of work, units, seconds, what
Listen = Callable[[Event], None]


def workers_for(spec: Spec, pieces: int) -> int:
    """One on a GPU; on a CPU as many as its cores hold at the study's number of threads, and no more than pieces."""
    import torch

    if spec.device.startswith("cuda") or (spec.device == "auto" and torch.cuda.is_available()):
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores // spec.threads, pieces))


def carry_out(prepared: Prepared, store: Store, pieces: Seq[Piece], workers: int, listen: Listen) -> Iterator[Piece]:
    """Yield each piece once it is finished; the first failure is raised and ends the others."""
    if workers <= 1 or len(pieces) <= 1:
        work = Work(prepared, store, timed(listen))
        for piece in pieces:
            work.carry_out(piece)
            yield piece
    else:
        yield from _in_processes(prepared.spec, store.folder, pieces, min(workers, len(pieces)), listen)


def timed(listen: Listen) -> Callable[[Kind, float, str], None]:
    """Events with the seconds since the last one."""
    last = time.perf_counter()

    def tell(kind: Kind, units: float, what: str) -> None:
        nonlocal last
        now = time.perf_counter()
        listen((kind, units, now - last, what))
        last = now

    return tell


def _in_processes(spec: Spec, folder: Path, pieces: Seq[Piece], workers: int, listen: Listen) -> Iterator[Piece]:
    context = multiprocessing.get_context("spawn")
    events: Any = context.Queue()
    pool = ProcessPoolExecutor(workers, context, _begin, (spec.model_dump(mode="json", by_alias=True), folder, events))
    # workers begin with Ctrl-C blocked, and none can come between them and us while they are being born; it is let
    # through inside the same try, so that one which came meanwhile ends them too
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        waiting: dict[Future[None], Piece] = {pool.submit(_do, piece): piece for piece in pieces}
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        while waiting:
            done, _ = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
            _drain(events, listen)
            for future in done:
                future.result()
                yield waiting.pop(future)
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.kill()
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        pool.shutdown(wait=True, cancel_futures=True)


def _drain(events: Any, listen: Listen) -> None:
    while True:
        try:
            listen(events.get_nowait())
        except queue.Empty:
            return


_work: Work | None = None  # one per worker process, set when it begins


def _begin(raw_spec: dict[str, Any], folder: Path, events: Any) -> None:
    """Set a worker process up: it dies with its parent, and holds the folder for as long as it lives."""
    global _work  # noqa: PLW0603 - a pool's initialiser has no other place to put it
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    hold = (folder / ".workers").open("w")
    fcntl.flock(hold, fcntl.LOCK_SH)
    _work = Work(prepare(Spec.model_validate(raw_spec)), Store(folder), timed(events.put))
    _work.__dict__["_hold"] = hold


def _do(piece: Piece) -> None:
    assert _work is not None
    _work.carry_out(piece)


def _die_with_parent() -> None:
    """A killed run leaves no worker behind that would go on writing."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
