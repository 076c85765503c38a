"""Layouts of a micro-batch: token positions, and the hidden state that predicts each measured token.

`Padded`: one sequence per row. `Packed`: several sequences per row. `Flat`: all in one row, for the fused decoder.
Packed and Flat store the common prefix of an example's sequences once (`PrefixTree`). The statistics are the same.

Shape legend: B rows (or trees of one block), L positions, T tokens, D width.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from leeway.data.chat import Sequence
from leeway.errors import LeewayError
from leeway.model.token_stats import ROUND, filled


@dataclass(frozen=True)
class PrefixTree:
    """Sequences as a prefix tree: each token of a common prefix is one node, after its ancestors.

    ids, positions: per node. paths: the nodes of each sequence.
    """

    sequences: Seq[Sequence]
    ids: list[int]
    positions: list[int]
    paths: list[list[int]]

    @classmethod
    def of(cls, sequences: Seq[Sequence]) -> PrefixTree:
        """Build the tree; each sequence branches off the earlier one with the longest common prefix."""
        ids: list[int] = []
        positions: list[int] = []
        paths: list[list[int]] = []
        for k, s in enumerate(sequences):
            shared = [common_prefix(s.ids, earlier.ids) for earlier in sequences[:k]]
            best = max(range(k), key=shared.__getitem__, default=None)
            trunk = [] if best is None else paths[best][: shared[best]]
            tail = s.ids[len(trunk) :]
            paths.append(trunk + list(range(len(ids), len(ids) + len(tail))))
            positions += range(len(trunk), len(s.ids))
            ids += tail
        return cls(sequences, ids, positions, paths)

    def before(self) -> list[int]:
        """Return the node whose hidden state predicts each measured token, sequence by sequence."""
        return [n for s, path in zip(self.sequences, self.paths, strict=True) for n in path[s.start - 1 : -1]]

    def visible(self) -> Tensor:
        """Return which nodes (columns) each node (row) attends to: itself and its ancestors."""
        seen = torch.zeros(len(self.ids), len(self.ids), dtype=torch.bool)
        for path in self.paths:
            nodes = torch.tensor(path)
            seen[nodes[:, None], nodes] = torch.ones(len(path), len(path), dtype=torch.bool).tril()
        return seen


def common_prefix(a: Seq[int], b: Seq[int]) -> int:
    """Return the length of the common prefix."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


WASTE = 1.25  # maximum positions per token of a block
STRIDE = 16  # block lengths are multiples of it, so products have few shapes
HIDDEN = -1e30  # additive mask; every token sees itself, so no softmax is empty


@dataclass(frozen=True)
class Block:
    """Trees of similar length, each right-padded to L, a multiple of STRIDE.

    tokens_BL: token index of each position (padding repeats token 0 and is never read). seen: attention mask [B, L, L];
    None if every tree is one sequence (causal). padded_N: padding positions of the B L; None if there are none.
    """

    tokens_BL: Tensor
    seen_BLL: Tensor | None
    padded_N: Tensor | None

    def bias(self, dtype: torch.dtype) -> Tensor:
        """Return the additive attention bias, 0 where visible; [L, L] or [B, L, L]."""
        length = self.tokens_BL.shape[1]
        if self.seen_BLL is None:
            hidden = torch.ones(length, length, dtype=torch.bool, device=self.tokens_BL.device).triu(1)
        else:
            hidden = ~self.seen_BLL
        return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, HIDDEN)


