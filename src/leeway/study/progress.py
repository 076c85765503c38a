"""Live progress with an ETA: a rich bar on a terminal, else one line per step or batch; nothing when quiet."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from leeway.data.stream import BudgetStop
from leeway.evals.eval import Eval, Work
from leeway.objectives.objective import PLAIN
from leeway.study.jobs import EvalTarget
from leeway.training.loop import Step
from leeway.training.trajectory import Trajectory

Kind = Literal["train"] | Work
OnProgress = Callable[[Kind, float, str], None]  # kind of work, units done, what
Event = tuple[Kind, float, float, str]  # kind of work, units done, seconds, what

PRIOR = {"train": 1e-4, "generate": 6e-3, "score": 1e-3}  # seconds per unit before anything is measured


def of_training(
    on_progress: OnProgress, trajectory: Trajectory, stop: BudgetStop
) -> tuple[Callable[[Step], None], Callable[[int, int], None]]:
    """Return callbacks that report optimiser steps on the way to `stop`, and tokens of the precomputed reference."""
    name = f"{trajectory.alias} s{trajectory.seed}"

    def on_step(step: Step) -> None:
        what = f"{name} step {step.step}/{stop.step} to {stop.budget:,} tokens | loss {step.loss:.4f}"
        speed = f"{step.processed_tokens / step.seconds:,.0f} tok/s"
        on_progress("train", step.processed_tokens + step.reference_tokens / 2, f"{what} | {speed}")

    def on_reference(done: int, total: int) -> None:
        on_progress("train", 0.0, f"{name} precomputing its reference | {done:,}/{total:,} tokens")

    return on_step, on_reference


def on_answers(on_progress: OnProgress, target: str, e: Eval) -> Callable[[int], None]:
    """Return a callback that counts the answers of an eval."""
    answered, total, work = 0, len(e), e.work

    def report(n: int) -> None:
        nonlocal answered
        answered += n
        on_progress(work, n, f"{target} | {e.key} {answered}/{total}")

    return report


def describe(target: EvalTarget) -> str:
    """Return a target's name; the base and a checkpoint of unknown budget have no seed or budget."""
    at = f"{target.objective} s{target.seed} at {target.budget:,} tokens" if target.budget else target.objective
    return at if target.condition == PLAIN else f"{at} under {target.condition.name}"


@dataclass
class Clock:
    """Remaining seconds, from the units of work left and the pace so far, by kind of work."""

    left: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PRIOR, 0.0))
    done: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PRIOR, 0.0))
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PRIOR, 0.0))

    def spend(self, kind: Kind, units: float, seconds: float) -> None:
        self.left[kind] = max(0.0, self.left[kind] - units)
        self.done[kind] += units
        self.seconds[kind] += seconds

    def pace(self, kind: str) -> float:
        return self.seconds[kind] / self.done[kind] if self.done[kind] else PRIOR[kind]

    def eta(self) -> float:
        return sum(units * self.pace(kind) for kind, units in self.left.items())

    def fraction_done(self) -> float:
        spent, eta = sum(self.seconds.values()), self.eta()
        return spent / (spent + eta) if spent + eta else 1.0


class Reporter:
    """Prints a run's progress to stderr."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.clock = Clock()
        self.workers = 1
        self._quiet = quiet
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if not quiet and sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.fields[what]}", markup=False),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[eta]}"),
                console=Console(stderr=True),
            )

    def __enter__(self) -> Reporter:
        if self._bar:
            self._bar.start()
            self._task = self._bar.add_task("", total=1.0, what="starting", eta="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def on_event(self, event: Event) -> None:
        """Count an event of a worker and print it with the new ETA."""
        kind, units, seconds, what = event
        self.clock.spend(kind, units, seconds)
        if self._quiet:
            return
        eta = f"ETA {duration(self.clock.eta() / self.workers)}"
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=self.clock.fraction_done(), what=what, eta=eta)
        else:
            print(f"{what} | {100 * self.clock.fraction_done():.0f}% | {eta}", file=sys.stderr, flush=True)

    def log(self, line: str) -> None:
        if self._quiet:
            return
        if self._bar:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Return seconds as 1:05 or 2:03:04."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
