"""A reference that is asked before the first step, about each sequence once, and kept on disk.

What is kept of a sequence depends on that sequence and the reference alone, and never on who asked first, on what else
was asked or on the order: on a CPU each goes through by itself, or in rows of a fixed shape. On an accelerator nothing
is promised of the last bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from leeway.data.chat import Sequence
from leeway.model.forward import APART, hidden_apart, hidden_at_measured
from leeway.model.load import Model
from leeway.model.packing import Layout, pack_batch, place
from leeway.model.reference import Reference, as_reference, computed_as
from leeway.model.reference_cache import ReferenceCache, ReferenceStats, Wanted
from leeway.model.token_stats import token_logps
from leeway.objectives import Objective
from leeway.training.batch import Batch, Optim, micro_batches

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


def precompute_reference(
    model: Model,
    objective: Objective,
    batches: Iterable[Batch],
    settings: Optim,
    reference: Reference,
    references: ReferenceCache,
    *,
    taken: int = 0,
    tell: Tell = lambda *_: None,
) -> int:
    """See to it that all sequences of `batches` after step `taken` are kept, and release the reference's own weights.

    Returns how many tokens went through the model: none where somebody else asked before.
    """
    layout: Layout = "fused" if settings.layout == "fused" else "padded"
    with _threads_by_two():
        shelf = references.of(computed_as(model, reference, settings.autocast, layout))
    asked: dict[tuple[tuple[int, ...], int], Sequence] = {}
    for step, s, new in first_asked(batches):
        if new:
            reference.spent[step] = reference.spent.get(step, 0) + len(s.ids)
        if step > taken:
            asked[s.ids, s.start] = s

    def wanted(name: str) -> Wanted:
        if objective.needs_reference == "distribution":
            return Wanted(logps=False, states=True)
        return Wanted(logps=True, states=name in references.also)

    with as_reference(model, reference), _threads_by_two():
        spent = shelf.fill(list(asked.values()), wanted, _Answering(model, settings, layout), tell)
    reference.cached = shelf
    reference.release()
    return spent


@dataclass(frozen=True)
class _Answering:
    """The model as it stands, which is the reference."""

    model: Model
    settings: Optim
    layout: Layout

    def ask(self, sequences: Seq[Sequence], wanted: Wanted) -> Iterator[tuple[Sequence, ReferenceStats]]:
        for group in self._groups(sequences):
            with self._autocast():
                states = torch.split(self._hidden(group), [s.measured for s in group])
            for s, hidden_MD in zip(group, states, strict=True):
                logp_M = self.read(s, hidden_MD) if wanted.logps else None
                yield s, ReferenceStats(logp_M, hidden_MD.cpu() if wanted.states else None)

    def read(self, sequence: Sequence, hidden_MD: Tensor) -> Tensor:
        device = self.model.device
        measured_M = torch.tensor(sequence.ids[sequence.start :], device=device)
        with self._autocast():
            return token_logps(hidden_MD.to(device), measured_M, self.model.head).cpu()

    def _groups(self, sequences: Seq[Sequence]) -> list[list[Sequence]]:
        """Sequences that go through together."""
        if self.layout == "fused":
            places, rows = place([len(s.ids) for s in sequences], APART)
            groups: list[list[Sequence]] = [[] for _ in range(rows)]
            for s, (row, _) in zip(sequences, places, strict=True):
                groups[row].append(s)
            return groups
        tokens = 1 if self.model.device.type == "cpu" else self.settings.micro_tokens
        return [[s for (s,) in group] for group in micro_batches([[s] for s in sequences], tokens, self.layout)]

    def _hidden(self, group: Seq[Sequence]) -> Tensor:
        if self.layout == "fused":
            return hidden_apart(self.model, group)
        return hidden_at_measured(self.model, pack_batch([[s] for s in group], self.model.device, self.layout))

    def _autocast(self) -> torch.autocast:
        dtype = self.settings.autocast
        return torch.autocast(self.model.device.type, dtype, enabled=dtype is not None)


@contextmanager
def _threads_by_two() -> Iterator[None]:
    """As many threads as the largest power of two that is there: see `hidden_apart`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 << (threads.bit_length() - 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)
