"""What one optimiser step is taken on, and how it is cut into micro-batches."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from leeway.data.chat import Sequence
from leeway.model.layout import Examples, Layout, longest, stored


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
