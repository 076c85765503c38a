"""A plan's training runs: steps and tokens, counted over what would be rendered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from leeway.data.batches import Schedule
from leeway.objectives import Objective
from leeway.objectives.objective import Plain
from leeway.study.pieces import Piece, schedule_of
from leeway.study.prepare import Prepared
from leeway.study.referred import batches_of
from leeway.training.beforehand import reference_tokens
from leeway.training.renderer import Renderer


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


def trajectory(prepared: Prepared, piece: Piece) -> TrajectoryPlan:
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
    alike = not objective.companion and type(objective).worst_case is Plain.worst_case  # nothing is drawn
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
