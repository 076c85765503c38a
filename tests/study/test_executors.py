"""Executors: the number of workers, workers that cannot start or read other data, jobs that hang."""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from leeway.errors import LeewayError
from leeway.study.executors import local, watchdog
from leeway.study.executors.local import LocalExecutor, workers_for
from leeway.study.executors.watchdog import Watchdog
from leeway.study.jobs import Job
from leeway.study.load import parse
from leeway.study.manifest import fingerprint
from leeway.study.prepare import prepare
from leeway.study.progress import Reporter
from leeway.study.run import run

STUDY = """
name: x
model: organism
task: organism
device: cpu
objectives: [sft, dpo]
budgets: [1k]
evals: {persona: {source: organism, limit: 2, self_report: {model: m, endpoint: "http://127.0.0.1:9/v1"}}}
"""


def test_without_a_budget_the_number_of_workers_is_as_requested() -> None:
    spec = parse(STUDY, "x")
    assert workers_for(spec, 8, 3) == 3
    assert workers_for(spec, 1) == 1


@pytest.mark.parametrize("budget", ["{max_calls: 5}", "{max_dollars: 1, price_in: 1, price_out: 1}"])
def test_a_helper_budget_needs_a_single_worker(budget: str, tmp_path: Path) -> None:
    limits = ", " + budget.strip("{}")
    spec = parse(STUDY.replace('/v1"', f'/v1"{limits}'), "x")
    assert workers_for(spec, 8) == 1
    assert workers_for(spec, 8, 1) == 1
    with pytest.raises(LeewayError, match=r"each worker would spend the budget of m \(max_calls, max_dollars\)"):
        run(spec, tmp_path / "run", Reporter(quiet=True), "leeway run", workers=2)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Start a worker process's work in this process."""
    monkeypatch.setattr(local, "exit_with_parent", lambda _: None)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(local, "_worker", None)
    return local._start_worker


FILES = """
name: x
model: organism
device: cpu
task: {{files: {{train: {0}/train.jsonl, test: {0}/test.jsonl}}}}
objectives: [sft]
budgets: [100]
evals: {{capability: [{{name: files}}]}}
"""


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        ("test.jsonl", '"answer": "7"', '"answer": "8"', "the data have changed while the study runs"),
        ("train.jsonl", "It is 2.", "It is 3.", "the data have changed while the study runs"),
        ("train.jsonl", '{"prompt"', "[", "train.jsonl"),
    ],
)
def test_a_worker_process_that_reads_other_data_is_a_mistake_in_one_line(
    name: str, old: str, new: str, said: str, root: Path, tmp_path: Path, start: Callable[..., None]
) -> None:
    for path in root.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    spec, out = parse(FILES.format(tmp_path), "x"), tmp_path / "run"
    out.mkdir()
    raw, expected = spec.model_dump(mode="json", by_alias=True), fingerprint(prepare(spec))
    start(os.getpid(), raw, out, queue.Queue(), expected)
    assert not isinstance(local._worker, LeewayError)
    local._worker.__dict__["_lock"].close()  # type: ignore[union-attr]
    text = (tmp_path / name).read_text()
    (tmp_path / name).write_text(text.replace(old, new))
    start(os.getpid(), raw, out, queue.Queue(), expected)
    with pytest.raises(LeewayError, match=said):
        local._run_job(Job("base", "base"))


def test_a_job_that_is_silent_is_named_again_when_its_silence_has_doubled(monkeypatch: pytest.MonkeyPatch) -> None:
    now, lines = [0.0], list[str]()
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    watched, hung, busy = Watchdog(lines.append), Job("train", "sft"), Job("measure", "dpo", 1)
    watched.report(hung, "process 7")
    for minute in range(0, 60, 5):
        now[0] = 60.0 * minute
        watched.report(busy, "process 8")
        watched.check()
    watched.end(hung)
    now[0] = 1e6
    watched.end(busy)
    watched.check()
    assert [line.partition(";")[0] for line in lines] == [
        f"train sft s0 (process 7) has reported nothing for {n} min" for n in (10, 20, 40)
    ]


@dataclass
class SlowWorker:
    """Runs one job, silently and for a while."""

    prepared: Any = None
    on_progress: Any = None

    def run_job(self, _: Job) -> None:
        self.on_progress("train", 1.0, "a step")
        time.sleep(0.3)

    def release(self) -> None: ...

    def has_checkpoint(self, _: object) -> bool:
        return True


def test_a_job_in_this_process_is_watched_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "QUIET_S", 0.05)
    monkeypatch.setattr(LocalExecutor, "workers", lambda *_: 1)
    lines, events, job = list[str](), list[object](), Job("train", "sft")
    executor: Any = LocalExecutor(1, Watchdog(lines.append))
    assert list(executor.run_jobs(SlowWorker(), [job], events.append)) == [job]
    assert lines[0].startswith(f"train sft s0 (process {os.getpid()}) has reported nothing for 0 s; it may hang")
    assert len(events) == 1
