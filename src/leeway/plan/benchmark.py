"""Time a study on this machine: a few optimiser steps and batches of prompts, run by the code of a real run.

As many processes as a run would use measure in parallel, to include contention. Each process times one trajectory per
cost class (what is rendered and what the reference computes), one checkpoint, and the shortest, a middle and the
longest batch of every eval. `measured_hours` multiplies the rates by the plan's exact counts, job by job.
"""

from __future__ import annotations

import math
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import fmean
from typing import Any

from leeway.data.stream import BudgetStop, Schedule
from leeway.errors import LeewayError
from leeway.evals.eval import Eval, Prompt
from leeway.generation.backend import Request
from leeway.generation.transformers import TransformersBackend
from leeway.model import adapters
from leeway.model.reference import ReferenceCache
from leeway.plan.cost_model import GIB, as_time
from leeway.plan.token_counts import TrajectoryPlan, learning_tokens, new_tokens
from leeway.study.jobs import Checkpoint, Job, eval_targets
from leeway.study.prepare import Prepared, prepare
from leeway.study.run_dir import RunDir
from leeway.study.runtime import compute_settings
from leeway.study.spec import Spec
from leeway.study.worker import Worker
from leeway.training.loop import Step

STEPS = 2  # timed per cost class, after a warm-up step, besides the one with the most tokens
QUIET = 0.9  # of the CPU time that its threads could take: with less, other processes slowed a measurement
BATCHES = 3  # timed per eval, at most


@dataclass
class Timing:
    """Seconds per unit of work, and bytes.

    `training` per processed token, by objective; `reference` per precomputed token; `answering` per eval and model;
    `checkpoint` per save; `load` and `checkout` of the base model; `start` of a process with its data. `peak` is the
    most bytes of a worker, `idle` those of a process that has only loaded the model. `share` of the CPU time that its
    threads could take went to the process; other processes took the rest.
    """

    training: dict[str, float] = field(default_factory=dict)
    reference: float = 0.0
    answering: dict[str, float] = field(default_factory=dict)
    checkpoint: float = 0.0
    load: float = 0.0
    checkout: float = 0.0
    start: float = 0.0
    peak: float = 0.0
    idle: float = 0.0
    share: float = 1.0


def run_benchmark(spec: Spec, workers: int) -> Timing:
    """Return the mean over `workers` processes that measure at once. Raises LeewayError for other backends."""
    if spec.evals.backend.vllm:
        raise LeewayError("--measure: vllm is not timed", fix="leave --measure out, or set evals.backend: transformers")
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
    means: dict[str, Any] = {
        f.name: fmean(getattr(t, f.name) for t in found) for f in fields(Timing) if f.type == "float"
    }
    for name in ("training", "answering"):
        means[name] = {key: fmean(getattr(t, name)[key] for t in found) for key in getattr(found[0], name)}
    return Timing(**{**means, "start": start, "peak": max(t.peak for t in found), "idle": max(t.idle for t in found)})


def _next(results: Any, children: Sequence[Any]) -> Any:
    """Return the next process's result. Raises LeewayError if one failed or died."""
    while results.empty():
        if not any(c.is_alive() for c in children) and results.empty():
            raise LeewayError("--measure: a process was killed (probably out of memory)", fix="leave --measure out")
        time.sleep(0.05)
    found = results.get()
    if isinstance(found, Exception):
        for child in children:
            child.kill()
        raise found
    return found


def _process(raw: dict[str, Any], scratch: Path, barrier: Any, results: Any) -> None:
    try:
        prepared = prepare(Spec.model_validate(raw))
        results.put("ready")
        barrier.wait()
        with compute_settings(prepared.spec):
            results.put(measure(prepared, scratch))
    except Exception as error:  # noqa: BLE001 - reported by the parent process
        results.put(error if isinstance(error, LeewayError) else LeewayError(f"--measure: {error}"))
        barrier.abort()


def measure(prepared: Prepared, scratch: Path) -> Timing:
    """Measure in this process; memory is its peak so far."""
    scratch.mkdir()
    work, found = Worker(prepared, RunDir(scratch)), Timing()
    began, cpu = time.perf_counter(), time.process_time()
    first = began
    work.base()
    found.load, found.idle = time.perf_counter() - began, _peak_memory()
    reference: list[tuple[float, int]] = []  # seconds, tokens
    for aliases in _classes(prepared):
        rate = _train(work, aliases[0], scratch, found, reference)
        found.training |= dict.fromkeys(aliases, rate)
    if tokens := sum(n for _, n in reference):
        found.reference = sum(s for s, _ in reference) / tokens
    began = time.perf_counter()
    model = work.base()
    found.checkout = time.perf_counter() - began
    adapters.attach(model, work.adapter, seed=0)
    backend = TransformersBackend(model, "", prepared.spec.evals.batch, "failure", prepared.spec.evals.thinking)
    with adapters.merged(model):
        for e in prepared.evals:
            if prompts := [p for p in e.prompts() for _ in range(p.samples)]:
                found.answering[e.key] = _answer(backend, e, prompts)
    found.peak = _peak_memory()
    available = (time.perf_counter() - first) * prepared.spec.threads
    found.share = min(1.0, (time.process_time() - cpu) / available) if work.base().device.type == "cpu" else 1.0
    return found


