"""A reference that is asked before the first step, about each sequence once, and kept on disk.

What is kept of a sequence depends on that sequence and the reference alone, and never on who asked first, on what else
was asked or on the order: on a CPU each goes through by itself. On an accelerator, where nothing is promised of the
last bits, sequences of like length go through together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq

import torch

from leeway.data.chat import Sequence
from leeway.model.layout import Layout, lay
from leeway.model.load import Model
from leeway.model.reference import Reference, as_it_stands, as_reference, computed_as
from leeway.model.references import References, Said
from leeway.objectives import Objective
from leeway.training.loop import Batch, Optim, micro_batches

Tell = Callable[[int, int], None]


def first_asked(batches: Iterable[Batch]) -> Iterator[tuple[int, Sequence, bool]]:
    """Every distinct sequence of a trajectory in order: the step that needs it first, it, and whether it is new."""
    known: set[tuple[tuple[int, ...], int]] = set()
    for batch in batches:
        for s in (s for part in (batch.baseline, batch.rendered) for example in part for s in example):
            new = (s.ids, s.start) not in known
            known.add((s.ids, s.start))
            yield batch.step, s, new


def reference_tokens(batches: Iterable[Batch]) -> int:
    """What a trajectory needs of a reference that is asked beforehand, in tokens: each sequence once."""
    return sum(len(s.ids) for _, s, new in first_asked(batches) if new)


def ask_beforehand(
    model: Model,
    objective: Objective,
    batches: Iterable[Batch],
    settings: Optim,
    reference: Reference,
    references: References,
    *,
    taken: int = 0,
    tell: Tell = lambda *_: None,
) -> int:
    """See to it that all sequences of `batches` after step `taken` are kept, and release the reference's own weights.

    Returns how many tokens went through the model: none where somebody else asked before.
    """
    whole = objective.needs_reference == "distribution"
    layout: Layout = "fused" if settings.layout == "fused" else "padded"
    shelf = references.of(computed_as(model, reference, settings.autocast, layout))
    wanted: dict[tuple[tuple[int, ...], int], Sequence] = {}
    for step, s, new in first_asked(batches):
        if new:
            reference.spent[step] = reference.spent.get(step, 0) + len(s.ids)
        if step > taken:
            wanted[s.ids, s.start] = s

    def ask(sequences: Seq[Sequence], states: bool) -> Iterator[tuple[Sequence, Said]]:
        for group in _groups(sequences, model.device, settings.micro_tokens, layout):
            with torch.autocast(model.device.type, settings.autocast, enabled=settings.autocast is not None):
                logp_T, hidden_TD = as_it_stands(model, lay([[s] for s in group], model.device, layout))
            sizes = [s.measured for s in group]
            logps, hidden = torch.split(logp_T.cpu(), sizes), torch.split(hidden_TD.cpu(), sizes)
            for s, logp_M, hidden_MD in zip(group, logps, hidden, strict=True):
                yield s, Said(logp_M, hidden_MD if states else None)

    def states(name: str) -> bool:
        return whole or name in references.also

    with as_reference(model, reference):
        spent = shelf.fill(list(wanted.values()), states, ask, tell)
    reference.kept, reference.states = shelf, whole
    reference.release()
    return spent


def _groups(sequences: Seq[Sequence], device: torch.device, tokens: int, layout: Layout) -> Iterator[Seq[Sequence]]:
    """Sequences that go through together."""
    if device.type == "cpu":
        yield from ([s] for s in sequences)
    else:
        yield from ([s for (s,) in group] for group in micro_batches([[s] for s in sequences], tokens, layout))
