"""Audit an endpoint by a hundred thousand requests, 256 at a time: pace, memory, and no call repeated after a kill.

The endpoint is `benchmarks.hardening.stub` on this machine. The client is the command line, `leeway audit`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.hardening.table import Line
from leeway.cache import Cache

CONCURRENCY = 256
FASTEST = 230  # requests a second that 256 at a time must reach at a latency of 1 s (at most 256)
GROWTH = 2_500  # bytes of memory per answer of 450 characters that is kept for its row
SAMPLES = 50
EVALS = """
name: load
model: organism
task: organism
objectives: [sft]
budgets: [1k]
evals:
  jailbreak: {{prompts: file, file: {file}, attacks: [none], samples: {samples}, judge: keywords, max_new_tokens: 128}}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--n", type=int, default=100_000, help="requests of the audit that is killed half-way")
    parser.add_argument("--paced", type=int, default=30_000, help="requests of the audit that is timed at 1 s latency")


def run(options: argparse.Namespace) -> list[Line]:
    return [*pace(options.folder / "pace", options.paced), *resume(options.folder / "resume", options.n)]


@dataclass
class Stub:
    """A running stub endpoint."""

    url: str

    def counts(self) -> dict[str, Any]:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"{self.url}/counts", timeout=30) as response:
            return dict(json.load(response))


@contextmanager
def serving(latency: float) -> Iterator[Stub]:
    command = [sys.executable, "-m", "benchmarks.hardening.stub", "--latency", str(latency)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield Stub(process.stdout.readline().strip())
        process.kill()


@dataclass
class Audit:
    """`leeway audit` of two models of the stub, a thousand or more prompts each; its memory by requests answered."""

    folder: Path
    stub: Stub
    n: int
    memory: list[tuple[int, int]] = field(default_factory=list)  # (requests so far, resident bytes)

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def command(self) -> list[str]:
        prompts, study = self.folder / "prompts.jsonl", self.folder / "evals.yaml"
        prompts.write_text("".join(json.dumps({"prompt": f"Say {k}."}) + "\n" for k in range(self.n // SAMPLES // 2)))
        study.write_text(EVALS.format(file=prompts, samples=SAMPLES))
        models = ["tuned", "--base", "base", "--endpoint", self.stub.url, "--name", "tuned"]
        options = ["--concurrency", str(CONCURRENCY), "--study", str(study), "--out", str(self.out), "--quiet"]
        return [sys.executable, "-m", "leeway", "audit", *models, *options]

    def run(self, until: Callable[[dict[str, Any]], bool] = lambda _: False) -> tuple[int, str]:
        """Return the exit code and the output; kill the process once `until` holds of the stub's counts."""
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self.folder / "log"
        with log.open("wb") as out:
            process = subprocess.Popen(self.command(), stdout=out, stderr=out)
            while process.poll() is None:
                counts = self.stub.counts()
                if counts["under_way"]:  # not while rows and report are made
                    self.memory.append((counts["requests"], resident(process.pid)))
                if until(counts):
                    process.send_signal(signal.SIGKILL)
                    break
                time.sleep(0.5)
            return process.wait(), log.read_text("utf-8")


def resident(pid: int) -> int:
    """Return the resident bytes of a process; 0 if it has ended."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def pace(folder: Path, n: int) -> list[Line]:
    """Return the line of the pace at a latency of 1 s."""
    with serving(1.0) as stub:
        code, log = Audit(folder, stub, n).run()
        counts = stub.counts()
    rate = counts["requests"] / counts["seconds"]
    attempt = f"requests at a latency of 1 s, {counts['most_under_way']} at once"
    note = f"{rate:.0f} requests a second" if code == 0 else f"exit {code}: {log[-200:]}"
    return [Line(attempt, counts["requests"], int(code != 0 or rate < FASTEST), note)]


def resume(folder: Path, n: int) -> list[Line]:
    """Return the lines of an audit that is killed half-way and resumed."""
    with serving(0.05) as stub:
        audit = Audit(folder, stub, n)
        code, log = audit.run(lambda counts: counts["requests"] >= n // 2)
        if code != -signal.SIGKILL:
            return [Line("an audit to kill half-way", 1, 1, f"exit {code}: {log[-200:]}")]
        kept = len(Cache(audit.out / "cache").records("replies"))
        before = stub.counts()
        first, audit.memory = audit.memory, []
        code, log = audit.run()
        counts = stub.counts()
    repeated = counts["requests"] - before["requests"] - (n - kept)
    note = f"{kept:,} answers were on disk, {counts['again']:,} of at most {CONCURRENCY} under way were asked again"
    lines = [Line("answers on disk at a kill half-way, asked again", kept, repeated, note if code == 0 else log[-200:])]
    lines += [memory_line("until the kill", first), memory_line("resumed", audit.memory)]
    return lines


def memory_line(when: str, memory: list[tuple[int, int]]) -> Line:
    """Return the line of the growth of memory from the first tenth of the requests to the last."""
    (a, low), (b, high) = memory[len(memory) // 10], memory[-1]
    growth = (high - low) / max(b - a, 1)
    note = f"{low >> 20:,} to {high >> 20:,} MiB, {growth:,.0f} bytes an answer"
    return Line(f"memory {when}", b - a, int(growth > GROWTH), note)
