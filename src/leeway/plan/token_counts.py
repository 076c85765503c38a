"""A plan's training runs: steps and tokens, counted over what would be rendered.

What a study asks of its references: which sequences, whose final states are kept, and what that takes on disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from leeway.data.chat import Sequence
from leeway.data.stream import Schedule
from leeway.model.reference_cache import key
from leeway.objectives import Objective
from leeway.objectives.objective import Plain
from leeway.study.jobs import Job, jobs_of, schedule_of
from leeway.study.prepare import Prepared
from leeway.training.batch import Batch, Renderer
from leeway.training.precompute import first_asked, reference_tokens

Who = tuple[object, ...]
_Entry = tuple[Who, tuple[int, ...], int]  # which reference, a sequence's ids, its start
FLOAT32 = 4  # bytes of a log-probability
INDEX = 8 + 8 + 8  # bytes of a sequence's key, its end and its length


@dataclass(frozen=True)
class ReferenceWork:
    """Of one study, in a store that holds nothing of it yet: shared sequences count once."""

    sequences: int
    tokens: int
    measured: int
    bytes: int


def compared_with(prepared: Prepared, alias: str, seed: int) -> Who:
    """Which model an objective is held against, as far as a study file tells: equal ones are the same."""
    asked = prepared.spec.objective(alias)
    if asked.start is None or asked.reference == "base":
        return ("base",)
    if asked.start.adapter is not None:
        return ("adapter", asked.start.adapter)
    return ("start", asked.start.from_, asked.start.budget, seed)


def states_of(prepared: Prepared) -> dict[Who, frozenset[str]]:
    """By reference, the keys of the sequences whose final states some objective needs beside another that needs none.

    Whoever asks first keeps them, so that nothing is asked twice.
    """
    needs = {o.needs_reference for o in prepared.objectives.values()}
    if not needs >= {"logps", "distribution"}:
        return {}
    found: dict[Who, set[str]] = {}
    for piece in _asking(prepared):
        if prepared.objectives[piece.alias].needs_reference == "distribution":
            named = found.setdefault(compared_with(prepared, piece.alias, piece.seed), set())
            named |= {key(s) for s in _sequences(prepared, piece)}
    return {who: frozenset(named) for who, named in found.items()}


def reference_work(prepared: Prepared, hidden: int, width: int) -> ReferenceWork:
    """Of a model whose final states are `hidden` numbers of `width` bytes."""
    found: dict[str, set[_Entry]] = {"logps": set(), "distribution": set()}
    for piece in _asking(prepared):
        found[prepared.objectives[piece.alias].needs_reference] |= set(_entries(prepared, piece))
    every = found["logps"] | found["distribution"]
    kept = _measured(found["logps"]) * FLOAT32 + _measured(found["distribution"]) * hidden * width
    return ReferenceWork(
        sequences=len(every),
        tokens=sum(len(ids) for _, ids, _ in every),
        measured=_measured(every),
        bytes=len(every) * INDEX + kept,
    )


def _measured(entries: set[_Entry]) -> int:
    return sum(len(ids) - start for _, ids, start in entries)


def new_tokens(prepared: Prepared) -> dict[Job, int]:
    """Tokens that each trajectory has to ask about itself, if they ask one after another."""
    known: set[_Entry] = set()
    found: dict[Job, int] = {}
    for piece in _asking(prepared):
        new = set(_entries(prepared, piece)) - known
        known |= new
        found[piece] = sum(len(ids) for _, ids, _ in new)
    return found


def _entries(prepared: Prepared, piece: Job) -> Iterator[_Entry]:
    who = compared_with(prepared, piece.alias, piece.seed)
    yield from ((who, s.ids, s.start) for s in _sequences(prepared, piece))


def _asking(prepared: Prepared) -> Iterator[Job]:
    """The trajectories whose references are asked beforehand. A sweep of rates asks no more than they do, nearly."""
    for piece in jobs_of(prepared):
        if prepared.spec.reference == "live":
            return
        if piece.kind == "train" and prepared.objectives[piece.alias].needs_reference != "nothing":
            yield piece


def _sequences(prepared: Prepared, piece: Job) -> Iterator[Sequence]:
    renderer, schedule = prepared.renderer(piece.alias, piece.seed), schedule_of(prepared, piece)
    yield from (s for _, s, new in first_asked(batches_of(prepared, renderer, schedule)) if new)


def batches_of(prepared: Prepared, renderer: Renderer, schedule: Schedule) -> Iterator[Batch]:
    """A trajectory's batches; where pairs are still to be drawn, rejected answers are other ones than the preferred."""
    undrawn = prepared.pairs is None and renderer.objective.needs_pairs
    for k, slots in enumerate(schedule.steps, 1):
        batch = renderer.batch(k, slots)
        yield replace(batch, rendered=tuple(map(_told_apart, batch.rendered))) if undrawn else batch


def _told_apart(example: tuple[Sequence, ...]) -> tuple[Sequence, ...]:
    """The rejected answer, as long as the preferred one that stands in for it, with a token that is none."""
    return (example[0], *(replace(s, ids=(*s.ids[:-1], -1)) for s in example[1:]))


@dataclass(frozen=True)
class TrajectoryPlan:
    """One training run: token counts are exact, `processed` and `reference` counted over its rendered sequences.

    `runs` is above one for a sweep of learning rates: that many runs of this size.
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
    reference_tokens: int


def trajectory(prepared: Prepared, piece: Job) -> TrajectoryPlan:
    objective, renderer = prepared.objectives[piece.alias], prepared.renderer(piece.alias, piece.seed)
    tune = prepared.spec.optim.tune
    if piece.kind == "tune":
        assert prepared.tuning is not None
        schedule, runs, purpose = (
            prepared.tuning.schedules[piece.alias],
            len(tune.lrs),
            f"each of {len(tune.lrs)} rates",
        )
    else:
        schedule, runs, purpose = schedule_of(prepared, piece), 1, ""
    targets, processed = _rendered_tokens(renderer, schedule)
    return TrajectoryPlan(
        objective=piece.alias,
        purpose=purpose,
        seed=piece.seed,
        runs=runs,
        budgets=tuple(m.budget for m in schedule.marks),
        steps=len(schedule.steps),
        source_tokens=schedule.marks[-1].source_tokens,
        target_tokens=targets,
        processed_tokens=processed,
        reference_tokens=_reference_tokens(prepared, objective, renderer, schedule, processed),
    )


def _rendered_tokens(renderer: Renderer, schedule: Schedule) -> tuple[int, int]:
    """(target tokens, processed tokens); an example is rendered once where every epoch renders it alike."""
    objective: Any = renderer.objective
    alike = not objective.auxiliary and type(objective).worst_case is Plain.worst_case  # nothing is drawn
    known: dict[str, tuple[int, int]] = {}
    targets = processed = 0
    for slot in (s for step in schedule.steps for s in step):
        found = known.get(slot.example.id)
        if found is None:
            rendered = renderer.rendered(slot)
            lengths = [len(s.ids) for s in (*rendered, *renderer.baseline(slot))]
            found = sum(s.targets for s in rendered), sum(lengths)
            if alike:
                known[slot.example.id] = found
        targets, processed = targets + found[0], processed + found[1]
    return targets, processed


def _reference_tokens(
    prepared: Prepared, objective: Objective, renderer: Renderer, schedule: Schedule, processed: int
) -> int:
    """As the ledger will count them: live, all that is processed; cached, each sequence once."""
    if objective.needs_reference == "nothing":
        return 0
    if prepared.spec.reference == "live":
        return processed
    return reference_tokens(batches_of(prepared, renderer, schedule))
