"""Name the jobs that report nothing for a long time: a worker that hangs raises no error."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from leeway.study.jobs import Job

QUIET_S = 600.0  # far above the time between two reports: an optimiser step, a batch of answers, loading a model
CHECK_S = 5.0


@dataclass
class _Watched:
    place: str
    last: float  # time of its last report, by the monotonic clock
    patience: float = 0.0  # seconds of silence until it is named


@dataclass
class Watchdog:
    """Log one line for a job that has reported nothing for QUIET_S, and again whenever the silence has doubled."""

    log: Callable[[str], None] = lambda _: None
    _jobs: dict[Job, _Watched] = field(default_factory=dict)

    def report(self, job: Job, place: str) -> None:
        """Note that a job has started or progressed; `place` is where it runs, such as "process 123"."""
        self._jobs[job] = _Watched(place, time.monotonic(), QUIET_S)

    def end(self, job: Job) -> None:
        """Stop watching a job."""
        self._jobs.pop(job, None)

    def check(self) -> None:
        """Log the jobs that have been silent for too long."""
        for job, watched in list(self._jobs.items()):
            if (silence := time.monotonic() - watched.last) >= watched.patience:
                watched.patience = 2 * silence
                since = f"{silence / 60:.0f} min" if silence >= 60 else f"{silence:.0f} s"
                what = f"{job.name} ({watched.place}) has reported nothing for {since}; it may hang"
                self.log(f"{what}: if it uses no CPU or GPU, end it, then run the same command again to resume")

    @contextmanager
    def in_background(self) -> Iterator[None]:
        """Check from another thread, for a job that runs in this one."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(min(CHECK_S, QUIET_S)):
                self.check()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
