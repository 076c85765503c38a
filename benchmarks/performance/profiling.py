"""Where a training step of ours spends its time: PyTorch's profiler over a few steps, the top ten operators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.performance import ours
from benchmarks.performance.task import BATCH, Task
from benchmarks.performance.texts import examples

STEPS, WARMUP, TOP = 2, 1, 10
THREADS = 1  # a spinning second thread would be counted as work


def told(shape: str, objective: str, models: Path) -> str:
    """A Markdown table of operators by their own CPU time."""
    import tempfile

    import torch
    from torch.profiler import ProfilerActivity, profile

    from leeway.study.runtime import deterministic

    torch.set_num_threads(THREADS)
    task = Task("ours", "train", shape, str(models), objective, steps=STEPS, warmup=WARMUP)
    data = examples(task.pairs)[: BATCH * (WARMUP + STEPS)]
    with tempfile.TemporaryDirectory() as folder, deterministic():
        run = ours.trajectory(task, data, Path(folder) / "references")
        log = Path(folder) / "steps.jsonl"
        run.train_to(run.schedule.stops[0], log, lambda _: None)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            run.train_to(run.schedule.stops[1], log, lambda _: None)
    return _table(list(seen.key_averages()), f"{shape}, {objective}, {STEPS} steps")


def _table(found: list[Any], caption: str) -> str:
    whole = sum(e.self_cpu_time_total for e in found)
    top = sorted(found, key=lambda e: -e.self_cpu_time_total)[:TOP]
    lines = [f"| {caption} | calls | ms | share |", "|---|---|---|---|"]
    lines += [
        f"| `{e.key}` | {e.count} | {e.self_cpu_time_total / 1000:,.0f} | {e.self_cpu_time_total / whole:.0%} |"
        for e in top
    ]
    return "\n".join([*lines, f"| all | | {whole / 1000:,.0f} | 100% |"])
