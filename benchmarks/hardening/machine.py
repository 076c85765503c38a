"""Faults of the machine: disk, memory, clock, signals, file descriptors, weights and data that change or are broken."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.hardening.kills import Bench, Tally
from benchmarks.hardening.runs import (
    STUDY,
    Fork,
    count_operations,
    differing,
    kill_at,
    random_of,
    snapshot,
    torn,
    workers_of,
    write_study,
)
from benchmarks.hardening.table import Line


@dataclass
class Attempt:
    """One fault, tried several times: `n` moments of a run where the moment matters."""

    bench: Bench
    rng: random.Random
    n: int
    tally: Tally = field(default_factory=Tally)

    def points(self) -> list[int]:
        """Return the numbers of random file operations."""
        operations = self.bench.operations
        return sorted(self.rng.sample(range(1, operations), min(self.n, operations - 1)))

    def one_line(self, what: str, code: int, output: str, codes: tuple[int, ...] = (2,)) -> None:
        """Count a fault unless a command ended with one line and one of these exit codes."""
        lines = output.strip().splitlines()
        if code not in codes or len(lines) != (code != 0) or "internal error" in output:
            self.tally.fault(f"{what}: exit {code}, {len(lines)} lines: {output.strip()[-300:]}")

    def resumes(self, what: str, out: Path) -> None:
        """Count a fault unless the mended run ends with the bytes of an uninterrupted one; remove its folder."""
        if out.exists() and (found := torn(out)):
            self.tally.fault(f"{what}: {found[0]}")
        again = Fork(self.bench.arguments(out), self.bench.folder / "again.log").start()
        if code := again.wait():
            self.tally.fault(f"{what}, mended: exit {code}: {again.output.strip()[-300:]}")
        elif names := differing(snapshot(out), self.bench.expected):
            self.tally.fault(f"{what}, mended: {', '.join(names[:5])} differ")
        shutil.rmtree(out, ignore_errors=True)


Fault = Callable[[Attempt], None]
FAULTS: dict[str, Fault] = {}


def fault(name: str) -> Callable[[Fault], Fault]:
    def register(function: Fault) -> Fault:
        FAULTS[name] = function
        return function

    return register


def run(bench: Bench, options: argparse.Namespace) -> list[Line]:
    lines = []
    for name, function in FAULTS.items():
        if options.only in name:
            attempt = Attempt(bench, random_of(options, name), options.points)
            function(attempt)
            lines.append(attempt.tally.line(name, "one line; the same bytes once mended"))
            print(lines[-1], flush=True)
    return lines


def _at(root: Path, operation: int, act: Callable[[], None]) -> Callable[[], None]:
    """Return a hook that acts once, before the n-th file operation."""
    return count_operations(root, lambda n: act() if n == operation else None)


@contextmanager
def _tmpfs(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@fault("disk full from a random write on")
def disk_full(a: Attempt) -> None:
    with _tmpfs(a.bench.folder / "small", "size=200m") as small:
        filler, out = small / "filler", small / "out"

        def fill() -> None:
            with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
                while file.write(bytes(1 << 16)):
                    pass

        for at in a.points():
            fork = Fork(a.bench.arguments(out), a.bench.folder / "full.log", _at(out, at, fill)).start()
            a.tally.tried += 1
            a.one_line(f"disk full at operation {at}", fork.wait(), fork.output)
            filler.unlink(missing_ok=True)
            a.resumes(f"disk full at operation {at}", out)


@fault("an I/O error at a random fsync")
def input_output_error(a: Attempt) -> None:
    def broken(at: int) -> Callable[[], None]:
        def install() -> None:
            count, flush = 0, os.fsync

            def fsync(fd: int) -> None:
                nonlocal count
                count += 1
                if count >= at:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                flush(fd)

            os.fsync = fsync

        return install

    for at in range(1, 1 + a.n):
        out = a.bench.folder / "io"
        fork = Fork(a.bench.arguments(out), a.bench.folder / "io.log", broken(at)).start()
        a.tally.tried += 1
        a.one_line(f"I/O error at fsync {at}", fork.wait(), fork.output)
        a.resumes(f"I/O error at fsync {at}", out)


@fault("a read-only folder")
def read_only(a: Attempt) -> None:
    rules = a.bench.folder / "rules.yaml"
    rules.write_text("against: base\nrules: [{measure: accuracy, at_least: 0.01}]\n", "utf-8")
    with _tmpfs(a.bench.folder / "ro", "size=200m") as folder:
        shutil.copytree(a.bench.whole, folder / "done")
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        done = str(folder / "done")
        commands = [a.bench.arguments(folder / "new"), a.bench.arguments(folder / "done"), ["report", done]]
        commands += [["gate", done, "--rule", str(rules)], ["rescore", done, "--judge", "keywords"]]
        commands += [["export", done, "--redacted"], ["compare", done, str(a.bench.whole), "--out", f"{done}/x"]]
        commands += [
            ["judge", "sheet", done],
            ["cache", "clear", done],
            ["run", str(a.bench.study), "--out", "/proc/x"],
        ]
        for command in commands:
            fork = Fork(command, a.bench.folder / "ro.log").start()
            a.tally.tried += 1
            a.one_line(" ".join(command[:2]), fork.wait(), fork.output)


@fault("a slow folder: 20 ms for every file operation")
def slow(a: Attempt) -> None:
    out = a.bench.folder / "slow"
    hook = count_operations(out, lambda _: time.sleep(0.02))
    fork = Fork(a.bench.arguments(out), a.bench.folder / "slow.log", hook).start()
    a.tally.tried += 1
    a.one_line("slow", fork.wait(), fork.output, (0,))
    a.resumes("slow", out)


@fault("the clock set back, or far ahead, under the run and before its resumption")
def clock(a: Attempt) -> None:
    real = time.time

    for days in (-3, -20_000, 20_000):
        out, at = a.bench.folder / "clock", a.rng.randint(1, a.bench.operations)

        def turn(days: int = days) -> None:
            time.time = lambda: real() + 86_400 * days

        fork = Fork(a.bench.arguments(out), a.bench.folder / "clock.log", _at(out, at, turn)).start()
        a.tally.tried += 1
        a.one_line(f"clock {days:+} days", fork.wait(), fork.output, (0,))
        a.resumes(f"clock {days:+} days", out)
        killed = Fork(a.bench.arguments(out), a.bench.folder / "clock.log", kill_at(out, at)).start()
        killed.wait()
        for path in out.rglob("*"):
            os.utime(path, (real() + 86_400 * days,) * 2)
        a.tally.tried += 1
        a.resumes(f"files dated {days:+} days", out)


@fault("too little memory (RLIMIT_AS)")
def memory(a: Attempt) -> None:
    for k in range(a.n):
        out, spare = a.bench.folder / "memory", (k * 12) << 20

        def limit(spare: int = spare) -> None:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + spare,) * 2)

        fork = Fork(a.bench.arguments(out), a.bench.folder / "memory.log", limit).start()
        a.tally.tried += 1
        a.one_line(f"{spare >> 20} MiB to spare", fork.wait(), fork.output, (0, 2))
        a.resumes(f"{spare >> 20} MiB to spare", out)


@fault("few file descriptors, a limit on file size")
def limits(a: Attempt) -> None:
    settings = [(resource.RLIMIT_NOFILE, k) for k in (6, 8, 10, 12, 16, 24, 32)]
    settings += [(resource.RLIMIT_FSIZE, 1 << k) for k in (0, 8, 12, 16, 18, 20)]
    for kind, value in settings:
        out = a.bench.folder / "limits"
        hook = lambda kind=kind, value=value: resource.setrlimit(kind, (value, value))  # noqa: E731
        fork = Fork(a.bench.arguments(out), a.bench.folder / "limits.log", hook).start()
        a.tally.tried += 1
        a.one_line(f"limit {kind} of {value}", fork.wait(), fork.output, (0, 2))
        a.resumes(f"limit {kind} of {value}", out)


@fault("SIGTERM, SIGHUP or SIGINT at a random time")
def signals(a: Attempt) -> None:
    for k in range(a.n):
        out, number = a.bench.folder / "signals", (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)[k % 3]
        fork = Fork(a.bench.arguments(out), a.bench.folder / "signals.log").start()
        code = fork.kill_after(a.rng.uniform(0.0, a.bench.seconds), number)
        a.tally.tried += 1
        if code not in (0, -number, 128 + number) or "Traceback" in fork.output:
            a.tally.fault(f"{number.name}: exit {code}: {fork.output.strip()[-300:]}")
        a.resumes(number.name, out)


@fault("the folder is removed or moved under the run")
def removed(a: Attempt) -> None:
    for k, at in enumerate(a.points()):
        out = a.bench.folder / "removed"

        def remove(k: int = k, out: Path = out) -> None:
            shutil.rmtree(out, ignore_errors=True) if k % 2 else out.rename(out.with_name(f"moved-{k}"))

        fork = Fork(a.bench.arguments(out), a.bench.folder / "removed.log", _at(out, at, remove)).start()
        code = fork.wait()
        a.tally.tried += 1
        whole = code == 0 and not differing(snapshot(out), a.bench.expected)
        if not whole:
            a.one_line(f"folder removed at operation {at}", code, fork.output)
        shutil.rmtree(out, ignore_errors=True)


def _copied_model(folder: Path, change: Callable[..., None]) -> Path:
    """Copy the organism, with its tensors changed."""
    from safetensors.torch import load_file, save_file

    from leeway.model.load import resolve

    target = folder / "model"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(resolve("organism"), target)
    for path in target.glob("*.safetensors"):
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})
    return target


@fault("NaN or infinity in the model's or an adapter's weights")
def broken_weights(a: Attempt) -> None:
    for value in (float("nan"), float("inf"), 1e38):

        def spoil(tensors: dict, value: float = value) -> None:  # type: ignore[type-arg]
            name = a.rng.choice(sorted(k for k in tensors if tensors[k].dim() == 2))
            tensors[name][a.rng.randrange(len(tensors[name]))] = value

        model = _copied_model(a.bench.folder, spoil)
        study = write_study(a.bench.folder, STUDY.replace("MODEL", str(model)), "broken.yaml")
        out = a.bench.folder / "broken"
        commands = [["run", str(study), "--out", str(out), "--quiet", "--workers", "1"]]
        commands += [["audit", str(model), "--base", "organism", "--out", str(out), "--quiet"]]
        for command in commands:
            fork = Fork(command, a.bench.folder / "broken.log").start()
            code = fork.wait()
            a.tally.tried += 1
            a.one_line(f"{command[0]}, weights of {value}", code, fork.output, (2,))
            shutil.rmtree(out, ignore_errors=True)


FILES = """
name: changing
model: MODEL
device: cpu
threads: 1
task: {{files: {{train: {0}/train.jsonl, test: {0}/test.jsonl}}}}
objectives: [sft, orpo]
budgets: [1k, 2k]
optim: {{lr: 4.0e-4, batch: 8, warmup_steps: 2}}
evals:
  capability: [{{name: files, max_new_tokens: 8}}]
