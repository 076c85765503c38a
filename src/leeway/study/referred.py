"""What a study asks of its references: which sequences, whose final states are kept, and what that takes on disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from leeway.data.batches import Schedule
from leeway.data.chat import Sequence
from leeway.model.references import key
from leeway.study.pieces import Piece, pieces_of, schedule_of
from leeway.study.prepare import Prepared
from leeway.training.batch import Batch
from leeway.training.beforehand import first_asked
from leeway.training.renderer import Renderer

Who = tuple[object, ...]
_Entry = tuple[Who, tuple[int, ...], int]  # which reference, a sequence's ids, its start
FLOAT32 = 4  # bytes of a log-probability
INDEX = 8 + 8 + 8  # bytes of a sequence's key, its end and its length


@dataclass(frozen=True)
class Asked:
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


def asked(prepared: Prepared, hidden: int, width: int) -> Asked:
    """Of a model whose final states are `hidden` numbers of `width` bytes."""
    found: dict[str, set[_Entry]] = {"logps": set(), "distribution": set()}
    for piece in _asking(prepared):
        found[prepared.objectives[piece.alias].needs_reference] |= set(_entries(prepared, piece))
    every = found["logps"] | found["distribution"]
    kept = _measured(found["logps"]) * FLOAT32 + _measured(found["distribution"]) * hidden * width
    return Asked(
        sequences=len(every),
        tokens=sum(len(ids) for _, ids, _ in every),
        measured=_measured(every),
        bytes=len(every) * INDEX + kept,
    )


def _measured(entries: set[_Entry]) -> int:
    return sum(len(ids) - start for _, ids, start in entries)


def new_tokens(prepared: Prepared) -> dict[Piece, int]:
    """Tokens that each trajectory has to ask about itself, if they ask one after another."""
    known: set[_Entry] = set()
    found: dict[Piece, int] = {}
    for piece in _asking(prepared):
        new = set(_entries(prepared, piece)) - known
        known |= new
        found[piece] = sum(len(ids) for _, ids, _ in new)
    return found


def _entries(prepared: Prepared, piece: Piece) -> Iterator[_Entry]:
    who = compared_with(prepared, piece.alias, piece.seed)
    yield from ((who, s.ids, s.start) for s in _sequences(prepared, piece))


def _asking(prepared: Prepared) -> Iterator[Piece]:
    """The trajectories whose references are asked beforehand. A sweep of rates asks no more than they do, nearly."""
    for piece in pieces_of(prepared):
        if prepared.spec.reference == "live":
            return
        if piece.kind == "train" and prepared.objectives[piece.alias].needs_reference != "nothing":
            yield piece


def _sequences(prepared: Prepared, piece: Piece) -> Iterator[Sequence]:
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
