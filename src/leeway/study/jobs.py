"""What a study is made of: pieces of work that leave all they have on disk, and which of them waits for which."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Literal

from leeway.data.stream import Schedule
from leeway.objectives import Objective
from leeway.objectives.objective import Condition
from leeway.study.prepare import Prepared

BASE = "base"


Checkpoint = tuple[str, int, int]  # objective, seed, budget


@dataclass(frozen=True)
class Job:
    """What one worker does at a time: measure the base, choose a learning rate, train a trajectory, or measure of it.

    A trajectory passes all its `budgets`; under a decaying learning rate each budget is a trajectory of its own. What
    is measured is one checkpoint (the base too) under one `condition`; or, where a server has to be started for it, all
    of a trajectory's under all of theirs (`condition` None). A piece begins when the pieces of `after` are finished and
    the checkpoints of `needs` are on disk: so one worker may measure where another trains on.
    """

    kind: Literal["base", "tune", "train", "measure"]
    alias: str
    seed: int = 0
    budgets: tuple[int, ...] = ()
    after: tuple[Job, ...] = ()
    alone: bool = False
    condition: Condition | None = None
    needs: tuple[Checkpoint, ...] = ()

    @property
    def log(self) -> str:
        """What its step log is called: by its budget too where it has that one alone."""
        return f"{self.alias}-s{self.seed}" + (f"-{self.budgets[0]}" if self.alone else "")

    def begins(self, left: Collection[Job], there: Callable[[Checkpoint], bool]) -> bool:
        """Whether it waits for none of the pieces that are `left`, and its checkpoints are `there`."""
        return not any(before in left for before in self.after) and all(map(there, self.needs))


@dataclass(frozen=True)
class EvalTarget:
    """A checkpoint under one test-time condition: whose rows these are."""

    objective: str
    seed: int
    budget: int
    condition: Condition


def jobs_of(prepared: Prepared) -> list[Job]:
    """All of a study, in the order in which they are begun where several could be.

    Trajectories come before what is measured of them, and the most work first, so that no worker ends long after the
    others.
    """
    spec = prepared.spec
    decays = spec.optim.schedule != "constant"
    cuts = [(b,) for b in spec.budgets] if decays else [spec.budgets]
    trained: list[Job] = []
    tuned: dict[str, Job] = {}
    for seed in spec.seeds:
        for o in spec.objectives:
            start = ((o.start.from_, seed, o.start.budget),) if o.start and o.start.from_ and o.start.budget else ()
            after: tuple[Job, ...] = ()
            if spec.optim.lr == "tuned":
                after = (tuned.setdefault(o.alias, Job("tune", o.alias, seed, needs=start)),)
            trained += [Job("train", o.alias, seed, b, after, alone=decays, needs=start) for b in cuts]
    trained.sort(key=lambda p: -relative_cost(prepared.objectives[p.alias]) * p.budgets[-1])
    base = _shards(prepared, Job("base", BASE))
    held_against = tuple(base) if spec.evals.stop == "decided" else ()  # a checkpoint is asked until it differs from it
    measured = [m for p in trained for m in _measuring(prepared, p, held_against)]
    return [*base, *tuned.values(), *trained, *measured]


def _measuring(prepared: Prepared, trajectory: Job, after: tuple[Job, ...] = ()) -> list[Job]:
    """What is measured of a trajectory, as soon as its checkpoints are there and the pieces of `after` are finished."""
    alias, seed = trajectory.alias, trajectory.seed
    served = prepared.spec.evals.backend == "vllm"
    found = []
    for budgets in [trajectory.budgets] if served else [(b,) for b in trajectory.budgets]:
        needs = tuple((alias, seed, b) for b in budgets)
        found += _shards(prepared, Job("measure", alias, seed, budgets, after, needs=needs))
    return found


def _shards(prepared: Prepared, whole: Job) -> list[Job]:
    """A piece for each condition; or `whole` itself, where one server answers for all."""
    if prepared.spec.evals.backend == "vllm":
        return [whole]
    return [replace(whole, condition=who.condition) for who in eval_targets(prepared, whole)]


def eval_targets(prepared: Prepared, piece: Job) -> list[EvalTarget]:
    """Whom a piece measures: checkpoints under conditions; the base under all that some objective is tested under."""
    if piece.kind == "base":
        found = [EvalTarget(BASE, 0, 0, condition) for condition in prepared.base_conditions]
    elif piece.kind == "measure":
        found = [
            EvalTarget(piece.alias, piece.seed, budget, condition)
            for budget in piece.budgets
            for condition in prepared.conditions(piece.alias, budget)
        ]
    else:
        return []
    return [who for who in found if piece.condition in (None, who.condition)]


def schedule_of(prepared: Prepared, piece: Job) -> Schedule:
    """A trajectory's steps and the budgets that it passes: no further than its last one."""
    whole = prepared.schedules[piece.alias, piece.seed]
    marks = tuple(m for m in whole.marks if m.budget in piece.budgets)
    return Schedule(whole.steps[: marks[-1].step], marks)


def relative_cost(objective: Objective) -> float:
    """Return training work per source token: a pair is two sequences, an auxiliary example one, a reference half."""
    sequences = (2.0 if objective.needs_pairs else 1.0) + (1.0 if objective.auxiliary else 0.0)
    return sequences * (1.0 if objective.needs_reference == "nothing" else 1.5)
