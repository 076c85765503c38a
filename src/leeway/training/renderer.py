"""One objective's view of the stream: each slot's example, what stands beside it, and the sequences made of them."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace

import numpy as np

from leeway.data.batches import Companions, Slot
from leeway.data.chat import Chat, Sequence
from leeway.data.items import Example
from leeway.hashing import derive_seed
from leeway.objectives import Objective
from leeway.training.batch import Batch


@dataclass(frozen=True)
class Renderer:
    """Renders slots; what an objective draws, and which companion it meets, depends on (seed, position) alone."""

    objective: Objective
    chat: Chat  # its control tokens known
    seed: int
    companions: Companions = field(default_factory=Companions)

    def example(self, slot: Slot) -> Example:
        """The slot's example with the companion that the objective asks for."""
        kind = self.objective.companion
        if not kind:
            return slot.example
        return replace(slot.example, companion=self.companions.beside(slot, kind, self.seed))

    def rendered(self, slot: Slot) -> Seq[Sequence]:
        rng = np.random.default_rng(derive_seed("render", self.seed, slot.position))
        return self.objective.render(self.example(slot), self.chat, rng)

    def baseline(self, slot: Slot) -> Seq[Sequence]:
        return self.objective.baseline_sequences(self.example(slot), self.chat)

    def processed(self, slot: Slot) -> int:
        """Tokens that go through the policy for one slot."""
        return sum(len(s.ids) for s in (*self.rendered(slot), *self.baseline(slot)))

    def batch(self, step: int, slots: Seq[Slot]) -> Batch:
        """One optimiser step's examples, rendered."""
        return Batch(
            step,
            derive_seed("dropout", self.seed, step),
            tuple(s.example.id for s in slots),
            tuple(tuple(self.rendered(slot)) for slot in slots),
            tuple(found for slot in slots if (found := tuple(self.baseline(slot)))),
        )

    def compute(self, slot: Slot) -> float:
        """Work for one slot, in policy tokens: a reference token is a forward pass alone, and counts half."""
        policy, baseline = self.processed(slot), sum(len(s.ids) for s in self.baseline(slot))
        reference = policy if self.objective.needs_reference != "nothing" else baseline
        return policy + reference / 2
