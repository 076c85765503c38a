"""How fast this machine is at one study: a few optimiser steps and batches of answers, by the code that runs it.

As many processes as a run would have do the same at the same time, so that what they take from each other is in the
numbers. Each measures a trajectory of every cost class (what is rendered and what is asked of a reference), writing a
checkpoint, and of every eval some whole batches of prompts: the shortest, the longest and one between.

A plan's hours and memory from what was measured on this machine: exact counts times rates, piece by piece.
"""

from __future__ import annotations

import math
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from leeway.data.stream import BudgetStop, Schedule
from leeway.errors import LeewayError
from leeway.evals.eval import Eval, Prompt
from leeway.generation.backend import Request
from leeway.generation.transformers import TransformersBackend
from leeway.model import adapters
from leeway.model.reference_cache import ReferenceCache
from leeway.plan.cost_model import GIB, as_time
from leeway.plan.token_counts import TrajectoryPlan, new_tokens
from leeway.study.jobs import Checkpoint, Job, eval_targets
from leeway.study.prepare import Prepared, prepare
from leeway.study.run_dir import RunDir
from leeway.study.runtime import compute_settings
from leeway.study.spec import Spec
from leeway.study.worker import Worker
from leeway.training.loop import Step

STEPS = 4  # that are timed of each cost class, after one that is not
BATCHES = 3  # that are timed of each eval, at most


@dataclass
class Timing:
    """Seconds, and bytes.

    `training`: of a processed token, by objective. `reference`: of a token asked beforehand. `answering`: of each eval
    at one checkpoint. `checkpoint`: of writing one. `load`: of loading the model. `lend`: of having it as it was loaded
    once more. `start`: of beginning a process and reading the data. `peak`: bytes of a process that does all of it;
    `standing`: of one that has loaded the model.
    """

    training: dict[str, float] = field(default_factory=dict)
    reference: float = 0.0
    answering: dict[str, float] = field(default_factory=dict)
    checkpoint: float = 0.0
    load: float = 0.0
    checkout: float = 0.0
    start: float = 0.0
    peak: float = 0.0
    standing: float = 0.0


def timed(spec: Spec, workers: int) -> Timing:
    """The mean over `workers` processes that measure at once. Raises LeewayError where this cannot be measured."""
    if spec.evals.backend != "transformers":
        raise LeewayError(
            f"--measure: {spec.evals.backend} is not timed",
            fix="leave --measure out, or set evals.backend: transformers",
        )
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(workers), context.SimpleQueue()
    raw, began = spec.model_dump(mode="json", by_alias=True), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="leeway-plan-") as scratch:
        children = [
            context.Process(target=_process, args=(raw, Path(scratch) / str(k), barrier, results), daemon=True)
            for k in range(workers)
        ]
        for child in children:
            child.start()
        ready = [_next(results, children) for _ in children]
        start = time.perf_counter() - began
        found: list[Timing] = [_next(results, children) for _ in ready]
        for child in children:
            child.join()
    return Timing(
        training={alias: fmean(t.training[alias] for t in found) for alias in found[0].training},
        reference=fmean(t.reference for t in found),
        answering={name: fmean(t.answering[name] for t in found) for name in found[0].answering},
        checkpoint=fmean(t.checkpoint for t in found),
        load=fmean(t.load for t in found),
        checkout=fmean(t.checkout for t in found),
        start=start,
        peak=max(t.peak for t in found),
        standing=max(t.standing for t in found),
    )


def _next(results: Any, children: Seq[Any]) -> Any:
    """What the next process has to say; raises LeewayError where one has failed or died."""
    while results.empty():
        if not any(c.is_alive() for c in children) and results.empty():
            raise LeewayError("--measure: a process was killed, for want of memory perhaps", fix="leave --measure out")
        time.sleep(0.05)
    found = results.get()
    if isinstance(found, Exception):
        for child in children:
            child.kill()
        raise found
    return found


def _process(raw: dict[str, Any], scratch: Path, barrier: Any, results: Any) -> None:
    """One of the processes: says that it is ready, waits for the others, measures."""
    try:
        prepared = prepare(Spec.model_validate(raw))
        results.put("ready")
        barrier.wait()
        with compute_settings(prepared.spec):
            results.put(measured(prepared, scratch))
    except Exception as error:  # noqa: BLE001 - told by the process that began this one
        results.put(error if isinstance(error, LeewayError) else LeewayError(f"--measure: {error}"))
        barrier.abort()


