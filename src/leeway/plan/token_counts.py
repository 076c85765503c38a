"""Token counts of a plan: steps and tokens of each trajectory, and the sequences its reference models process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from leeway.data.chat import Sequence
from leeway.data.stream import Schedule
from leeway.model.packing import PrefixTree
from leeway.model.reference import key
from leeway.objectives.objective import Plain
from leeway.study.jobs import Job, jobs_of, schedule_of
from leeway.study.prepare import Prepared
from leeway.training.batch import Batch, Renderer, reference_sequences, reference_tokens

ReferenceId = tuple[object, ...]
_Entry = tuple[ReferenceId, tuple[int, ...], int]  # reference, token ids, first target
FLOAT32 = 4  # bytes per log-probability
INDEX = 8 + 8 + 8  # bytes per sequence: key, end, length


@dataclass(frozen=True)
class ReferenceWork:
    """Reference passes of one study with an empty cache; shared sequences count once.

    `measured` counts the tokens whose statistics are stored, `bytes` their size on disk.
    """

    sequences: int
    tokens: int
    measured: int
    bytes: int


def reference_id(prepared: Prepared, alias: str, seed: int) -> ReferenceId:
    """Return an id of the reference model; equal ids mean the same model."""
    objective = prepared.spec.objective(alias)
    if objective.start is None or objective.reference == "base":
        return ("base",)
    if objective.start.adapter is not None:
        return ("adapter", objective.start.adapter)
    return ("start", objective.start.from_, objective.start.budget, seed)


def states_of(prepared: Prepared) -> dict[ReferenceId, frozenset[str]]:
    """Return, by reference model, the sequences that need hidden states stored even if their first objective does not.

    Another objective needs them, and storing them in the first pass saves a second one.
    """
    needs = {o.needs_reference for o in prepared.objectives.values()}
    if not needs >= {"logps", "distribution"}:
        return {}
    found: dict[ReferenceId, set[str]] = {}
    for job in _with_reference(prepared):
        if prepared.objectives[job.alias].needs_reference == "distribution":
            named = found.setdefault(reference_id(prepared, job.alias, job.seed), set())
            named |= {key(s) for s in _sequences(prepared, job)}
    return {reference: frozenset(named) for reference, named in found.items()}


def reference_work(prepared: Prepared, hidden: int, width: int) -> ReferenceWork:
    """Return the reference work of a study; hidden states are `hidden` numbers of `width` bytes."""
    found: dict[str, set[_Entry]] = {"logps": set(), "distribution": set()}
    for job in _with_reference(prepared):
        found[prepared.objectives[job.alias].needs_reference] |= _entries(prepared, job)

    def measured(entries: set[_Entry]) -> int:
        return sum(len(ids) - start for _, ids, start in entries)

    every = found["logps"] | found["distribution"]
    stored = measured(found["logps"]) * FLOAT32 + measured(found["distribution"]) * hidden * width
    tokens = sum(len(ids) for _, ids, _ in every)
    return ReferenceWork(len(every), tokens, measured(every), len(every) * INDEX + stored)


def new_tokens(prepared: Prepared) -> dict[Job, int]:
    """Return the reference tokens that each trajectory computes if they run one after another with a shared cache."""
    known: set[_Entry] = set()
    found: dict[Job, int] = {}
    for job in _with_reference(prepared):
        new = _entries(prepared, job) - known
        known |= new
        found[job] = sum(len(ids) for _, ids, _ in new)
    return found


def _entries(prepared: Prepared, job: Job) -> set[_Entry]:
    reference = reference_id(prepared, job.alias, job.seed)
    return {(reference, s.ids, s.start) for s in _sequences(prepared, job)}


def _with_reference(prepared: Prepared) -> Iterator[Job]:
    """Yield the trajectories with a precomputed reference; a learning-rate sweep needs hardly any other sequences."""
    for job in jobs_of(prepared):
        if prepared.spec.reference == "live":
            return
        if job.kind == "train" and prepared.objectives[job.alias].needs_reference != "nothing":
            yield job


def _sequences(prepared: Prepared, job: Job) -> Iterator[Sequence]:
    renderer, schedule = prepared.renderer(job.alias, job.seed), schedule_of(prepared, job)
    yield from (s for _, s, new in reference_sequences(batches_of(prepared, renderer, schedule)) if new)


def batches_of(prepared: Prepared, renderer: Renderer, schedule: Schedule) -> Iterator[Batch]:
    """Yield a trajectory's batches; with pairs not yet sampled, rejected responses differ from the preferred ones."""
    undrawn = prepared.pairs is None and renderer.objective.needs_pairs
    for k, slots in enumerate(schedule.steps, 1):
        batch = renderer.batch(k, slots)
        yield replace(batch, rendered=tuple(map(_distinct, batch.rendered))) if undrawn else batch


