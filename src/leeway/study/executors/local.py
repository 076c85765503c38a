"""Run the jobs of a study in this process or in worker processes on this machine. The bytes are the same."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from leeway.errors import LeewayError
from leeway.io import open_lock
from leeway.study.executors.watchdog import Watchdog
from leeway.study.jobs import Checkpoint, Job
from leeway.study.manifest import check_fingerprint, fingerprint, manifest
from leeway.study.prepare import PairSampling, Prepared, prepare
from leeway.study.progress import Event, Kind, OnProgress, Update
from leeway.study.run_dir import RunDir
from leeway.study.spec import Spec
from leeway.study.worker import Worker
from leeway.training.distributed import exit_with_parent

OnEvent = Callable[[Event], None]


class Executor(Protocol):
    """Runs the jobs of a study."""

    def workers(self, prepared: Prepared, jobs: int) -> int:
        """Return how many workers run so many jobs."""

    def manifest(self, worker: Worker, command: str) -> dict[str, Any]:
        """Return the manifest of a new run."""

    def run_jobs(self, worker: Worker, jobs: Sequence[Job], on_event: OnEvent) -> Iterator[Job]:
        """Yield jobs as they complete, in dependency order. The first failure cancels the rest."""


@dataclass(frozen=True)
class LocalExecutor:
    """This process, or `n_workers` worker processes; None for as many as `workers_for` returns."""

    n_workers: int | None
    watchdog: Watchdog = field(default_factory=Watchdog)

    def workers(self, prepared: Prepared, jobs: int) -> int:
        return min(workers_for(prepared.spec, jobs, self.n_workers), jobs)

    def manifest(self, worker: Worker, command: str) -> dict[str, Any]:
        return manifest(worker.prepared, worker.base(), command)

    def run_jobs(self, worker: Worker, jobs: Sequence[Job], on_event: OnEvent) -> Iterator[Job]:
        workers, left = self.workers(worker.prepared, len(jobs)), list(jobs)
        if workers > 1:
            worker.release()  # worker processes load their own model
            yield from _run_in_processes(worker, jobs, workers, on_event, self.watchdog)
            return
        running, place = list[Job](), f"process {os.getpid()}"

        def on_own_event(event: Event) -> None:
            self.watchdog.report(running[-1], place)
            on_event(event)

        here = replace(worker, on_progress=timed(on_own_event))
        worker.release()  # `here` alone holds the base model, so it can free it for a server or ranks
        while left:
            job = next(job for job in left if job.is_ready(left, here.has_checkpoint))
            running.append(job)
            self.watchdog.report(job, place)
            with self.watchdog.in_background():
                here.run_job(job)
            self.watchdog.end(job)
            left.remove(job)
            yield job


def requires_single_worker(spec: Spec, n_workers: int | None) -> bool:
    """Return whether a helper model has a call or dollar budget, which each of several processes would spend.

    Raises LeewayError if more than one worker is requested for such a study.
    """
    limited = next((ref for ref in spec.evals.model_refs() if (ref.max_calls, ref.max_dollars) != (None, None)), None)
    if limited is not None and n_workers is not None and n_workers > 1:
        what = f"--workers {n_workers}: each worker would spend the budget of {limited.model} (max_calls, max_dollars)"
        raise LeewayError(what, fix="leave --workers out, or the budget")
    return limited is not None


def workers_for(spec: Spec, jobs: int, n_workers: int | None = None) -> int:
    """Return `n_workers`; by default one on a GPU, and on a CPU as many as fit its cores at the study's threads."""
    import torch

    if requires_single_worker(spec, n_workers):
        return 1
    if n_workers is not None:
        return n_workers
    if spec.device.startswith("cuda") or (spec.device == "auto" and torch.cuda.is_available()):
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores // (spec.threads * spec.processes), jobs))


def ready(left: Sequence[Job], running: Collection[Job], has_checkpoint: Callable[[Checkpoint], bool]) -> list[Job]:
    """Return the jobs that can start, in order of priority."""
    return [job for job in left if job not in running and job.is_ready(left, has_checkpoint)]


def timed(on_event: OnEvent) -> OnProgress:
    """Return a progress callback that adds the seconds since the last event."""
    last = time.perf_counter()

    def on_progress(kind: Kind, units: float, what: Update) -> None:
        nonlocal last
        now = time.perf_counter()
        on_event((kind, units, now - last, what))
        last = now

    return on_progress


def _run_in_processes(
    worker: Worker, jobs: Sequence[Job], workers: int, on_event: OnEvent, watchdog: Watchdog
) -> Iterator[Job]:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read as a worker loads torch; see `leeway.cli.main`
    context, spec = multiprocessing.get_context("spawn"), worker.prepared.spec
    events: Any = context.Queue()
    raw = spec.model_dump(mode="json", by_alias=True)
    arguments = (os.getpid(), raw, worker.store.folder, events, fingerprint(worker.prepared))
    pool = ProcessPoolExecutor(workers, context, _start_worker, arguments)
    left, running = list(jobs), dict[Future[None], Job]()
    try:
        while left:
            free = workers - len(running)
            with _defer_sigint():  # processes start in here: Ctrl-C waits until the pool knows each of them
                starting = ready(left, running.values(), worker.has_checkpoint)[:free]
                running |= {pool.submit(_run_job, job): job for job in starting}
            done, _ = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
            while not events.empty():
                job, process, event = events.get()
                if job in running.values():  # else it has ended since
                    watchdog.report(job, f"process {process}")
                if event is not None:
                    on_event(event)
            for future in done:
                future.result()
                left.remove(running[future])
                watchdog.end(running[future])
                yield running.pop(future)
            watchdog.check()
    except BrokenProcessPool as error:
        fix = "run the same command again to resume; with --workers 1 it needs less memory"
        raise LeewayError("a worker process was killed (probably out of memory)", fix=fix) from error
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.kill()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _defer_sigint() -> Iterator[None]:
    """Raise KeyboardInterrupt only at the end. Processes that start in here have SIGINT blocked.

    Blocking alone is not enough: another thread may take the signal, and Python raises in the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: received.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)  # runs the handler for a pending signal
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)
    if received and before is not signal.SIG_IGN:
        raise KeyboardInterrupt


_worker: Worker | LeewayError | None = None  # of a worker process; why it cannot work
_job: Job | None = None  # that it runs


def _start_worker(parent: int, raw_spec: dict[str, Any], folder: Path, events: Any, expected: str) -> None:
    """Initialise a worker process: it dies with its parent and locks the run directory while it lives."""
    global _worker  # noqa: PLW0603 - a pool's initialiser has no other place to put it
    exit_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    lock = open_lock(folder / ".workers")
    fcntl.flock(lock, fcntl.LOCK_SH)
    store = RunDir(folder)
    try:
        prepared = prepare(Spec.model_validate(raw_spec), PairSampling(store.cache))
        check_fingerprint(prepared, expected, "this worker process")
    except LeewayError as error:  # an exception in here would end the pool as if the process had been killed
        _worker = error
        lock.close()
        return
    _worker = Worker(prepared, store, timed(lambda event: events.put((_job, os.getpid(), event))))
    _worker.__dict__.update(_lock=lock, _events=events)  # the lock is open for as long as the process lives


def _run_job(job: Job) -> None:
    global _job  # noqa: PLW0603 - the events of this process name it
    assert _worker is not None
    if isinstance(_worker, LeewayError):
        raise _worker
    _job = job
    _worker.__dict__["_events"].put((job, os.getpid(), None))
    _worker.run_job(job)
