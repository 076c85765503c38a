"""Compute the reference statistics of every sequence before the first step, into the cache.

On a CPU a sequence's statistics depend on that sequence and the reference alone, to the bit: each goes through the
model alone, or in rows of a fixed shape. On an accelerator the last bits may differ.
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
from leeway.model.reference import Needed, Reference, ReferenceCache, ReferenceStats, as_reference, computed_as
from leeway.model.token_stats import token_logps
from leeway.objectives import Objective
from leeway.training.batch import Batch, Optim, micro_batches

OnProgress = Callable[[int, int], None]


def reference_sequences(batches: Iterable[Batch]) -> Iterator[tuple[int, Sequence, bool]]:
    """Yield (step, sequence, whether it occurs for the first time) for all sequences of a trajectory, in order."""
    known: set[tuple[tuple[int, ...], int]] = set()
    for batch in batches:
        for s in (s for part in (batch.baseline, batch.rendered) for example in part for s in example):
            new = (s.ids, s.start) not in known
            known.add((s.ids, s.start))
            yield batch.step, s, new


def reference_tokens(batches: Iterable[Batch]) -> int:
    """Return the tokens of a trajectory's distinct sequences."""
    return sum(len(s.ids) for _, s, new in reference_sequences(batches) if new)


def precompute_reference(
    model: Model,
    objective: Objective,
    batches: Iterable[Batch],
    settings: Optim,
    reference: Reference,
    references: ReferenceCache,
    *,
    taken: int = 0,
    on_progress: OnProgress = lambda *_: None,
) -> int:
    """Cache the statistics of all sequences of `batches` after step `taken`, and release the reference's own weights.

    Return how many tokens went through the model; 0 if all were cached.
    """
    layout: Layout = "fused" if settings.layout == "fused" else "padded"
    with _power_of_two_threads():
        store = references.of(computed_as(model, reference, settings.autocast, layout))
    sequences: dict[tuple[tuple[int, ...], int], Sequence] = {}
    for step, s, new in reference_sequences(batches):
        if new:
            reference.spent[step] = reference.spent.get(step, 0) + len(s.ids)
        if step > taken:
            sequences[s.ids, s.start] = s

    def needed(key: str) -> Needed:
        if objective.needs_reference == "distribution":
            return Needed(logps=False, states=True)
        return Needed(logps=True, states=key in references.state_keys)

    with as_reference(model, reference), _power_of_two_threads():
        spent = store.fill(list(sequences.values()), needed, _ReferenceModel(model, settings, layout), on_progress)
    reference.cached = store
    reference.release()
    return spent


@dataclass(frozen=True)
class _ReferenceModel:
    """The model in its current state, which is the reference's."""

    model: Model
    settings: Optim
    layout: Layout

    def stats(self, sequences: Seq[Sequence], needed: Needed) -> Iterator[tuple[Sequence, ReferenceStats]]:
        for group in self._groups(sequences):
            with self.settings.autocast_on(self.model.device):
                if self.layout == "fused":
                    hidden_TD = hidden_apart(self.model, group)
                else:
                    batch = pack_batch([[s] for s in group], self.model.device, self.layout)
                    hidden_TD = hidden_at_measured(self.model, batch)
                states = torch.split(hidden_TD, [s.measured for s in group])
            for s, hidden_MD in zip(group, states, strict=True):
                logp_M = self.logps(s, hidden_MD) if needed.logps else None
                yield s, ReferenceStats(logp_M, hidden_MD.cpu() if needed.states else None)

    def logps(self, sequence: Sequence, hidden_MD: Tensor) -> Tensor:
        device = self.model.device
        measured_M = torch.tensor(sequence.ids[sequence.start :], device=device)
        with self.settings.autocast_on(self.model.device):
            return token_logps(hidden_MD.to(device), measured_M, self.model.head).cpu()

    def _groups(self, sequences: Seq[Sequence]) -> list[list[Sequence]]:
        """Return the sequences that share a forward pass."""
        if self.layout == "fused":
            places, rows = place([len(s.ids) for s in sequences], APART)
            groups: list[list[Sequence]] = [[] for _ in range(rows)]
            for s, (row, _) in zip(sequences, places, strict=True):
                groups[row].append(s)
            return groups
        tokens = 1 if self.model.device.type == "cpu" else self.settings.micro_tokens
        return [[s for (s,) in group] for group in micro_batches([[s] for s in sequences], tokens, self.layout)]


@contextmanager
def _power_of_two_threads() -> Iterator[None]:
    """Use the largest power of two of threads that is available: see `hidden_apart`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 << (threads.bit_length() - 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)