def _distinct(example: tuple[Sequence, ...]) -> tuple[Sequence, ...]:
    """Give the rejected response, a copy of the preferred one, an impossible last token."""
    return (example[0], *(replace(s, ids=(*s.ids[:-1], -1)) for s in example[1:]))


def learning_tokens(prepared: Prepared, job: Job) -> tuple[int, int]:
    """Return the tokens of a learning check's passes over one checkpoint, and how many of them are measured."""
    if job.kind != "learning":
        return 0, 0
    passes = len(prepared.objectives[job.alias].conditions)
    sequences = [s for *_, own in prepared.learning.rendered(prepared.chat) for s in own]
    return passes * sum(len(s.ids) for s in sequences), passes * sum(s.measured for s in sequences)


@dataclass(frozen=True)
class TrajectoryPlan:
    """One training run, or `runs` of this size in a learning-rate sweep. Token counts are exact.

    `distinct_tokens`: those processed, with a shared beginning of an example's sequences once.
    """

    objective: str
    purpose: str
    seed: int
    runs: int
    budgets: tuple[int, ...]
    steps: int
    source_tokens: int
    target_tokens: int
    processed_tokens: int
    distinct_tokens: int
    reference_tokens: int


def trajectory(prepared: Prepared, job: Job) -> TrajectoryPlan:
    renderer = prepared.renderer(job.alias, job.seed)
    if job.kind == "tune":
        assert prepared.tuning is not None
        schedule, runs = prepared.tuning.schedules[job.alias], len(prepared.spec.optim.tune.lrs)
    else:
        schedule, runs = schedule_of(prepared, job), 1
    targets, processed, distinct = _rendered_tokens(renderer, schedule)
    reference = 0 if renderer.objective.needs_reference == "nothing" else processed  # as the ledger counts them
    if reference and prepared.spec.reference == "cached":  # each sequence once
        reference = reference_tokens(batches_of(prepared, renderer, schedule))
    return TrajectoryPlan(
        objective=job.alias,
        purpose=f"each of {runs} rates" if job.kind == "tune" else "",
        seed=job.seed,
        runs=runs,
        budgets=tuple(m.budget for m in schedule.stops),
        steps=len(schedule.steps),
        source_tokens=schedule.stops[-1].source_tokens,
        target_tokens=targets,
        processed_tokens=processed,
        distinct_tokens=distinct,
        reference_tokens=reference,
    )


def _rendered_tokens(renderer: Renderer, schedule: Schedule) -> tuple[int, int, int]:
    """Return (target, processed, distinct tokens); examples that render the same in every epoch are rendered once."""
    objective: Any = renderer.objective
    same_every_epoch = not objective.auxiliary and type(objective).worst_case is Plain.worst_case  # nothing is drawn
    known: dict[str, tuple[int, int, int]] = {}
    total = (0, 0, 0)
    for slot in (s for step in schedule.steps for s in step):
        found = known.get(slot.example.id)
        if found is None:
            rendered, baseline = renderer.rendered(slot), renderer.baseline(slot)
            alone = sum(len(s.ids) for s in baseline)
            distinct = len(PrefixTree.of(rendered).ids)
            found = sum(s.targets for s in rendered), sum(len(s.ids) for s in rendered) + alone, distinct + alone
            if same_every_epoch:
                known[slot.example.id] = found
        total = (total[0] + found[0], total[1] + found[1], total[2] + found[2])
    return total
