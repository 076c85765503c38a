"""Run a study in child processes, most of them killed at a random moment; print how many were.

    python killing.py STUDY OUT STEPS SEED

STEPS is `done_in` of the same study uninterrupted. Libraries are imported once: each attempt is a fork of this process,
which computes nothing itself.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

EARLY, SPREAD, LATE = 3, 20, 2  # kills before any work, spread over all of it, while rows and report are written


def done_in(out: Path) -> int:
    """How far a study is: optimiser steps, checkpoints and parts on disk."""
    steps = sum(f.read_bytes().count(b"\n") for f in out.glob("steps/*.jsonl"))
    return steps + sum(1 for _ in out.glob("checkpoints/*/*/*/ledger.json")) + sum(1 for _ in out.glob("parts/*"))


def children(parent: int) -> list[int]:
    """The worker processes of a run."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rsplit(")", 1)[1].split()
            if int(fields[1]) == parent and b"spawn_main" in (status.parent / "cmdline").read_bytes():
                found.append(int(status.parent.name))
        except (OSError, IndexError):
            continue
    return found


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def started(study: Path, out: Path) -> int:
    """Fork a child that runs the study; return its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        from leeway.study.load import parse
        from leeway.study.progress import Reporter
        from leeway.study.run import run

        run(parse(study.read_text(), str(study)), out, Reporter(quiet=True), "leeway run test", workers=1)
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)


def killed(study: Path, out: Path, at: float, delay: float) -> bool:
    """Start a child and kill it `delay` seconds after `done_in` reached `at`; False if it was finished before."""
    child = started(study, out)
    while done_in(out) < at:
        if os.waitpid(child, os.WNOHANG) != (0, 0):
            return False
        time.sleep(0.002)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def main(study: Path, out: Path, steps: int, seed: int) -> None:
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import leeway.report.plotting
    import leeway.study.run  # noqa: F401

    rng = random.Random(seed)
    moments = [(0.0, rng.uniform(0.0, 0.5)) for _ in range(EARLY)]
    moments += [(steps * (k + rng.random()) / SPREAD - 1, rng.uniform(0.0, 0.03)) for k in range(SPREAD)]
    moments += [(steps, rng.uniform(0.0, 1.0)) for _ in range(LATE)]
    kills = sum(killed(study, out, at, delay) for at, delay in moments)
    code = os.waitstatus_to_exitcode(os.waitpid(started(study, out), 0)[1])
    print(f"{kills} {code}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
