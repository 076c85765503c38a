"""What one optimiser step is taken on, and how it is cut into micro-batches.

One objective's view of the stream: each slot's example, what stands beside it, and the sequences made of them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from leeway.data.chat import Chat, Sequence
from leeway.data.stream import AuxiliaryPool, StreamItem
from leeway.data.types import Example
from leeway.hashing import derive_seed
from leeway.model.packing import Examples, Layout, longest, stored
from leeway.objectives import Objective


@dataclass(frozen=True)
class Batch:
    """One optimiser step's worth of rendered examples; `seed` draws this step's dropout and nothing else.

    `baseline` holds each example's sequences for the objective's own pass over the batch, where it makes one.
    """

    step: int
    seed: int
    ids: tuple[str, ...]
    rendered: tuple[tuple[Sequence, ...], ...]
    baseline: tuple[tuple[Sequence, ...], ...] = ()


@dataclass(frozen=True)
class Optim:
    """How every trajectory is optimised: AdamW, and what the loop does around it."""

    clip: float
    micro_tokens: int  # positions of one micro-batch; the optimiser step is the same however it is cut
    autocast: torch.dtype | None = None
    layout: Layout = "padded"

    def cut(self, examples: Examples) -> Iterator[list[Seq[Sequence]]]:
        """A step's micro-batches."""
        return micro_batches(examples, self.micro_tokens, self.layout)


def micro_batches(rendered: Examples, tokens: int, layout: Layout = "padded") -> Iterator[list[Seq[Sequence]]]:
    """Whole examples, shortest first, as many at a time as fit into `tokens` positions (at least one).

    Padded, each sequence takes as many positions as the longest of its micro-batch. Else no more are taken than are
    stored, and micro-batches that are as few as can be are about equally long.
    """
    ordered = sorted(rendered, key=longest)  # so that an example is the longest of its group too
    if layout == "padded":
        sizes = [(len(e), longest(e)) for e in ordered]
    else:
        sizes = [(stored(e), 1) for e in ordered]
        fewest, bounds = len(_ends(sizes, tokens)), range(1, tokens)
        tokens = 1 + bisect_left(bounds, True, key=lambda bound: len(_ends(sizes, bound)) <= fewest)
    start = 0
    for end in _ends(sizes, tokens):
        yield ordered[start:end]
        start = end


def _ends(sizes: Seq[tuple[int, int]], tokens: int) -> list[int]:
    """Where micro-batches end, of examples by (what they count, by how much that is multiplied)."""
    ends, count = [], 0
    for k, (size, times) in enumerate(sizes):
        if count and (count + size) * times > tokens:
            ends.append(k)
            count = 0
        count += size
    return [*ends, len(sizes)] if sizes else []


@dataclass(frozen=True)
class Renderer:
    """Renders slots; what an objective draws, and which companion it meets, depends on (seed, position) alone."""

    objective: Objective
    chat: Chat  # its control tokens known
    seed: int
    companions: AuxiliaryPool = field(default_factory=AuxiliaryPool)

    def example(self, slot: StreamItem) -> Example:
        """The slot's example with the companion that the objective asks for."""
        kind = self.objective.companion
        if not kind:
            return slot.example
        return replace(slot.example, companion=self.companions.beside(slot, kind, self.seed))

    def rendered(self, slot: StreamItem) -> Seq[Sequence]:
        rng = np.random.default_rng(derive_seed("render", self.seed, slot.position))
        return self.objective.render(self.example(slot), self.chat, rng)

    def baseline(self, slot: StreamItem) -> Seq[Sequence]:
        return self.objective.baseline_sequences(self.example(slot), self.chat)

    def processed(self, slot: StreamItem) -> int:
        """Tokens that go through the policy for one slot."""
        return sum(len(s.ids) for s in (*self.rendered(slot), *self.baseline(slot)))

    def batch(self, step: int, slots: Seq[StreamItem]) -> Batch:
        """One optimiser step's examples, rendered."""
        return Batch(
            step,
            derive_seed("dropout", self.seed, step),
            tuple(s.example.id for s in slots),
            tuple(tuple(self.rendered(slot)) for slot in slots),
            tuple(found for slot in slots if (found := tuple(self.baseline(slot)))),
        )

    def compute(self, slot: StreamItem) -> float:
        """Work for one slot, in policy tokens: a reference token is a forward pass alone, and counts half."""
        policy, baseline = self.processed(slot), sum(len(s.ids) for s in self.baseline(slot))
        reference = policy if self.objective.needs_reference != "nothing" else baseline
        return policy + reference / 2
