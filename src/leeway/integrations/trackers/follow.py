"""The process of one tracker: follow the files of a run and send what is new. Started by `process`.

Lines on stdin: the tracker's name and settings, then the run's files, then `finish` or `stop` (also the end of stdin).
Lines of JSON on stdout: `ready`, `error` for a user error, `log` for a line to print. The output of the tracker's
library goes to `trackers/<name>.log`.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import secrets
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from leeway.errors import LeewayError, first_line
from leeway.hashing import digest, file_digest
from leeway.integrations.trackers.run_files import (
    Key,
    RunFiles,
    learning_points,
    rate_points,
    results_of,
    training_points,
)
from leeway.integrations.trackers.tracker import (
    REDACTED_PAGE,
    Point,
    Status,
    TrackedStudy,
    Tracker,
    TrackerConfig,
)
from leeway.io import write_json
from leeway.report.results import Results
from leeway.yaml_config import load as load_yaml

INTERVAL_S = 2.0
MAX_WAIT_S = 60.0  # after failures
BATCH = 100  # points per call of a tracker
FILES = ("tables/rates.csv", "tables/ledger.csv", "results.json", "study.yaml")


@dataclass
class State:
    """What was sent, kept in `trackers/<name>.json` so that a later run of the same folder sends only the rest."""

    settings: dict[str, str]
    run: str = field(default_factory=lambda: secrets.token_hex(4))
    memory: dict[str, str] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)  # of each step log
    points: dict[str, str] = field(default_factory=dict)  # hash of the values by kind and checkpoint
    files: dict[str, str] = field(default_factory=dict)  # hash by name

    @classmethod
    def read(cls, path: Path, settings: dict[str, str]) -> State:
        """Return the state; a new one if there is none, or if the tracker had other settings (another project)."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            state = cls(**json.loads(path.read_text("utf-8")))
            if state.settings == settings:
                return state
        return cls(settings)


class CallFailed(Exception):
    """A call of the tracker failed; a later poll repeats it."""


@dataclass
class Follower:
    """Send a tracker the points and files of a run that were not sent yet."""

    tracker: Tracker
    config: TrackerConfig
    files: RunFiles
    log: Callable[[str], None]
    failures: int = 0
    last_failure: str = ""
    _opened: bool = False

    def __post_init__(self) -> None:
        self.folder = Path(self.files.folder) / "trackers"
        self.path = self.folder / f"{self.config.name}.json"
        self.state = State.read(self.path, self.config.settings)

    def poll(self) -> bool:
        """Send what is new; return whether every call succeeded."""
        try:
            self._send_steps()
            for target in self.files.targets:
                if self._is_new("rates", target.key) and all(map(os.path.exists, target.parts)):
                    self._send_points("rates", rate_points(results_of(self.files, [target]), [target]))
            for path in self.files.learning:
                if path not in self.state.points and os.path.exists(path):
                    found = results_of(self.files, (), [Path(path)])
                    self._send_points("learning", learning_points(found, self.files.targets))
                    self.state.points[path] = "sent"
        except CallFailed:
            return False
        return True

    def finish(self) -> bool:
        """Send what a finished run still misses or has changed, and the files; return whether every call succeeded."""
        try:
            self._send_steps()
            results, targets = Results.load(self.files.folder), self.files.targets
            self._send_points("rates", rate_points(results, targets))
            self._send_points("learning", learning_points(results, targets))
            self._send_files()
        except CallFailed:
            return False
        return True

    def close(self, status: Status) -> None:
        """End the tracker's runs and report what was not sent."""
        if self._opened:
            with contextlib.suppress(CallFailed):
                self._call(lambda: self.tracker.close(status))
        if self.failures:
            what = f"{self.config.name}: {self.failures} failed calls, the last: {self.last_failure}"
            self.log(f"{what}; the same command sends what is missing")

    def _send_steps(self) -> None:
        for log in self.files.logs:
            sent = self.state.steps.get(log.run, 0)
            points = training_points(Path(log.path), sent)
            for k in range(0, len(points), BATCH):
                batch = points[k : k + BATCH]
                self._log(log.run, batch)
                self.state.steps[log.run] = sent + k + len(batch)
                self._save()

    def _send_points(self, kind: str, found: Iterable[tuple[Key, str, Point]]) -> None:
        for key, run, point in found:
            name, values = self._name(kind, key), digest(point.values)
            if self.state.points.get(name) != values:
                self._log(run, [point])
                self.state.points[name] = values
                self._save()

    def _send_files(self) -> None:
        root = Path(self.files.folder)
        page = "report.html" if self.config.full_page else REDACTED_PAGE
        paths = [root / name for name in (page, *FILES) if (root / name).is_file()]
        hashes = {path.name: file_digest(path) for path in paths}
        if hashes != self.state.files:
            self._call(lambda: self.tracker.add_files(paths))
            self.state.files = hashes
            self._save()

    def _is_new(self, kind: str, key: Key) -> bool:
        return self._name(kind, key) not in self.state.points

    @staticmethod
    def _name(kind: str, key: Key) -> str:
        return " ".join([kind, *map(str, key)])

    def _log(self, run: str, points: Sequence[Point]) -> None:
        self._call(lambda: self.tracker.log(run, points))

    def _call(self, call: Callable[[], None]) -> None:
        try:
            if not self._opened:
                self.tracker.open(self._study())
                self._opened = True
            call()
        except Exception as error:  # no failure of a tracker may end the run
            traceback.print_exc()
            self.last_failure = f"{type(error).__name__}: {first_line(error)[:200]}"
            if not self.failures:
                what = f"{self.config.name}: not sent ({self.last_failure}); the run continues and sending is retried"
                self.log(f"{what}; details in {self.folder / self.config.name}.log")
            self.failures += 1
            raise CallFailed from error

    def _study(self) -> TrackedStudy:
        text = (Path(self.files.folder) / "study.yaml").read_text("utf-8")
        config = load_yaml(re.sub(r"://[^/\s@]+@", "://", text))  # without a user name or password in an address
        return TrackedStudy(self.files.study, self.state.run, self.folder, config, self.state.memory)

    def _save(self) -> None:
        write_json(self.path, asdict(self.state))


def follow(follower: Follower, commands: queue.Queue[str], interval: float = INTERVAL_S) -> None:
    """Poll until a command comes, less often after failures; then send the rest."""
    command, wait = "", interval
    while not command:
        wait = interval if follower.poll() else min(2 * wait, MAX_WAIT_S)
        with contextlib.suppress(queue.Empty):
            command = commands.get(timeout=wait)
    done = follower.finish() if command == "finish" else follower.poll()
    follower.close("finished" if done and command == "finish" else "stopped")


def main() -> None:
    """Run one tracker until `finish`, `stop` or the end of stdin."""
    protocol = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # the libraries print into the log

    def write(**message: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # the run was killed
            print(json.dumps(message), file=protocol, flush=True)

    commands: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_read, args=(commands,), daemon=True).start()
    raw = json.loads(commands.get())
    config = TrackerConfig(**raw)
    try:
        tracker = config.load()
        tracker.check()
    except LeewayError as error:
        write(error=[error.what, error.fix])
        return
    write(ready=True)
    text = commands.get()
    if text in ("finish", "stop"):
        return
    follow(Follower(tracker, config, RunFiles.from_json(text), lambda line: write(log=line)), commands)


def _read(commands: queue.Queue[str]) -> None:
    for line in sys.stdin:
        commands.put(line.rstrip("\n"))
    commands.put("stop")


if __name__ == "__main__":
    main()