@dataclass(frozen=True)
class Blocks:
    """All tokens of a micro-batch. place_T: each token's position among all blocks.

    The row is filled up with `rows`-aligned tokens that neither attend nor are attended to; `tokens` are real.
    """

    blocks: tuple[Block, ...]
    place_T: Tensor
    tokens: int

    def biases(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return each block's bias, shared by all layers."""
        return tuple(block.bias(dtype) for block in self.blocks)

    @classmethod
    def of(cls, trees: Seq[PrefixTree], device: torch.device, *, rows: int = ROUND, waste: float = WASTE) -> Blocks:
        """Group trees into blocks, in the given order; the row is padded to a multiple of `rows`.

        `waste`: maximum positions per token of a block; 1 groups trees of equal length (up to STRIDE).
        """
        sizes = [len(tree.ids) for tree in trees]
        starts = list(itertools.accumulate(sizes, initial=0))
        order = sorted(range(len(trees)), key=sizes.__getitem__)
        blocks, place_T, offset = [], torch.zeros(filled(starts[-1], rows), dtype=torch.long), 0
        for group in _length_groups([filled(sizes[n], STRIDE) for n in order], waste):
            members = [order[k] for k in group]
            length = filled(sizes[members[-1]], STRIDE)
            tokens_BL = torch.zeros(len(members), length, dtype=torch.long)
            for b, n in enumerate(members):
                tokens_BL[b, : sizes[n]] = torch.arange(starts[n], starts[n + 1])
                place_T[starts[n] : starts[n + 1]] = torch.arange(sizes[n]) + offset + b * length
            padded = [b * length + at for b, n in enumerate(members) for at in range(sizes[n], length)]
            padded_N = torch.tensor(padded, device=device) if padded else None
            seen_BLL = _seen([trees[n] for n in members], length, device)
            blocks.append(Block(tokens_BL.to(device), seen_BLL, padded_N))
            offset += len(members) * length
        return cls(tuple(blocks), place_T.to(device), starts[-1])


def _length_groups(lengths: Seq[int], waste: float) -> list[range]:
    """Return runs of sorted lengths with little padding each."""
    runs, start, total = [], 0, 0
    for k, length in enumerate(lengths):
        if k > start and (k - start + 1) * length > waste * (total + length):
            runs.append(range(start, k))
            start, total = k, 0
        total += length
    return [*runs, range(start, len(lengths))]


def _seen(trees: Seq[PrefixTree], length: int, device: torch.device) -> Tensor | None:
    if all(len(t.sequences) == 1 for t in trees):
        return None
    seen_BLL = torch.eye(length, dtype=torch.bool).repeat(len(trees), 1, 1)
    for b, tree in enumerate(trees):
        size = len(tree.ids)
        seen_BLL[b, :size, :size] = tree.visible()
    return seen_BLL.to(device)


Layout = Literal["padded", "packed", "fused"]
LayoutSetting = Literal["auto", "padded", "packed", "fused"]
Examples = Seq[Seq[Sequence]]  # sequences per example, in rendering order


@dataclass(frozen=True)
class PackedBatch:
    """S sequences as B rows of length L, with the positions of their T measured tokens."""

    ids_BL: Tensor
    row_T: Tensor
    before_T: Tensor  # position whose hidden state predicts the measured token
    sequence_T: Tensor
    measured_T: Tensor  # the measured tokens' ids
    target_T: Tensor | None  # target mask; None if all are targets
    sequences: int

    def inputs(self, lm: Any) -> dict[str, Any]:
        """Return the keyword arguments for the decoder of `lm`; the fused decoder takes a `Flat` itself."""
        raise NotImplementedError


@dataclass(frozen=True)
class Padded(PackedBatch):
    """S sequences, one right-padded row each."""

    mask_BL: Tensor

    @classmethod
    def of(cls, sequences: Seq[Sequence], device: torch.device) -> Padded:
        length = longest(sequences)
        ids = [list(s.ids) + [0] * (length - len(s.ids)) for s in sequences]
        mask = [[1] * len(s.ids) + [0] * (length - len(s.ids)) for s in sequences]
        before = [k - 1 for s in sequences for k in range(s.start, len(s.ids))]
        ids_BL, mask_BL, before_T = (torch.tensor(x, device=device) for x in (ids, mask, before))
        row_T, measured_T, target_T = _measured(sequences, device)
        return cls(ids_BL, row_T, before_T, row_T, measured_T, target_T, len(sequences), mask_BL)

    def inputs(self, lm: Any) -> dict[str, Any]:  # noqa: ARG002
        return {"input_ids": self.ids_BL, "attention_mask": self.mask_BL}


@dataclass(frozen=True)
class Flat(PackedBatch):
    """All sequences end to end in one row without padding, common prefixes stored once; for the fused decoder.

    row_T is 0 throughout. position_T: position within the own sequence. blocks: attention structure.
    """

    position_T: Tensor
    blocks: Blocks

    @classmethod
    def of(cls, examples: Examples, device: torch.device, *, rows: int = ROUND, waste: float = WASTE) -> Flat:
        """See `Blocks.of` for `rows` and `waste`."""
        trees = [PrefixTree.of(e) for e in examples if e]
        starts = list(itertools.accumulate((len(t.ids) for t in trees), initial=0))
        before = [at + n for t, at in zip(trees, starts, strict=False) for n in t.before()]
        sequences = [s for t in trees for s in t.sequences]
        fill = [0] * (filled(starts[-1], rows) - starts[-1])
        ids, position = [i for t in trees for i in t.ids] + fill, [i for t in trees for i in t.positions] + fill
        ids_T, position_T, before_T = (torch.tensor(x, device=device) for x in (ids, position, before))
        row_T, measured = torch.zeros_like(before_T), _measured(sequences, device)
        blocks = Blocks.of(trees, device, rows=rows, waste=waste)
        return cls(ids_T[None], row_T, before_T, *measured, len(sequences), position_T, blocks)


@dataclass(frozen=True)
class Packed(PackedBatch):
    """Several sequences per row; a token attends to its own sequence only.

    position_BL: position within the own sequence, from 0. visible_BLL: attention mask (last axis: keys). longest:
    length of the longest sequence.
    """

    position_BL: Tensor
    visible_BLL: Tensor
    longest: int

    @classmethod
    def of(cls, examples: Examples, device: torch.device, *, share: bool = True) -> Packed:
        """Lay out `examples`; `share` stores the common prefix of an example's sequences once.

        A common prefix and its continuations form a tree: a token attends to its ancestors. Trees are placed longest
        first, into the first row with room; the longest sets the row length.
        """
        trees = [PrefixTree.of(part) for e in examples for part in ([e] if share else [[s] for s in e]) if part]
        length = max(len(t.ids) for t in trees)
        places, rows = place([len(t.ids) for t in trees], length)
        ids_BL, position_BL = (torch.zeros(rows, length, dtype=torch.long) for _ in range(2))
        # padding attends to itself, so no softmax is empty
        visible_BLL = torch.eye(length, dtype=torch.bool).repeat(rows, 1, 1)
        row, before = [], []
        for tree, (b, at) in zip(trees, places, strict=True):
            span = slice(at, at + len(tree.ids))
            ids_BL[b, span], position_BL[b, span] = torch.tensor(tree.ids), torch.tensor(tree.positions)
            visible_BLL[b, span, span] = tree.visible()
            row += [b] * sum(s.measured for s in tree.sequences)
            before += [at + n for n in tree.before()]
        sequences = [s for t in trees for s in t.sequences]
        row_T, before_T = torch.tensor(row, device=device), torch.tensor(before, device=device)
        masks = position_BL.to(device), visible_BLL.to(device), longest(sequences)
        return cls(ids_BL.to(device), row_T, before_T, *_measured(sequences, device), len(sequences), *masks)

    def inputs(self, lm: Any) -> dict[str, Any]:
        return {"input_ids": self.ids_BL, "position_ids": self.position_BL, "attention_mask": self._masks(lm)}

    def _masks(self, lm: Any) -> Any:
        """Return the mask [B, 1, L, L] in transformers' prepared form, per layer type where they differ.

        A prepared mask replaces the model's sliding window, so the window is included here.
        """
        window = getattr(lm.config, "sliding_window", None)
        full = self._formed(self.visible_BLL, lm)
        if window is None or self.longest <= window:
            return full
        gap_BLL = self.position_BL[:, :, None] - self.position_BL[:, None, :]
        sliding = self._formed(self.visible_BLL & (gap_BLL < window), lm)
        kinds = getattr(lm.config, "layer_types", None)
        return sliding if kinds is None else {"full_attention": full, "sliding_attention": sliding}

    def _formed(self, visible_BLL: Tensor, lm: Any) -> Tensor:
        """Return a boolean mask for sdpa, an additive one (0, most negative number) for eager attention."""
        kind, mask = lm.config._attn_implementation, visible_BLL[:, None]
        if kind == "sdpa":
            return mask
        if kind != "eager":
            raise LeewayError(f"optim.layout: packed does not support {kind} attention", fix="use layout: padded")
        return torch.zeros(mask.shape, dtype=lm.dtype, device=mask.device).masked_fill(~mask, torch.finfo(lm.dtype).min)


def pack_batch(examples: Examples, device: torch.device, layout: Layout = "padded") -> PackedBatch:
    """Return the sequences of `examples` as one micro-batch."""
    if layout == "fused":
        return Flat.of(examples, device)
    return Packed.of(examples, device) if layout == "packed" else Padded.of([s for e in examples for s in e], device)


def longest(example: Seq[Sequence]) -> int:
    """Return the length of the example's longest sequence, tokens."""
    return max(len(s.ids) for s in example)


def stored(example: Seq[Sequence]) -> int:
    """Return the positions that the example takes when packed."""
    return len(PrefixTree.of(example).ids)


def _measured(sequences: Seq[Sequence], device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return sequence index, id and target mask (None if all are targets) of the measured tokens, each [T]."""
    index = [n for n, s in enumerate(sequences) for _ in range(s.measured)]
    ids = [i for s in sequences for i in s.ids[s.start :]]
    sequence_T, measured_T = torch.tensor(index, device=device), torch.tensor(ids, device=device)
    if all(s.start == s.target_start for s in sequences):
        return sequence_T, measured_T, None
    flags = [k >= s.target_start for s in sequences for k in range(s.start, len(s.ids))]
    return sequence_T, measured_T, torch.tensor(flags, device=device)


def place(lengths: Seq[int], capacity: int) -> tuple[list[tuple[int, int]], int]:
    """Return (row, first position) of each item and the number of rows; longer items get their own row.

    First-fit decreasing (Johnson 1973, Near-optimal bin packing algorithms).
    """
    room: list[int] = []
    places = [(0, 0)] * len(lengths)
    for k in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        b = next((n for n, left in enumerate(room) if left >= lengths[k]), len(room))
        if b == len(room):
            room.append(capacity)
        places[k] = (b, capacity - room[b])
        room[b] -= lengths[k]
    return places, len(room)