def _peak_memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)


def _classes(prepared: Prepared) -> list[list[str]]:
    """Group objectives with the same cost per token."""
    found: dict[tuple[object, ...], list[str]] = {}
    for alias, o in prepared.objectives.items():
        found.setdefault((o.needs_pairs, o.needs_reference, o.auxiliary, o.control_tokens), []).append(alias)
    return list(found.values())


def _train(work: Worker, alias: str, scratch: Path, found: Timing, reference: list[tuple[float, int]]) -> float:
    """Return the seconds per processed token."""
    seed = work.prepared.spec.seeds[0]
    schedule = _few(work.prepared, alias, seed)
    references = ReferenceCache(scratch / "references") if work.prepared.spec.reference == "cached" else None
    trial = work.trial(alias, seed, schedule, references)
    began = time.perf_counter()
    tokens = trial.precompute_reference()
    reference.append((time.perf_counter() - began, tokens))
    steps: list[Step] = []
    trial.train_to(schedule.stops[0], scratch / "steps", steps.append)
    steps = steps[1:] or steps
    began = time.perf_counter()
    trial.save(scratch / "checkpoint", schedule.stops[0])
    found.checkpoint = time.perf_counter() - began
    return sum(s.seconds for s in steps) / sum(s.processed_tokens for s in steps)


