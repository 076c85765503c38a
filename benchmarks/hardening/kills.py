"""Kill runs and reports at random moments, and let runs race for one folder; the bytes in the end must be the same."""

from __future__ import annotations

import argparse
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.hardening.runs import (
    Fork,
    count_operations,
    differing,
    kill_at,
    note_in,
    preload,
    random_of,
    snapshot,
    torn,
    workers_of,
    write_study,
)
from benchmarks.hardening.table import Line

RULES = "checkpoint: {objective: sft}\nagainst: base\nrules: [{measure: accuracy, at_least: 0.01}]\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--n", type=int, default=200, help="kills of `run` in one process")
    parser.add_argument("--reports", type=int, default=40, help="kills of a report while it is written")
    parser.add_argument("--commands", type=int, default=10, help="kills of every other command")
    parser.add_argument("--workers", type=int, default=20, help="kills of a run with two workers")
    parser.add_argument("--ray", type=int, default=0, help="kills of a run on Ray")
    parser.add_argument("--races", type=int, default=20, help="races of three processes for one folder")


@dataclass
class Tally:
    """Attempts, and what went wrong."""

    tried: int = 0
    faults: list[str] = field(default_factory=list)

    def fault(self, what: str) -> None:
        self.faults.append(what)
        print(f"FAULT {what}", flush=True)

    def line(self, attempt: str, held: str) -> Line:
        return Line(attempt, self.tried, len(self.faults), "; ".join(sorted(set(self.faults))[:3]) or held)


@dataclass
class Bench:
    """The study, its uninterrupted run, its CPU time in seconds and its number of file operations."""

    folder: Path
    study: Path
    whole: Path
    seconds: float
    operations: int
    expected: dict[str, Any]

    @classmethod
    def build(cls, folder: Path) -> Bench:
        study, whole, counter = write_study(folder), folder / "whole", folder / "operations"
        hook = count_operations(whole, note_in(counter))
        fork = Fork(["run", str(study), "--out", str(whole), "--quiet", "--workers", "1"], folder / "whole.log", hook)
        if code := fork.start().wait():
            sys.exit(f"the uninterrupted run ended with {code}: {fork.output}")
        return cls(folder, study, whole, fork.cpu_seconds, int(counter.read_text()), snapshot(whole))

    def arguments(self, out: Path, workers: int = 1) -> list[str]:
        return ["run", str(self.study), "--out", str(out), "--quiet", "--workers", str(workers)]


def run(options: argparse.Namespace) -> list[Line]:
    preload(write_study(options.folder))
    bench = Bench.build(options.folder)
    print(f"uninterrupted: {bench.seconds:.1f} s of CPU, {bench.operations} file operations", flush=True)
    held = "the bytes of an uninterrupted run"
    lines = [
        _kill_runs(bench, options.n // 2, random_of(options, "time"), by_time=True).line(
            "`run`, one process: kill -9 at a random time, resumed", held
        ),
        _kill_runs(bench, options.n - options.n // 2, random_of(options, "file"), by_time=False).line(
            "`run`, one process: kill -9 before a random file operation, resumed", held
        ),
    ]
    if options.reports:
        lines.append(_kill_reports(bench, options.reports, random_of(options, "reports")))
    if options.commands:
        lines += _kill_commands(bench, options.commands, random_of(options, "commands"))
    lines.append(
        _race(bench, options.races, random_of(options, "races")).line(
            "three `run` at once for one folder, one of them killed", held
        )
    )
    for executor, n in (("local", options.workers), ("ray", options.ray)):
        if n:
            tally = _kill_processes(bench, n, random_of(options, executor), executor)
            lines.append(tally.line(f"`run`, two workers ({executor}): driver, worker or all killed, resumed", held))
    return lines


def _check(tally: Tally, code: int, output: str, found: Path, expected: dict[str, Any], what: str) -> None:
    """Count a fault if a command that was not killed failed, or its results differ."""
    if code != 0:
        tally.fault(f"{what}: exit {code}: {output.strip()[-300:]}")
    elif names := differing(snapshot(found), expected):
        tally.fault(f"{what}: {', '.join(names[:5])} differ")


