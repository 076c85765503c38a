"""Start the trackers of a run, each as a process (`follow`), and end them with it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from leeway.data.stream import BudgetStop
from leeway.errors import LeewayError
from leeway.integrations.trackers.run_files import RunFiles, StepLog, Target
from leeway.integrations.trackers.tracker import REDACTED_PAGE, TrackerConfig
from leeway.objectives.objective import PLAIN
from leeway.study.jobs import BASE, EvalTarget, Job, eval_targets, schedule_of
from leeway.study.sequential_eval import sequential_axes
from leeway.study.worker import Worker

START_S, FINISH_S, STOP_S = 120.0, 60.0, 10.0  # timeouts: for imports, after a finished run, after a failed run


def run_files(worker: Worker, jobs: Sequence[Job]) -> RunFiles:
    """Return the files that the jobs of a study write; controls are not tracked."""
    prepared, folder = worker.prepared, worker.store.folder.resolve()
    stops: dict[tuple[str, int, int], tuple[str, BudgetStop]] = {}
    for job in (job for job in jobs if job.kind == "train"):
        stops |= {(job.alias, job.seed, s.budget): (job.log_name, s) for s in schedule_of(prepared, job).stops}

    def target_of(target: EvalTarget) -> Target:
        objective, condition = target.objective, target.condition
        run, stop = stops.get((objective, target.seed, target.budget), (objective, None))
        known = prepared.objectives.get(objective)
        own_form = condition == (known.conditions[0] if known else PLAIN) or objective in prepared.external
        parts = tuple(str(worker.part(target, e).resolve()) for e in prepared.evals_of(condition, objective))
        at = (run, stop.step if stop else 0, objective, target.seed, target.budget, condition.name)
        return Target(*at, own_form or (condition == PLAIN and objective == BASE), parts)

    measured = [target_of(t) for job in jobs for t in eval_targets(prepared, job)]
    training = [job for job in jobs if job.kind == "train"]
    learned = [worker.store.learning(j.alias, j.seed, *j.budgets) for j in jobs if j.kind == "learning"]
    axes = () if prepared.external else sequential_axes(prepared.spec, prepared.evals)
    return RunFiles(
        name_of(worker),
        str(folder),
        tuple(StepLog(j.log_name, str(worker.store.steps(j.log_name).resolve())) for j in training),
        tuple(measured),
        tuple(str(path.resolve()) for path in learned),
        tuple(axes),
    )


def name_of(worker: Worker) -> str:
    """Return the study's name, or that of an audited checkpoint."""
    return next((alias for alias in worker.prepared.external if alias != BASE), worker.prepared.spec.name)


class TrackerProcess:
    """One tracker: its process, and the thread that prints what it reports."""

    def __init__(self, config: TrackerConfig, folder: Path, log: Callable[[str], None]) -> None:
        self.config, self._log = config, log
        self.log_path = folder / "trackers" / f"{config.name}.log"
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        self._ready, self._error, self._ended = threading.Event(), list[str](), False
        command = [sys.executable, "-m", "leeway.integrations.trackers.follow"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with self.log_path.open("ab") as stderr:
            # a session of its own: Ctrl-C ends the run, and the run ends the tracker
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                encoding="utf-8",
                env=environment,
                start_new_session=True,
            )
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        self.send(json.dumps(asdict(config)))

    def send(self, line: str) -> None:
        """Send a line. Errors are ignored: the listener reports a process that has ended."""
        assert self._process.stdin
        with contextlib.suppress(OSError, ValueError):
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def check(self) -> None:
        """Wait until the tracker is ready; raise LeewayError for a user error."""
        if not self._ready.wait(START_S):
            self._log(f"{self.config.name}: not ready after {START_S:.0f} s; the run continues")
        if self._error:
            what, fix = self._error
            raise LeewayError(what, fix=fix)

    def finish(self, command: str) -> None:
        """Send `finish` or `stop`, once."""
        if not self._ended:
            self._ended = True
            self.send(command)

    def end(self, command: str, timeout: float) -> None:
        """End the process with `finish` or `stop`; kill it if it takes longer than `timeout` seconds."""
        self.finish(command)
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            what = f"{self.config.name}: not done after {timeout:.0f} s"
            self._log(f"{what}; the same command sends what is missing")
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)  # with the processes that the library has started
        self._process.wait()
        self._listener.join(1.0)
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError, ValueError):
                assert stream
                stream.close()

    def _listen(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            message: dict[str, Any] = json.loads(line)
            if "log" in message:
                self._log(message["log"])
            self._error = message.get("error", self._error)
            if "ready" in message or "error" in message:
                self._ready.set()
        self._ready.set()
        if not self._ended and not self._error:
            code = self._process.wait()
            self._log(f"{self.config.name}: its process ended (exit code {code}); details in {self.log_path}")


class Trackers:
    """The trackers of one run, as a context: started before the data are read, ready before anything is trained."""

    def __init__(self, configs: Sequence[TrackerConfig], folder: Path, log: Callable[[str], None]) -> None:
        self._configs, self._folder, self._log = configs, folder, log
        self._processes: list[TrackerProcess] = []

    def __enter__(self) -> Trackers:
        self._processes = [TrackerProcess(config, self._folder, self._log) for config in self._configs]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        command, timeout = ("finish", FINISH_S) if kind is None else ("stop", STOP_S)
        for process in self._processes:
            process.finish(command)  # to all before waiting for one
        for process in self._processes:
            process.end(command, timeout)

    @property
    def redacted_page(self) -> Path | None:
        """The file for the page without forbidden prompts and the answers to them, if a tracker sends it."""
        return None if all(c.full_page for c in self._configs) else self._folder / REDACTED_PAGE

    def start(self, worker: Worker, jobs: Sequence[Job]) -> None:
        """Start sending the run; raises LeewayError for a user error, such as a missing key."""
        for process in self._processes:
            process.check()
        if self._processes:
            files = run_files(worker, jobs).to_json()
            for process in self._processes:
                process.send(files)
