"""Live progress with an ETA: rich on a terminal, one plain line per step or batch otherwise, nothing when quiet.

What is said of a piece while it is carried out, for whoever shows progress: a kind of work, how much of it, what.
"""

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
from leeway.study.jobs import BASE, EvalTarget
from leeway.training.loop import Step
from leeway.training.trajectory import Trajectory

Kind = Literal["train"] | Work
Tell = Callable[[Kind, float, str], None]


def of_steps(tell: Tell, trajectory: Trajectory, mark: BudgetStop) -> Callable[[Step], None]:
    def told(done: Step) -> None:
        tell(
            "train",
            done.processed_tokens + done.reference_tokens / 2,
            f"{trajectory.alias} s{trajectory.seed} step {done.step}/{mark.step} to {mark.budget:,} tokens "
            f"| loss {done.loss:.4f} | {done.processed_tokens / done.seconds:,.0f} tok/s",
        )

    return told


def of_asking(tell: Tell, trajectory: Trajectory) -> Callable[[int, int], None]:
    """Of a reference that is asked beforehand."""

    def told(done: int, of: int) -> None:
        tell("train", 0.0, f"{trajectory.alias} s{trajectory.seed} asking its reference | {done:,}/{of:,} tokens")

    return told


def of_answers(tell: Tell, at: str, e: Eval) -> Callable[[int], None]:
    answered, total, work = 0, len(e), e.work

    def told(n: int) -> None:
        nonlocal answered
        answered += n
        tell(work, n, f"{at} | {e.key} {answered}/{total}")

    return told


def said(who: EvalTarget) -> str:
    """A checkpoint under its condition, as the progress names it."""
    at = BASE if who.objective == BASE else f"{who.objective} s{who.seed} at {who.budget:,} tokens"
    return at if who.condition == PLAIN else f"{at} under {who.condition.name}"


PRIOR = {
    "train": 1e-4,
    "generate": 6e-3,
    "score": 1e-3,
}  # seconds per unit, until this machine has shown its own


@dataclass
class Clock:
    """Remaining seconds from the work left of each kind and the pace seen so far."""

    left: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PRIOR, 0.0))
    done: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PRIOR, 0.0))
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PRIOR, 0.0))

    def add(self, kind: Kind, units: float) -> None:
        self.left[kind] += units

    def spend(self, kind: Kind, units: float, seconds: float) -> None:
        self.left[kind] = max(0.0, self.left[kind] - units)
        self.done[kind] += units
        self.seconds[kind] += seconds

    def pace(self, kind: str) -> float:
        return self.seconds[kind] / self.done[kind] if self.done[kind] else PRIOR[kind]

    def eta(self) -> float:
        return sum(units * self.pace(kind) for kind, units in self.left.items())

    def share(self) -> float:
        spent, eta = sum(self.seconds.values()), self.eta()
        return spent / (spent + eta) if spent + eta else 1.0


class Reporter:
    """Where a run says what it does. `quiet` says nothing."""

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

    def heard(self, event: tuple[Kind, float, float, str]) -> None:
        """A worker did so many units of a kind in so many seconds."""
        kind, units, seconds, what = event
        self.clock.spend(kind, units, seconds)
        if self._quiet:
            return
        eta = f"ETA {duration(self.clock.eta() / self.workers)}"
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=self.clock.share(), what=what, eta=eta)
        else:
            print(f"{what} | {100 * self.clock.share():.0f}% | {eta}", file=sys.stderr, flush=True)

    def say(self, line: str) -> None:
        if self._quiet:
            return
        if self._bar:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """1:05 or 2:03:04."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
