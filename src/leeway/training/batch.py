"""Optimiser batches: examples rendered by one objective, their split into micro-batches, and their sequences."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace

import numpy as np

from leeway.data.chat import Chat, Sequence
from leeway.data.stream import AuxiliaryPool, StreamItem
from leeway.data.types import Example
from leeway.hashing import derive_seed
from leeway.model.packing import Examples, Layout, longest, stored
from leeway.objectives import Objective


@dataclass(frozen=True)
class Batch:
    """The rendered examples of one optimiser step, and the sequences of the objective's baseline pass if it has one."""

    step: int
    seed: int  # of dropout only
    ids: tuple[str, ...]
    rendered: tuple[tuple[Sequence, ...], ...]
    baseline: tuple[tuple[Sequence, ...], ...] = ()


@dataclass(frozen=True)
class Optim:
    """Optimiser settings shared by every trajectory (AdamW)."""

    clip: float
    micro_tokens: int  # positions per micro-batch; does not change the optimiser step
    layout: Layout = "padded"

    def split(self, examples: Examples) -> Iterator[list[Seq[Sequence]]]:
        """Yield a step's micro-batches."""
        return micro_batches(examples, self.micro_tokens, self.layout)


def micro_batches(rendered: Examples, tokens: int, layout: Layout = "padded") -> Iterator[list[Seq[Sequence]]]:
    """Yield whole examples, shortest first, as many as fit into `tokens` positions (at least one).

    In the padded layout a sequence takes as many positions as the longest of its micro-batch. In the others it takes
    its own length, and the smallest possible number of micro-batches is balanced by length.
    """
    ordered = sorted(rendered, key=longest)  # the last example of a group is its longest
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
    """Return the end index of each micro-batch, for examples given as (size, multiplier)."""
    ends, count = [], 0
    for k, (size, times) in enumerate(sizes):
        if count and (count + size) * times > tokens:
            ends.append(k)
            count = 0
        count += size
    return [*ends, len(sizes)] if sizes else []


@dataclass(frozen=True)
class Renderer:
    """Render stream items; sampling and the auxiliary example depend only on (seed, position)."""

    objective: Objective
    chat: Chat  # knows its control tokens
    seed: int
    auxiliary_pool: AuxiliaryPool = field(default_factory=AuxiliaryPool)

    def example(self, item: StreamItem) -> Example:
        """Return the example with the auxiliary example that the objective needs."""
        kind = self.objective.auxiliary
        if not kind:
            return item.example
        return replace(item.example, auxiliary=self.auxiliary_pool.sample(item, kind, self.seed))

    def rendered(self, item: StreamItem) -> Seq[Sequence]:
        rng = np.random.default_rng(derive_seed("render", self.seed, item.position))
        return self.objective.render(self.example(item), self.chat, rng)

    def baseline(self, item: StreamItem) -> Seq[Sequence]:
        return self.objective.baseline_sequences(self.example(item), self.chat)

    def processed(self, item: StreamItem) -> int:
        """Return the tokens that go through the policy for one item."""
        return sum(len(s.ids) for s in (*self.rendered(item), *self.baseline(item)))

    def batch(self, step: int, items: Seq[StreamItem]) -> Batch:
        """Render the examples of one optimiser step."""
        return Batch(
            step,
            derive_seed("dropout", self.seed, step),
            tuple(s.example.id for s in items),
            tuple(tuple(self.rendered(item)) for item in items),
            tuple(sequences for item in items if (sequences := tuple(self.baseline(item)))),
        )

    def compute(self, item: StreamItem) -> float:
        """Return the cost of one item in policy tokens; a reference token (forward only) counts half."""
        policy, baseline = self.processed(item), sum(len(s.ids) for s in self.baseline(item))
        reference = policy if self.objective.needs_reference != "nothing" else baseline
        return policy + reference / 2


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
