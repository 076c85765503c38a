"""Carry one task out in this process: `python -m benchmarks.performance.measure TASK FILE` writes what was found."""

from __future__ import annotations

import gc
import json
import os
import re
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path

from benchmarks.performance import flops, ours
from benchmarks.performance.peers import generating, training
from benchmarks.performance.task import BATCH, Found, Task
from benchmarks.performance.texts import examples, questions


def memory_mb(key: str) -> float:
    """VmRSS (now) or VmHWM (the peak of this process, from its exec on) in MB."""
    status = Path("/proc/self/status").read_text("utf-8")
    found = re.search(rf"^{key}:\s+(\d+) kB$", status, re.M)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {key}")
    return int(found[1]) / 1024


def carry_out(task: Task) -> Found:
    """Imports and data first, so that what stands in memory before the model is known."""
    import torch

    torch.set_num_threads(task.threads)
    side = ours if task.side == "ours" else training if task.what == "train" else generating
    side.imports()
    began = _used()
    if task.what == "train":
        data = examples(task.pairs)[: BATCH * (task.warmup + task.steps)]
        before = _settled()
        found = side.train(task, data)
        found.flops = flops.training(task, data[BATCH * task.warmup :])
    else:
        asked = questions(task.prompts)
        before = _settled()
        found = side.generate(task, asked)
    found.before_mb, found.peak_mb = before, memory_mb("VmHWM")
    found.busy = _others(began)
    found.matrix_rate = flops.matrix_rate(task)
    return found


def _used() -> tuple[float, float, float]:
    """(now, CPU seconds of this process, of all processes)."""
    ticks = [int(n) for n in Path("/proc/stat").read_text("utf-8").splitlines()[0].split()[1:9]]
    return time.perf_counter(), time.process_time(), (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def _others(began: tuple[float, float, float]) -> float:
    """Cores that other processes kept busy since."""
    wall, own, every = (b - a for a, b in zip(began, _used(), strict=True))
    return max(0.0, every - own) / wall


def _settled() -> float:
    gc.collect()
    return memory_mb("VmRSS")


def main() -> None:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `leeway` sets it: spinning threads starve a busy machine
    warnings.filterwarnings("ignore")
    task, file = Task.of(sys.argv[1]), Path(sys.argv[2])
    found = carry_out(task)
    part = file.with_suffix(".part")
    part.write_text(json.dumps({"task": asdict(task), **asdict(found)}, indent=1), "utf-8")
    os.replace(part, file)


if __name__ == "__main__":
    main()
