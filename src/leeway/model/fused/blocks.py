"""Which tokens attend to which, sequence trees end to end in one row: attention by blocks of like length.

Shape legend: T tokens, B trees of one block, L positions of the longest of them.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from leeway.model.head import ROUND, filled
from leeway.model.trees import Tree

WASTE = 1.25  # a block's positions per token at most, before a new block begins
STRIDE = 16  # of a block's positions, so that products meet few shapes
HIDDEN = -1e30  # added to what a token does not see; a row always sees itself, so no softmax is empty


@dataclass(frozen=True)
class Block:
    """Trees of like length, each padded on the right to L, a multiple of STRIDE.

    tokens_BL: the token of each position (a padded one repeats token 0, and nobody reads it). seen: None where every
    tree is one sequence, whose tokens see all that came before; else which positions each position sees, [B, L, L].
    padded_N: the positions that are padding, of the B L; None where there are none.
    """

    tokens_BL: Tensor
    seen_BLL: Tensor | None
    padded_N: Tensor | None

    def bias(self, dtype: torch.dtype) -> Tensor:
        """To be added to the scores: 0 where a position is seen; [L, L] or [B, L, L]."""
        length = self.tokens_BL.shape[1]
        if self.seen_BLL is None:
            hidden = torch.ones(length, length, dtype=torch.bool, device=self.tokens_BL.device).triu(1)
        else:
            hidden = ~self.seen_BLL
        return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, HIDDEN)


@dataclass(frozen=True)
class Blocks:
    """All tokens of a micro-batch. place_T: where each token lies among the positions of all blocks.

    The row is filled up with tokens that nothing attends to and that attend to nothing: there are `tokens` real ones.
    """

    blocks: tuple[Block, ...]
    place_T: Tensor
    tokens: int

    def biases(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Each block's, once for all layers."""
        return tuple(block.bias(dtype) for block in self.blocks)

    @classmethod
    def of(cls, trees: Seq[Tree], device: torch.device, *, rows: int = ROUND, waste: float = WASTE) -> Blocks:
        """Trees lie in the row in the order given; it is filled up to a multiple of `rows`.

        A block's positions per token are `waste` at most; 1: a block's trees have one length up to STRIDE.
        """
        starts = [0]
        for tree in trees:
            starts.append(starts[-1] + len(tree.ids))
        order = sorted(range(len(trees)), key=lambda n: (len(trees[n].ids), n))
        blocks, place_T, offset = [], torch.zeros(filled(starts[-1], rows), dtype=torch.long), 0
        for group in _alike([filled(len(trees[n].ids), STRIDE) for n in order], waste):
            members = [order[k] for k in group]
            length = filled(max(len(trees[n].ids) for n in members), STRIDE)
            tokens_BL = torch.zeros(len(members), length, dtype=torch.long)
            for b, n in enumerate(members):
                size = len(trees[n].ids)
                tokens_BL[b, :size] = torch.arange(starts[n], starts[n] + size)
                place_T[starts[n] : starts[n] + size] = torch.arange(size) + offset + b * length
            sizes = [len(trees[n].ids) for n in members]
            padded = [b * length + at for b, size in enumerate(sizes) for at in range(size, length)]
            padded_N = torch.tensor(padded, device=device) if padded else None
            seen_BLL = _seen([trees[n] for n in members], length, device)
            blocks.append(Block(tokens_BL.to(device), seen_BLL, padded_N))
            offset += len(members) * length
        return cls(tuple(blocks), place_T.to(device), starts[-1])


def _alike(lengths: Seq[int], waste: float) -> list[range]:
    """Runs of rising lengths that waste little when each is padded to its longest."""
    runs, start, total = [], 0, 0
    for k, length in enumerate(lengths):
        if k > start and (k - start + 1) * length > waste * (total + length):
            runs.append(range(start, k))
            start, total = k, 0
        total += length
    return [*runs, range(start, len(lengths))]


def _seen(trees: Seq[Tree], length: int, device: torch.device) -> Tensor | None:
    if all(len(t.sequences) == 1 for t in trees):
        return None
    seen_BLL = torch.eye(length, dtype=torch.bool).repeat(len(trees), 1, 1)
    for b, tree in enumerate(trees):
        size = len(tree.ids)
        seen_BLL[b, :size, :size] = tree.visible()
    return seen_BLL.to(device)