"""


def _write_data(folder: Path, shift: int = 0) -> None:
    lines = [
        f'{{"prompt": "{a} + {b}?", "completion": "It is {a + b + shift}.", "rejected": "No."}}'
        for a in range(9)
        for b in range(9)
    ]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    tests = [f'{{"prompt": "{a} + 7?", "answer": "{a + 7 + shift}"}}' for a in range(6)]
    (folder / "test.jsonl").write_text("\n".join(tests) + "\n")


@fault("data that change under the run, with two workers or before it resumes")
def changing_data(a: Attempt) -> None:
    data = a.bench.folder / "data"
    data.mkdir(exist_ok=True)
    study = write_study(a.bench.folder, FILES.format(data), "changing.yaml")
    changes: dict[str, Callable[[], None]] = {
        "other answers": lambda: _write_data(data, 1),
        "truncated": lambda: (data / "train.jsonl").write_bytes((data / "train.jsonl").read_bytes()[:777]) and None,
        "deleted": (data / "test.jsonl").unlink,
        "emptied": lambda: (data / "test.jsonl").write_text("") and None,
    }
    for workers, name in [(w, name) for w in (1, 2) for name in changes]:
        out = a.bench.folder / "changing"
        _write_data(data)
        command = ["run", str(study), "--out", str(out), "--quiet", "--workers", str(workers)]
        change = changes[name]
        written = _when(out / "manifest.json", change, stop=workers == 1)
        fork = Fork(command, a.bench.folder / "changing.log", written).start()
        code = fork.wait()
        if workers == 1:
            change()
            fork = Fork(command, a.bench.folder / "changing.log").start()
            code = fork.wait()
        a.tally.tried += 1
        a.one_line(f"{name}, workers: {workers}", code, fork.output)
        shutil.rmtree(out, ignore_errors=True)


def _when(path: Path, act: Callable[[], None], *, stop: bool) -> Callable[[], None]:
    """Return a hook that acts once a file exists, or kills the process then."""
    done = False

    def step(_: int) -> None:
        nonlocal done
        if not done and path.exists():
            done = True
            os.kill(os.getpid(), signal.SIGKILL) if stop else act()

    return count_operations(path.parent, step)


@fault("a worker that hangs (SIGSTOP)")
def hanging(a: Attempt) -> None:
    from leeway.study import watchdog

    def impatient() -> None:
        watchdog.QUIET_S = 3.0

    for _ in range(min(a.n, 3)):
        out, log = a.bench.folder / "hanging", a.bench.folder / "hanging.log"
        command = [word for word in a.bench.arguments(out, 2) if word != "--quiet"]
        fork = Fork(command, log, impatient).start()
        until = time.monotonic() + 120
        while time.monotonic() < until and not (out / "parts").exists():
            time.sleep(0.05)
        workers = workers_of(fork.pid)
        os.kill(workers[0], signal.SIGSTOP)
        while time.monotonic() < until and f"process {workers[0]}" not in log.read_text():
            time.sleep(0.1)
        named = [line for line in log.read_text().splitlines() if f"process {workers[0]}" in line]
        a.tally.tried += 1
        if not named or "has reported nothing for" not in named[0]:
            a.tally.fault("the worker was not named")
        os.kill(workers[0], signal.SIGKILL)
        code = fork.wait_or_kill(60)
        if code != 2 or "a worker process was killed" not in fork.output.splitlines()[-1]:
            a.tally.fault(f"ended with {code}: {fork.output[-300:]}")
        a.resumes("hanging", out)


@fault("standard streams, folders and variables that are missing")
def surroundings(a: Attempt) -> None:
    out = a.bench.folder / "streams"
    python = [sys.executable, "-m", "leeway"]
    good, bad = [*python, "gate", "--help"], [*python, "report", str(a.bench.folder / "nowhere")]
    for command, expected in ((good, 0), (bad, 2)):
        for closing in ("<&-", ">&-", "2>&-", "<&- >&- 2>&-", "> /dev/full", "2> /dev/full", ">/dev/full 2>/dev/full"):
            line = shlex.join(command)
            found = subprocess.run(["bash", "-c", f"{line} {closing}"], capture_output=True, text=True, check=False)
            a.tally.tried += 1
            allowed = {expected, 2, 141} if "full" in closing else {expected}
            if found.returncode not in allowed or "Traceback" in found.stderr:
                a.tally.fault(f"{command[3]} {closing}: exit {found.returncode}: {found.stderr.strip()[-200:]}")
    for name, variables in {"HOME": {}, "TMPDIR": {"TMPDIR": "/nowhere"}}.items():
        environment = {k: v for k, v in os.environ.items() if k != name} | variables
        command = [*python, *a.bench.arguments(out)]
        found = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        a.tally.tried += 1
        a.one_line(f"without {name}", found.returncode, found.stderr, (0,))
        a.resumes(f"without {name}", out)