def _few(prepared: Prepared, alias: str, seed: int) -> Schedule:
    """Return steps spread over a trajectory, a warm-up step first, including the one with the most tokens."""
    steps, renderer = prepared.schedules[alias, seed].steps, prepared.renderer(alias, seed)
    spaced = [k * (len(steps) - 1) // STEPS for k in range(STEPS + 1)]
    near = steps[:: max(1, len(steps) // 50)]
    most = max(near, key=lambda slots: sum(renderer.processed(s) for s in slots))
    chosen = (*(steps[k] for k in dict.fromkeys(spaced)), most)
    return Schedule(chosen, (BudgetStop(0, len(chosen), 0, 0, 0.0, ""),))


def _answer(backend: TransformersBackend, e: Eval, prompts: Sequence[Prompt]) -> float:
    """Return the seconds of the whole eval at one checkpoint, extrapolated from some of its batches."""
    began = time.perf_counter()
    lengths = [len(backend.chat.prompt_ids(p.conversation)) for p in prompts]
    reading = time.perf_counter() - began
    by_length = [prompts[k] for k in sorted(range(len(prompts)), key=lengths.__getitem__)]
    seconds, chosen = 0.0, _batches(by_length, backend.batch)
    for batch in chosen:
        began = time.perf_counter()
        if e.work == "score":
            backend.choose([p.conversation for p in batch], batch[0].options, lambda _: None)
        else:
            requests = [Request(p.conversation, p.max_new_tokens, p.temperature) for p in batch]
            backend.complete(requests, lambda _: None)
        seconds += time.perf_counter() - began
    return reading + seconds * len(prompts) / sum(map(len, chosen))


def _batches(prompts: Sequence[Prompt], size: int) -> list[Sequence[Prompt]]:
    whole = [prompts[k : k + size] for k in range(0, len(prompts), size)]
    return [whole[k] for k in sorted({round(k * (len(whole) - 1) / (BATCHES - 1)) for k in range(BATCHES)})]


@dataclass(frozen=True)
class Measured:
    """Hours of work summed over workers, wall-clock hours of the run, and the memory of all processes."""

    workers: int
    training_hours: float
    reference_hours: float
    answering_hours: float
    setup_hours: float
    hours: float
    memory_gib: float
    untimed: tuple[str, ...]
    share: float = 1.0

    def lines(self) -> Iterator[str]:
        several = f" with {self.workers} workers" if self.workers > 1 else ""
        parts = {
            "training": self.training_hours,
            "references": self.reference_hours,
            "answering": self.answering_hours,
            "loading and saving": self.setup_hours,
        }
        breakdown = ", ".join(f"{what} {as_time(hours)}" for what, hours in parts.items())
        together = ", over all workers" if several else ""
        yield f"measured on this machine{several}: {as_time(self.hours)} ({breakdown}{together})"
        if self.share < QUIET:
            yield (
                f"  other processes took {1 - self.share:.0%} of the CPU time meanwhile: on a quiet machine "
                f"{as_time(self.hours * self.share)}"
            )
        yield f"  memory ~{self.memory_gib:.1f} GiB at their peaks"
        if self.untimed:
            yield f"  not timed: {', '.join(self.untimed)}"


def measured_hours(
    prepared: Prepared, jobs: Sequence[Job], trajectories: Sequence[TrajectoryPlan], timing: Timing, workers: int
) -> Measured:
    """Return the hours of a run that starts from scratch; `trajectories` belong to the `jobs` that train, in order.

    The arms of controls train as SFT does, so at the lowest rate of an objective.
    """
    precomputed = new_tokens(prepared) if prepared.spec.reference == "cached" else {}
    plans = dict(zip([p for p in jobs if p.kind in ("tune", "train")], trajectories, strict=True))
    each = sum(timing.answering.values())
    per_answer = each / max(1, sum(len(e) for e in prepared.evals if e.key in timing.answering))
    as_sft = min(timing.training.values(), default=0.0)
    training = {p: t.runs * t.processed_tokens * timing.training.get(p.alias, as_sft) for p, t in plans.items()}
    reference = {p: precomputed.get(p, 0) * timing.reference for p in jobs}
    measured = {
        p: [e for t in eval_targets(prepared, p) for e in prepared.evals_of(t.condition, t.objective)] for p in jobs
    }
    answering = {
        p: sum(timing.answering.get(e.key, 0.0) for e in measured[p])
        + learning_tokens(prepared, p)[0] * timing.reference
        for p in jobs
    }
    answering |= {p: t.runs * prepared.spec.optim.tune.items * per_answer for p, t in plans.items() if p.kind == "tune"}
    setup = {
        p: _checkouts(prepared, p) * timing.checkout + timing.checkpoint * len(p.budgets if p.kind == "train" else ())
        for p in jobs
    }
    seconds = {p: training.get(p, 0.0) + reference[p] + answering[p] + setup[p] for p in jobs}
    leading = 1 if workers > 1 else 0  # the coordinating process, which loads the model too
    begin = (1 + leading) * (timing.start + timing.load)
    return Measured(
        workers=workers,
        training_hours=sum(training.values()) / 3600,
        reference_hours=sum(reference.values()) / 3600,
        answering_hours=sum(answering.values()) / 3600,
        setup_hours=(sum(setup.values()) + (workers + leading) * timing.load) / 3600,
        hours=(begin + makespan(jobs, seconds, workers)) / 3600,
        memory_gib=(workers * timing.peak + leading * timing.idle) / GIB,
        untimed=(*(e.key for e in prepared.evals if e.key not in timing.answering), "drawing the report", "judges"),
        share=timing.share,
    )


def _checkouts(prepared: Prepared, job: Job) -> int:
    """Return how often a job checks out the base model."""
    if job.kind == "tune":
        return len(prepared.spec.optim.tune.lrs)
    return 1 if job.kind == "train" else len(eval_targets(prepared, job))


def makespan(jobs: Sequence[Job], seconds: dict[Job, float], workers: int) -> float:
    """Return when the last job ends if each free worker takes the first job whose dependencies are done.

    A trajectory reaches its checkpoints at a constant rate in source tokens.
    """
    free, ends, left = [0.0] * workers, dict[Job, float](), list(jobs)
    checkpoints = {(p.alias, p.seed, b): math.inf for p in jobs if p.kind == "train" for b in p.budgets}
    while left:
        k = free.index(min(free))
        now = free[k]
        job = next((p for p in left if _ready_at(p, ends, checkpoints, jobs) <= now), None)
        if job is None:
            free[k] = min(t for t in (*ends.values(), *checkpoints.values()) if t > now)
            continue
        free[k] = ends[job] = now + seconds[job]
        if job.kind == "train":
            checkpoints |= {(job.alias, job.seed, b): now + seconds[job] * b / job.budgets[-1] for b in job.budgets}
        left.remove(job)
    return max(free)


def _ready_at(job: Job, ends: dict[Job, float], checkpoints: dict[Checkpoint, float], jobs: Sequence[Job]) -> float:
    """Return when a job's dependencies are done; infinity while one has not started."""
    before = [ends.get(p, math.inf) for p in job.after if p in jobs]
    return max([0.0, *before, *(checkpoints[c] for c in job.needs if c in checkpoints)])
