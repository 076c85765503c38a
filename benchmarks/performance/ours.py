"""Leeway's own side: a trajectory of one objective, and answers to prompts, as a study would make them."""

from __future__ import annotations

import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from benchmarks.performance import flops
from benchmarks.performance.task import BATCH, CLIP, LORA, LR, WARMUP, Found, Task
from leeway.data.types import Example

DTYPE: Literal["auto", "float32", "bfloat16"] = "bfloat16"
MICRO_TOKENS = 2048  # this and the layout: the defaults of a study
LAYOUT: Literal["auto", "padded", "packed", "fused"] = "auto"
ANSWERS = 128  # prompts of a batch, the default of a study


def imports() -> None:
    """What this side needs, so that memory before the model is known."""
    for name in (
        "peft",
        "transformers.models.llama.modeling_llama",
        "leeway.generation.transformers",
        "leeway.study.runtime",
        "leeway.training.trajectory",
    ):
        import_module(name)


def settings(kept: Path | None = None) -> Any:
    """`kept` is where what the reference says is kept; nowhere for what asks none."""
    from leeway.model.adapters import AdapterSettings
    from leeway.model.reference import ReferenceCache
    from leeway.training.batch import Optim
    from leeway.training.trajectory import Settings

    return Settings(
        AdapterSettings(LORA["r"], LORA["alpha"], LORA["dropout"], "all-linear"),
        LR,
        WARMUP,
        0.0,
        Optim(CLIP, MICRO_TOKENS),
        references=None if kept is None else ReferenceCache(kept),
        layout=LAYOUT,
    )


def trajectory(task: Task, data: list[Example], kept: Path) -> Any:
    """Not a step taken; marks after the warm-up and at the end. Its reference is asked beforehand, into `kept`."""
    from leeway.data.stream import BudgetStop, Schedule, StreamItem
    from leeway.model.load import load_model
    from leeway.objectives import OBJECTIVES
    from leeway.training.trajectory import Trajectory

    slots = [StreamItem(e, 0, k) for k, e in enumerate(data)]
    steps = tuple(tuple(slots[k : k + BATCH]) for k in range(0, len(slots), BATCH))
    marks = tuple(BudgetStop(n, n, 0, n * BATCH, 0.0, "") for n in (task.warmup, len(steps)))
    model = load_model(task.folder, dtype=DTYPE)
    return Trajectory(task.objective, OBJECTIVES[task.objective](), 0, model, Schedule(steps, marks), settings(kept))


def train(task: Task, data: list[Example]) -> Found:
    """Steps after the warm-up by the clock; what is asked of the reference beforehand, by these steps' share of it."""
    from leeway.study.runtime import deterministic

    steps: list[Any] = []
    with tempfile.TemporaryDirectory() as folder, deterministic():
        began = task.now()
        run = trajectory(task, data, Path(folder) / "references")
        setup = task.now() - began
        log = Path(folder) / "steps.jsonl"
        began, clock = task.now(), time.perf_counter()
        run.train_to(run.schedule.stops[0], log, steps.append)
        spent, whole = task.now() - began, time.perf_counter() - clock
        beforehand = spent * (1 - sum(s.seconds for s in steps) / whole)
        began = task.now()
        run.train_to(run.schedule.stops[1], log, steps.append)
        seconds = task.now() - began
    tokens = sum(s.processed_tokens for s in steps[task.warmup :])
    share = tokens / sum(s.processed_tokens for s in steps)
    asked = beforehand * share if run.objective.needs_reference != "nothing" else 0.0
    return Found(tokens, seconds, asked, setup)


def generate(task: Task, asked: list[str]) -> Found:
    """Greedy answers under an adapter that was moved, merged as a study merges it."""
    from benchmarks.performance.peers.lora import move
    from leeway.generation.backend import Request
    from leeway.generation.transformers import TransformersBackend
    from leeway.model import adapters
    from leeway.model.load import load_model
    from leeway.study.runtime import deterministic

    began = task.now()
    model = load_model(task.folder, dtype=DTYPE)
    adapters.attach(model, settings().adapter, seed=0)
    move(model.lm)
    backend = TransformersBackend(model, batch=ANSWERS)
    conversations = [[{"role": "user", "content": text}] for text in asked]
    setup = task.now() - began
    with deterministic(), adapters.merged(model):
        backend.complete([Request(c, 4) for c in conversations[:8]], lambda _: None)
        began = task.now()
        replies = backend.complete([Request(c, task.new_tokens) for c in conversations], lambda _: None)
        seconds = task.now() - began
    new = [r.new_tokens for r in replies]
    work = flops.generation(task, [len(model.chat.prompt_ids(c)) for c in conversations], new)
    return Found(sum(new), seconds, setup_seconds=setup, texts=[r.text[:400] for r in replies], flops=work)