def _kill_runs(bench: Bench, n: int, rng: random.Random, *, by_time: bool) -> Tally:
    """Kill a run again and again until it ends, then begin another one, up to `n` kills."""
    tally, chain = Tally(), 0
    while tally.tried < n:
        chain += 1
        out = bench.folder / f"{'time' if by_time else 'file'}-{chain}"
        for attempt in range(100):
            last = tally.tried >= n or attempt == 99
            operation = rng.randint(1, bench.operations // 3)
            hook = (lambda: None) if by_time or last else kill_at(out, operation)
            fork = Fork(bench.arguments(out), bench.folder / f"{out.name}.log", hook).start()
            code = fork.kill_after(rng.uniform(0.0, bench.seconds / 2)) if by_time and not last else fork.wait()
            if code != -signal.SIGKILL:
                break
            tally.tried += 1
            if found := torn(out):
                tally.fault(f"after a kill: {found[0]}")
        _check(tally, code, fork.output, out, bench.expected, "run")
        if not tally.faults:
            shutil.rmtree(out)
    return tally


def _commands(bench: Bench) -> Iterator[tuple[str, Callable[[Path], list[str]]]]:
    """Yield the commands that write into a finished run or next to it; what they leave must not depend on a kill."""
    rules = bench.folder / "rules.yaml"
    rules.write_text(RULES, "utf-8")
    yield "rescore", lambda run: ["rescore", str(run), "--judge", "keywords", "--quiet"]
    yield "gate", lambda run: ["gate", str(run), "--rule", str(rules)]
    yield "export --redacted", lambda run: ["export", str(run), "--redacted", "--out", str(run / "public")]
    yield "judge sheet", lambda run: ["judge", "sheet", str(run), "--n", "5"]
    yield "cache clear", lambda run: ["cache", "clear", str(run)]


def _kill_commands(bench: Bench, n: int, rng: random.Random) -> list[Line]:
    lines = []
    for name, arguments in _commands(bench):
        tally, counter, log = Tally(), bench.folder / "operations", bench.folder / f"{name.split()[0]}.log"
        base = bench.folder / "command"
        _copy(bench.whole, base)
        counter.write_text("0")
        fork = Fork(arguments(base), log, count_operations(base, note_in(counter))).start()
        if (code := fork.wait()) not in (0, 1, 3):
            tally.fault(f"{name}: exit {code}: {fork.output.strip()[-300:]}")
        expected, operations = snapshot(base), max(1, int(counter.read_text()))
        for _ in range(n):
            _copy(bench.whole, base)
            killed = Fork(arguments(base), log, kill_at(base, rng.randint(1, operations))).start().wait()
            tally.tried += killed == -signal.SIGKILL
            if found := torn(base):
                tally.fault(f"{name} after a kill: {found[0]}")
            again = Fork(arguments(base), log).start()
            end = again.wait()
            _check(tally, 0 if end == code else end or 99, again.output, base, expected, name)
        lines.append(tally.line(f"`{name}`: kill -9 before a random file operation, then again", "the same files"))
    return lines


def _copy(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, symlinks=True)


def _kill_reports(bench: Bench, n: int, rng: random.Random) -> Line:
    """Kill the writing of a report, over an older one or over none; the files are computed once."""
    from leeway.report import rebuild

    tally, made, base = Tally(), bench.folder / "report-files", bench.folder / "report"
    _copy(bench.whole, base)

    def keep() -> None:
        write, made_files = rebuild.replace_files, made

        def replace_files(folder: Path, files: Any) -> None:
            made_files.write_bytes(pickle.dumps(dict(files)))
            write(folder, files)

        rebuild.replace_files = replace_files

    fork = Fork(["report", str(base)], bench.folder / "report.log", keep, report=True).start()
    if code := fork.wait():
        tally.fault(f"report: exit {code}: {fork.output.strip()[-300:]}")
        return tally.line("`report`", "")
    new, counter = pickle.loads(made.read_bytes()), bench.folder / "operations"
    old = {name: content + (" " if isinstance(content, str) else b" ") for name, content in new.items()}
    older = {**old, "tables/gone.csv": "of an earlier version"}

    def write(files: dict[str, str | bytes], before: Callable[[], None] = lambda: None) -> int:
        fork = Fork(
            [], bench.folder / "report.log", lambda: (before(), rebuild.replace_files(base, files), os._exit(0))
        )  # type: ignore[func-returns-value]
        return fork.start().wait()

    for k in range(n):
        _copy(bench.whole, base)
        if k % 2:
            write(older)
        write(new, count_operations(base, note_in(counter)))
        expected = snapshot(base)
        _copy(bench.whole, base)
        if k % 2:
            write(older)
        killed = write(new, kill_at(base, rng.randint(1, int(counter.read_text()))))
        tally.tried += killed == -signal.SIGKILL
        if found := torn(base):
            tally.fault(f"report after a kill: {found[0]}")
        _check(tally, write(new), "", base, expected, "report")
    return tally.line("`report`: kill -9 before a random file operation, then again", "the same files")


def _race(bench: Bench, n: int, rng: random.Random) -> Tally:
    """Three processes start one study into one fresh folder; one is killed at a random time."""
    tally = Tally()
    for k in range(n):
        out = bench.folder / f"race-{k}"
        forks = [Fork(bench.arguments(out), bench.folder / f"race-{k}-{i}.log").start() for i in range(3)]
        victim = rng.randrange(3)
        codes = [
            fork.kill_after(rng.uniform(0.0, bench.seconds)) if i == victim else None for i, fork in enumerate(forks)
        ]
        codes = [fork.wait() if code is None else code for fork, code in zip(forks, codes, strict=True)]
        for fork, code in zip(forks, codes, strict=True):
            refused = code == 2 and "is in use by another leeway" in fork.output
            if not (code in (0, -signal.SIGKILL) or refused):
                tally.fault(f"race: exit {code}: {fork.output.strip()[-300:]}")
        end = Fork(bench.arguments(out), bench.folder / f"race-{k}.log").start()
        _check(tally, end.wait(), end.output, out, bench.expected, "race")
        tally.tried += 1
        shutil.rmtree(out, ignore_errors=True)
    return tally


def _kill_processes(bench: Bench, n: int, rng: random.Random, executor: str) -> Tally:
    """Kill the driver, one of its workers or its whole group, at a random time; resume until it ends."""
    tally, chain = Tally(), 0
    while tally.tried < n:
        chain += 1
        out = bench.folder / f"{executor}-{chain}"
        command = [sys.executable, "-m", "leeway", *bench.arguments(out, 2), "--executor", executor]
        for attempt in range(30):
            with (bench.folder / f"{out.name}.log").open("w+") as log:
                process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
                last = tally.tried >= n or attempt == 29
                killed = not last and _kill_one(process, rng, 4 * bench.seconds + 15)
                code = process.wait()
                log.seek(0)
                output = log.read()
            tally.tried += killed
            if code == 0:
                break
            if code == 2 and killed and "worker process was killed" in output:
                continue
            if code != -signal.SIGKILL:
                tally.fault(f"{executor}: exit {code}: {output.strip()[-300:]}")
            if found := torn(out):
                tally.fault(f"{executor} after a kill: {found[0]}")
        _check(tally, code, output, out, bench.expected, executor)
        if not tally.faults:
            shutil.rmtree(out)
    return tally


def _kill_one(process: subprocess.Popen[bytes], rng: random.Random, patience: float) -> bool:
    """Kill the driver, a worker or the group after a random time; return whether anything was still alive."""
    try:
        process.wait(rng.uniform(0.0, patience))
        return False
    except subprocess.TimeoutExpired:
        victim = rng.choice(["driver", "worker", "group"])
    if victim == "worker" and (workers := workers_of(process.pid)):
        os.kill(rng.choice(workers), signal.SIGKILL)
        return True
    os.killpg(process.pid, signal.SIGKILL) if victim == "group" else process.kill()
    return True