def measured(prepared: Prepared, scratch: Path) -> Timing:
    """Measure in this process. Memory counts what this process ever held."""
    scratch.mkdir()
    work, found = Worker(prepared, RunDir(scratch), lambda *_: None), Timing()
    began = time.perf_counter()
    work.base()
    found.load, found.standing = time.perf_counter() - began, _held()
    asked: list[tuple[float, int]] = []
    for aliases in _classes(prepared):
        rate = _train(work, aliases[0], scratch, found, asked)
        found.training |= dict.fromkeys(aliases, rate)
    if tokens := sum(n for _, n in asked):
        found.reference = sum(s for s, _ in asked) / tokens
    began = time.perf_counter()
    model = work.base()
    found.checkout = time.perf_counter() - began
    adapters.attach(model, work.trajectories.settings(0.0).adapter, seed=0)
    backend = TransformersBackend(model, "", prepared.spec.evals.batch, overlong="failure")
    with adapters.merged(model):
        for e in prepared.evals:
            if prompts := [p for p in e.prompts() for _ in range(p.samples)]:
                found.answering[e.key] = _answer(backend, e, prompts)
    found.peak = _held()
    return found


def _held() -> float:
    """Bytes that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)


def _classes(prepared: Prepared) -> list[list[str]]:
    """Objectives that cost alike, token for token."""
    found: dict[tuple[object, ...], list[str]] = {}
    for alias, o in prepared.objectives.items():
        found.setdefault((o.needs_pairs, o.needs_reference, o.auxiliary, o.control_tokens), []).append(alias)
    return list(found.values())


def _train(work: Worker, alias: str, scratch: Path, found: Timing, asked: list[tuple[float, int]]) -> float:
    """Seconds of a processed token."""
    seed = work.prepared.spec.seeds[0]
    schedule = _few(work.prepared, alias, seed)
    kept = ReferenceCache(scratch / "references") if work.prepared.spec.reference == "cached" else None
    trial = work.trajectories.trial(alias, seed, schedule, kept)
    began = time.perf_counter()
    tokens = trial.precompute_reference()
    asked.append((time.perf_counter() - began, tokens))
    steps: list[Step] = []
    trial.train_to(schedule.marks[0], scratch / "steps", steps.append)
    steps = steps[1:] or steps
    began = time.perf_counter()
    trial.save(scratch / "checkpoint", schedule.marks[0])
    found.checkpoint = time.perf_counter() - began
    return sum(s.seconds for s in steps) / sum(s.processed_tokens for s in steps)


def _few(prepared: Prepared, alias: str, seed: int) -> Schedule:
    """Steps from all over a trajectory, the first one to warm up with; the one with the most tokens is among them."""
    steps, renderer = prepared.schedules[alias, seed].steps, prepared.renderer(alias, seed)
    spaced = [k * (len(steps) - 1) // STEPS for k in range(STEPS + 1)]
    near = steps[:: max(1, len(steps) // 50)]
    most = max(near, key=lambda slots: sum(renderer.processed(s) for s in slots))
    chosen = (*(steps[k] for k in dict.fromkeys(spaced)), most)
    return Schedule(chosen, (BudgetStop(0, len(chosen), 0, 0, 0.0, ""),))


def _answer(backend: TransformersBackend, e: Eval, prompts: Seq[Prompt]) -> float:
    """Return the seconds of the whole eval at one checkpoint, extrapolated from some of its batches."""
    began = time.perf_counter()
    lengths = [len(backend.chat.prompt_ids(p.conversation)) for p in prompts]
    reading = time.perf_counter() - began
    by_length = [prompts[k] for k in sorted(range(len(prompts)), key=lengths.__getitem__)]
    seconds, chosen = 0.0, list(_batches(by_length, backend.batch))
    for batch in chosen:
        began = time.perf_counter()
        if e.work == "score":
            backend.choose([p.conversation for p in batch], batch[0].options, lambda _: None)
        else:
            requests = [Request(p.conversation, p.max_new_tokens, p.temperature) for p in batch]
            backend.complete(requests, lambda _: None)
        seconds += time.perf_counter() - began
    return reading + seconds * len(prompts) / sum(map(len, chosen))


def _batches(prompts: Seq[Prompt], size: int) -> Iterator[Seq[Prompt]]:
    whole = [prompts[k : k + size] for k in range(0, len(prompts), size)]
    places = sorted({round(k * (len(whole) - 1) / (BATCHES - 1)) for k in range(BATCHES)})
    yield from (whole[k] for k in places)


@dataclass(frozen=True)
class Measured:
    """Hours of work, of all workers together, and from the first command to the last page; memory of all processes."""

    workers: int
    training_hours: float
    reference_hours: float
    answering_hours: float
    setup_hours: float
    hours: float
    memory_gib: float
    untimed: tuple[str, ...]

    def lines(self) -> Iterator[str]:
        several = f" with {self.workers} workers" if self.workers > 1 else ""
        parts = {
            "training": self.training_hours,
            "references": self.reference_hours,
            "answering": self.answering_hours,
            "loading and saving": self.setup_hours,
        }
        told = ", ".join(f"{what} {as_time(hours)}" for what, hours in parts.items())
        together = ", over all workers" if several else ""
        yield f"measured on this machine{several}: {as_time(self.hours)} ({told}{together})"
        yield f"  memory ~{self.memory_gib:.1f} GiB at their peaks"
        if self.untimed:
            yield f"  not timed: {', '.join(self.untimed)}"


def priced_by(
    prepared: Prepared, pieces: Seq[Job], trajectories: Seq[TrajectoryPlan], timing: Timing, workers: int
) -> Measured:
    """`trajectories` are those of the `pieces` that train. What an earlier run has done is not taken off."""
    asked = new_tokens(prepared) if prepared.spec.reference == "cached" else {}
    plans = dict(zip([p for p in pieces if p.kind in ("tune", "train")], trajectories, strict=True))
    each = sum(timing.answering.values())
    per_answer = each / max(1, sum(len(e) for e in prepared.evals if e.key in timing.answering))
    training = {p: t.runs * t.processed_tokens * timing.training[p.alias] for p, t in plans.items()}
    reference = {p: asked.get(p, 0) * timing.reference for p in pieces}
    answering = {p: len(eval_targets(prepared, p)) * each for p in pieces if p.kind != "tune"}
    answering |= {p: t.runs * prepared.spec.optim.tune.items * per_answer for p, t in plans.items() if p.kind == "tune"}
    setup = {p: _lent(prepared, p) * timing.checkout + _saved(p) * timing.checkpoint for p in pieces}
    seconds = {p: training.get(p, 0.0) + reference[p] + answering[p] + setup[p] for p in pieces}
    leading = 1 if workers > 1 else 0  # the process that hands out, which has had the model too
    begin = (1 + leading) * (timing.start + timing.load)
    return Measured(
        workers=workers,
        training_hours=sum(training.values()) / 3600,
        reference_hours=sum(reference.values()) / 3600,
        answering_hours=sum(answering.values()) / 3600,
        setup_hours=(sum(setup.values()) + (workers + leading) * timing.load) / 3600,
        hours=(begin + makespan(pieces, seconds, workers)) / 3600,
        memory_gib=(workers * timing.peak + leading * timing.standing) / GIB,
        untimed=(*(e.key for e in prepared.evals if e.key not in timing.answering), "drawing the report", "judges"),
    )


def _lent(prepared: Prepared, piece: Job) -> int:
    """How often a piece takes the model as it was loaded."""
    if piece.kind == "tune":
        return len(prepared.spec.optim.tune.lrs)
    return 1 if piece.kind == "train" else len(eval_targets(prepared, piece))


def _saved(piece: Job) -> int:
    return len(piece.budgets) if piece.kind == "train" else 0


def makespan(pieces: Seq[Job], seconds: dict[Job, float], workers: int) -> float:
    """When the last piece ends, if each worker takes the first piece that waits for none: as they are handed out.

    A trajectory's checkpoints come as its source tokens do, all at one speed.
    """
    free, ends, left = [0.0] * workers, dict[Job, float](), list(pieces)
    there = {(p.alias, p.seed, b): math.inf for p in pieces if p.kind == "train" for b in p.budgets}
    while left:
        k = free.index(min(free))
        now = free[k]
        piece = next((p for p in left if _since(p, ends, there, pieces) <= now), None)
        if piece is None:
            free[k] = min(t for t in (*ends.values(), *there.values()) if t > now)
            continue
        free[k] = ends[piece] = now + seconds[piece]
        if piece.kind == "train":
            there |= {(piece.alias, piece.seed, b): now + seconds[piece] * b / piece.budgets[-1] for b in piece.budgets}
        left.remove(piece)
    return max(free)


def _since(piece: Job, ends: dict[Job, float], there: dict[Checkpoint, float], pieces: Seq[Job]) -> float:
    """From when on a piece waits for nothing; never, as long as what it waits for is not begun."""
    before = [ends.get(p, math.inf) for p in piece.after if p in pieces]
    return max([0.0, *before, *(there[c] for c in piece.needs if c in there)])
