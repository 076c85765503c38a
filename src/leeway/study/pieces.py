"""What a study is made of: pieces of work that leave all they have on disk, and which of them waits for which."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from leeway.data.batches import Schedule
from leeway.objectives import Objective
from leeway.objectives.objective import Condition
from leeway.study.prepare import Prepared

BASE = "base"


@dataclass(frozen=True)
class Piece:
    """What one worker does at a time: measure the base, choose a learning rate, or train and measure a trajectory.

    A trajectory passes all its `budgets`; under a decaying learning rate each budget is a trajectory of its own.
    `after` names the pieces whose checkpoints or choices it needs.
    """

    kind: Literal["base", "tune", "train"]
    alias: str
    seed: int = 0
    budgets: tuple[int, ...] = ()
    after: tuple[Piece, ...] = ()
    alone: bool = False

    @property
    def log(self) -> str:
        """What its step log is called: by its budget too where it has that one alone."""
        return f"{self.alias}-s{self.seed}" + (f"-{self.budgets[0]}" if self.alone else "")


@dataclass(frozen=True)
class Who:
    """A checkpoint under one test-time condition: whose rows these are."""

    objective: str
    seed: int
    budget: int
    condition: Condition


def pieces_of(prepared: Prepared) -> list[Piece]:
    """The base and every trajectory, the most work first, so that no worker ends long after the others."""
    spec = prepared.spec
    decays = spec.optim.schedule != "constant"
    cuts = [(b,) for b in spec.budgets] if decays else [spec.budgets]
    base = Piece("base", BASE)
    held_against = (base,) if spec.evals.stop == "decided" else ()  # a checkpoint is asked until it differs from it
    trained: dict[tuple[str, int, int], Piece] = {}
    tuned: dict[str, Piece] = {}
    for seed in spec.seeds:
        for o in spec.objectives:
            after: list[Piece] = []
            if o.start and o.start.from_ and o.start.budget:
                after.append(trained[o.start.from_, seed, o.start.budget])
            if spec.optim.lr == "tuned":
                first = tuple(p for p in after if p.seed == spec.seeds[0])
                after.append(tuned.setdefault(o.alias, Piece("tune", o.alias, seed, after=first)))
            for budgets in cuts:
                piece = Piece("train", o.alias, seed, budgets, (*held_against, *after), alone=decays)
                trained |= {(o.alias, seed, b): piece for b in budgets}
    trajectories = sorted(
        dict.fromkeys(trained.values()),
        key=lambda p: (-relative_cost(prepared.objectives[p.alias]) * p.budgets[-1], _depth(p)),
    )
    return [base, *tuned.values(), *trajectories]


def whos(prepared: Prepared, piece: Piece) -> list[Who]:
    """Every checkpoint of a piece under its conditions; the base under all that some objective is tested under."""
    if piece.kind == "base":
        return [Who(BASE, 0, 0, condition) for condition in prepared.base_conditions]
    return [
        Who(piece.alias, piece.seed, budget, condition)
        for budget in piece.budgets
        for condition in prepared.conditions(piece.alias, budget)
    ]


def schedule_of(prepared: Prepared, piece: Piece) -> Schedule:
    """A trajectory's steps and the budgets that it passes: no further than its last one."""
    whole = prepared.schedules[piece.alias, piece.seed]
    marks = tuple(m for m in whole.marks if m.budget in piece.budgets)
    return Schedule(whole.steps[: marks[-1].step], marks)


def relative_cost(objective: Objective) -> float:
    """Training work per source token: a pair is two sequences, a companion one more, a reference pass about half."""
    sequences = (2.0 if objective.needs_pairs else 1.0) + (1.0 if objective.companion else 0.0)
    return sequences * (1.0 if objective.needs_reference == "nothing" else 1.5)


def _depth(piece: Piece) -> int:
    return 1 + max((_depth(p) for p in piece.after), default=0)
