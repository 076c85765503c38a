"""Progress of a run with an ETA: the events of workers, one row per trajectory, and lines for logs.

`screen` draws the rows on a terminal and in a notebook.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from leeway.data.stream import BudgetStop
from leeway.errors import printable
from leeway.evals.eval import Eval, Work
from leeway.objectives.objective import PLAIN
from leeway.study.jobs import EvalTarget
from leeway.training.loop import Step
from leeway.training.trajectory import Trajectory

Kind = Literal["train"] | Work


@dataclass(frozen=True)
class TrainingStep:
    """One optimiser step of a trajectory; as text, a line of a log."""

    trajectory: str
    step: int
    stop: int  # the step of the next checkpoint
    steps: int  # of the whole trajectory
    budget: int  # of the next checkpoint
    loss: float  # nats
    speed: float  # processed tokens per second

    def __str__(self) -> str:
        what = f"{self.trajectory} step {self.step}/{self.stop} to {self.budget:,} tokens | loss {self.loss:.4f}"
        return f"{what} | {self.speed:,.0f} tok/s"


@dataclass(frozen=True)
class EvalProgress:
    """The answers to an eval so far at one checkpoint; as text, a line of a log."""

    target: str
    eval: str
    answered: int
    total: int

    def __str__(self) -> str:
        return f"{self.target} | {self.eval} {self.answered}/{self.total}"


Update = TrainingStep | EvalProgress | str
OnProgress = Callable[[Kind, float, Update], None]  # kind of work, units done, what
Event = tuple[Kind, float, float, Update]  # kind of work, units done, seconds, what

PRIOR = {"train": 1e-4, "generate": 6e-3, "score": 1e-3}  # seconds per unit before anything is measured


def trajectory_name(alias: str, seed: int) -> str:
    return f"{alias} s{seed}"


def of_training(
    on_progress: OnProgress, trajectory: Trajectory, stop: BudgetStop
) -> tuple[Callable[[Step], None], Callable[[int, int], None]]:
    """Return callbacks that report optimiser steps on the way to `stop`, and tokens of the precomputed reference."""
    name = trajectory_name(trajectory.alias, trajectory.seed)

    def on_step(step: Step) -> None:
        units, speed = step.processed_tokens + step.reference_tokens / 2, step.processed_tokens / step.seconds
        where = (step.step, stop.step, len(trajectory.schedule.steps), stop.budget)
        on_progress("train", units, TrainingStep(name, *where, step.loss, speed))

    def on_reference(done: int, total: int) -> None:
        on_progress("train", 0.0, f"{name} precomputing its reference | {done:,}/{total:,} tokens")

    return on_step, on_reference


def on_answers(on_progress: OnProgress, target: str, e: Eval) -> Callable[[int], None]:
    """Return a callback that counts the answers of an eval."""
    answered, total, work = 0, len(e), e.work

    def report(n: int) -> None:
        nonlocal answered
        answered += n
        on_progress(work, n, EvalProgress(target, e.key, answered, total))

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


class View(Protocol):
    """Shows a run on a screen: rows that are redrawn, and lines above them."""

    def start(self, rows: Sequence[Row]) -> None: ...

    def update(self, event: Event, clock: Clock, workers: int) -> None: ...

    def log(self, line: str) -> None: ...

    def stop(self) -> None: ...


@dataclass
class Row:
    """One trajectory's progress: its last step, and its training time in this run."""

    name: str
    steps: int
    budget: int  # the last
    step: int = 0  # done, of an earlier run as well
    last: TrainingStep | None = None
    seconds: float = 0.0  # of training in this run
    began_at: int = 0  # step

    def train(self, at: TrainingStep, seconds: float) -> None:
        if self.last is None or at.step <= self.last.step:  # the first, or a learning-rate sweep has ended
            self.began_at, self.seconds = at.step - 1, 0.0
        self.step, self.last, self.seconds = at.step, at, self.seconds + seconds

    @property
    def steps_in_all(self) -> int:
        return self.last.steps if self.last else self.steps

    @property
    def done(self) -> bool:
        return self.step >= self.steps_in_all

    def eta(self) -> float | None:
        """Return the seconds of training that are left; None before the first step."""
        if self.last is None:
            return None
        return self.seconds / (self.step - self.began_at) * (self.steps_in_all - self.step)


class Lines:
    """One plain line per step or batch, for logs."""

    def start(self, rows: Sequence[Row]) -> None:
        """Print nothing: each line names its trajectory."""

    def update(self, event: Event, clock: Clock, workers: int) -> None:
        share, eta = 100 * clock.fraction_done(), duration(clock.eta() / workers)
        self.log(f"{event[3]} | {share:.0f}% | ETA {eta}")

    def log(self, line: str) -> None:
        print(printable(line), file=sys.stderr, flush=True)

    def stop(self) -> None:
        """Print nothing."""


class Reporter:
    """Prints a run's progress: rows on a terminal or in a notebook, plain lines in a log, nothing when quiet."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.clock = Clock()
        self.workers = 1
        self.rows: list[Row] = []
        self._view: View | None = None if quiet else choose_view()

    def __enter__(self) -> Reporter:
        if self._view:
            self._view.start(self.rows)
        return self

    def __exit__(self, *_: object) -> None:
        if self._view:
            self._view.stop()

    def on_event(self, event: Event) -> None:
        """Count an event of a worker and show it with the new ETA."""
        kind, units, seconds, what = event
        self.clock.spend(kind, units, seconds)
        if isinstance(what, TrainingStep):
            for row in (r for r in self.rows if r.name == what.trajectory):
                row.train(what, seconds)
        if self._view:
            self._view.update(event, self.clock, self.workers)

    def log(self, line: str) -> None:
        if self._view:
            self._view.log(line)

    def summarise(self, folder: Path) -> None:
        """Show the table of objectives and the finding of a finished run."""
        if self._view:
            from leeway.report.objective_table import load_objective_table
            from leeway.study.screen import show_objective_table

            show_objective_table(load_objective_table(folder))


def choose_view() -> View:
    """Return the view for where this process runs: a notebook, a terminal, or a log."""
    from leeway.study import screen

    return screen.notebook() or screen.terminal() or Lines()


def duration(seconds: float) -> str:
    """Return seconds as 1:05 or 2:03:04."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
