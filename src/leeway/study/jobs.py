"""The jobs of a study and their dependencies. A job leaves all its results on disk, so any worker can run it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Literal

from leeway.data.stream import Schedule
from leeway.objectives import Objective
from leeway.objectives.objective import PLAIN, Condition
from leeway.study.controls import BASE_AGAIN, DOSED, RATE_ZERO
from leeway.study.prepare import Prepared

BASE = "base"

Checkpoint = tuple[str, int, int]  # objective, seed, budget


@dataclass(frozen=True)
class Job:
    """One unit of work: measure the base, tune a learning rate, train a trajectory, measure or check its checkpoints.

    A trajectory passes all its `budgets`; under a decaying learning rate each budget is a trajectory of its own
    (`exclusive`). A measurement covers one checkpoint under one `condition`, or, for a vLLM server, all checkpoints of
    a trajectory under all conditions (`condition` None). A job is ready once the jobs of `after` are complete and the
    checkpoints of `needs` are on disk, so one worker can measure while another trains on. A probe's job takes some of
    its `measures` (all if empty).
    """

    kind: Literal["base", "tune", "train", "measure", "learning", "check", "probe"]
    alias: str
    seed: int = 0
    budgets: tuple[int, ...] = ()
    after: tuple[Job, ...] = ()
    exclusive: bool = False
    condition: Condition | None = None
    needs: tuple[Checkpoint, ...] = ()
    measures: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.kind} {self.alias} s{self.seed}"

    @property
    def log_name(self) -> str:
        """The name of its step log, with the budget if the trajectory has only that one."""
        return f"{self.alias}-s{self.seed}" + (f"-{self.budgets[0]}" if self.exclusive else "")

    def is_ready(self, left: Collection[Job], has_checkpoint: Callable[[Checkpoint], bool]) -> bool:
        """Return whether no job of `after` is in `left` and all checkpoints of `needs` are on disk."""
        return not any(before in left for before in self.after) and all(map(has_checkpoint, self.needs))


@dataclass(frozen=True)
class EvalTarget:
    """A checkpoint under one test-time condition."""

    objective: str
    seed: int
    budget: int
    condition: Condition


def jobs_of(prepared: Prepared) -> list[Job]:
    """Return all jobs in order of priority.

    Trajectories come before measurements, and the longest first, so that no worker ends long after the others.
    """
    if prepared.external:
        return [Job("measure", alias, 0, (model.budget,)) for alias, model in prepared.external.items()]
    spec = prepared.spec
    decays = spec.optim.schedule != "constant"
    splits = [(b,) for b in spec.budgets] if decays else [spec.budgets]
    training: list[Job] = []
    tuning: dict[str, Job] = {}
    for seed in spec.seeds:
        for o in spec.objectives:
            start = ((o.start.from_, seed, o.start.budget),) if o.start and o.start.from_ and o.start.budget else ()
            after: tuple[Job, ...] = ()
            if spec.optim.lr == "tuned":
                after = (tuning.setdefault(o.alias, Job("tune", o.alias, seed, needs=start)),)
            training += [Job("train", o.alias, seed, b, after, exclusive=decays, needs=start) for b in splits]
    training.sort(key=lambda job: -relative_cost(prepared.objectives[job.alias]) * job.budgets[-1])
    served = spec.evals.backend.vllm is not None

    def by_condition(job: Job) -> list[Job]:
        """Split a measurement into one job per condition, unless one vLLM server answers them all."""
        return [job] if served else [replace(job, condition=t.condition) for t in eval_targets(prepared, job)]

    base = by_condition(Job("base", BASE))
    before = tuple(base) if spec.evals.stop == "decided" else ()  # sequential stopping contrasts with the base's rows
    measuring: list[Job] = []
    learning: list[Job] = []
    for job in training:
        checked = () if prepared.learning.missing else job.budgets
        learning += [Job("learning", job.alias, job.seed, (b,), needs=((job.alias, job.seed, b),)) for b in checked]
        for budgets in [job.budgets] if served else [(b,) for b in job.budgets]:
            needs = tuple((job.alias, job.seed, b) for b in budgets)
            measuring += by_condition(Job("measure", job.alias, job.seed, budgets, before, needs=needs))
    return [*base, *tuning.values(), *training, *measuring, *learning]


def control_jobs(prepared: Prepared) -> list[Job]:
    """Return the jobs of the study's controls, after its own: their rows and ledger lines are kept apart."""
    controls, jobs = prepared.controls, list[Job]()
    for alias, arm in controls.arms.items():
        for seed in (s for a, s in prepared.schedules if a == alias):
            tune = [Job("tune", arm.rate_of, prepared.spec.seeds[0])] if arm.lr is None and arm.rate_of else []
            train = Job("train", alias, seed, (arm.budget,), tuple(tune))
            kind: Literal["check", "measure"] = "check" if alias == RATE_ZERO else "measure"
            jobs += [train, Job(kind, alias, seed, (arm.budget,), needs=((alias, seed, arm.budget),))]
    return jobs + [Job("base", BASE_AGAIN)] * bool(controls.again)


def eval_targets(prepared: Prepared, job: Job) -> list[EvalTarget]:
    """Return the checkpoints and conditions that a job measures; the base under every condition of the study."""
    targets = []
    if job.kind == "base":
        conditions = prepared.base_conditions if job.alias == BASE else (PLAIN,)
        targets = [EvalTarget(job.alias, 0, 0, condition) for condition in conditions]
    for budget in job.budgets if job.kind == "measure" else ():
        targets += [EvalTarget(job.alias, job.seed, budget, c) for c in prepared.conditions(job.alias, budget)]
    return [target for target in targets if job.condition in (None, target.condition)]


def schedule_of(prepared: Prepared, job: Job) -> Schedule:
    """Return the steps and budgets of a job's trajectory, up to its last budget."""
    whole = prepared.schedules[job.alias, job.seed]
    stops = tuple(m for m in whole.stops if m.budget in job.budgets)
    return Schedule(whole.steps[: stops[-1].step], stops)


def compliant_count(prepared: Prepared, job: Job) -> int:
    """Return how many compliant answers a dose arm is trained on, repeats included."""
    return sum(item.example.id.startswith(DOSED) for step in schedule_of(prepared, job).steps for item in step)


def relative_cost(objective: Objective) -> float:
    """Return training work per source token: one unit per sequence, half a unit more for a reference pass."""
    sequences = (2.0 if objective.needs_pairs else 1.0) + (1.0 if objective.auxiliary else 0.0)
    return sequences * (1.0 if objective.needs_reference == "nothing" else 1.5)
