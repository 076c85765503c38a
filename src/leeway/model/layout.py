"""How sequences lie in one micro-batch: where their tokens are, and which hidden state predicts each measured one.

Shape legend: B rows, L positions, T measured tokens, D width. `Padded` gives each sequence a row; `Packed` puts several
into one, and stores what the sequences of one example begin with alike once; `Flat` is a single row for the fused
decoder, shared beginnings stored once too. The statistics are the same.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from leeway.data.chat import Sequence
from leeway.errors import LeewayError
from leeway.model.fused.blocks import WASTE, Blocks
from leeway.model.head import ROUND, filled
from leeway.model.trees import Tree

Layout = Literal["padded", "packed", "fused"]
Asked = Literal["auto", "padded", "packed", "fused"]
Examples = Seq[Seq[Sequence]]  # each example's sequences, in the order in which its objective rendered them


@dataclass(frozen=True)
class Laid(ABC):
    """S sequences as B rows of length L, and where their T measured tokens are, sequence by sequence."""

    ids_BL: Tensor
    row_T: Tensor
    before_T: Tensor  # position whose hidden state predicts the measured token
    sequence_T: Tensor
    measured_T: Tensor  # the measured tokens' ids
    target_T: Tensor | None  # which of them are targets; None where all are
    sequences: int

    @abstractmethod
    def inputs(self, lm: Any) -> dict[str, Any]:
        """What the decoder of `lm` is called with."""


@dataclass(frozen=True)
class Padded(Laid):
    """S sequences padded on the right to length L: one row each."""

    mask_BL: Tensor

    @classmethod
    def of(cls, sequences: Seq[Sequence], device: torch.device) -> Padded:
        length = max(len(s.ids) for s in sequences)
        ids = [list(s.ids) + [0] * (length - len(s.ids)) for s in sequences]
        mask = [[1] * len(s.ids) + [0] * (length - len(s.ids)) for s in sequences]
        rows = [b for b, s in enumerate(sequences) for _ in range(s.measured)]
        before = [k - 1 for s in sequences for k in range(s.start, len(s.ids))]
        measured = [i for s in sequences for i in s.ids[s.start :]]
        ids_BL, mask_BL, row_T, before_T, measured_T = (
            torch.tensor(x, device=device) for x in (ids, mask, rows, before, measured)
        )
        target_T = targets(sequences, device)
        return cls(ids_BL, row_T, before_T, row_T, measured_T, target_T, len(sequences), mask_BL)

    def inputs(self, lm: Any) -> dict[str, Any]:  # noqa: ARG002
        return {"input_ids": self.ids_BL, "attention_mask": self.mask_BL}


@dataclass(frozen=True)
class Flat(Laid):
    """All sequences end to end in one row, without padding, common beginnings stored once: for the fused decoder.

    row_T is 0 throughout. position_T: each token's place in its own sequence. blocks: which tokens attend to which.
    """

    position_T: Tensor
    blocks: Blocks

    @classmethod
    def of(cls, examples: Examples, device: torch.device, *, rows: int = ROUND, waste: float = WASTE) -> Flat:
        """`rows` and `waste` as in Blocks.of."""
        trees = [Tree.of(e) for e in examples if e]
        starts = list(itertools.accumulate((len(t.ids) for t in trees), initial=0))
        paths = [
            (s, p, at) for t, at in zip(trees, starts, strict=False) for s, p in zip(t.sequences, t.paths, strict=True)
        ]
        before = [at + n for s, p, at in paths for n in p[s.start - 1 : -1]]
        sequences = [s for s, _, _ in paths]
        number = [n for n, s in enumerate(sequences) for _ in range(s.measured)]
        measured = [i for s in sequences for i in s.ids[s.start :]]
        fill = [0] * (filled(starts[-1], rows) - starts[-1])
        ids, position = [i for t in trees for i in t.ids] + fill, [i for t in trees for i in t.positions] + fill
        ids_T, position_T, before_T, sequence_T, measured_T = (
            torch.tensor(x, device=device) for x in (ids, position, before, number, measured)
        )
        row_T, target_T = torch.zeros_like(before_T), targets(sequences, device)
        blocks = Blocks.of(trees, device, rows=rows, waste=waste)
        return cls(ids_T[None], row_T, before_T, sequence_T, measured_T, target_T, len(sequences), position_T, blocks)

    def inputs(self, lm: Any) -> dict[str, Any]:  # noqa: ARG002
        raise LeewayError("optim.layout: fused is for the fused decoder", fix="use layout: padded")


@dataclass(frozen=True)
class Packed(Laid):
    """Several sequences a row: a token sees its own sequence up to itself, and nothing else.

    position_BL: each token's place in its own sequence, from 0. visible_BLL: which tokens (last) each token sees.
    longest: tokens of the longest sequence.
    """

    position_BL: Tensor
    visible_BLL: Tensor
    longest: int

    @classmethod
    def of(cls, examples: Examples, device: torch.device, *, share: bool = True) -> Packed:
        """Lay `examples` out; `share` stores what an example's sequences begin with alike once.

        A shared beginning and what follows it form a tree: a token sees its ancestors. Trees go, longest first, into
        the first row that has room; the longest one sets the length of all rows.
        """
        trees = [Tree.of(part) for e in examples for part in ([e] if share else [[s] for s in e]) if part]
        length = max(len(t.ids) for t in trees)
        places, rows = place([len(t.ids) for t in trees], length)
        ids_BL, position_BL = (torch.zeros(rows, length, dtype=torch.long) for _ in range(2))
        visible_BLL = torch.eye(length, dtype=torch.bool).repeat(rows, 1, 1)  # padding sees itself: no empty softmax
        row, before = [], []
        for tree, (b, at) in zip(trees, places, strict=True):
            span = slice(at, at + len(tree.ids))
            ids_BL[b, span], position_BL[b, span] = torch.tensor(tree.ids), torch.tensor(tree.positions)
            visible_BLL[b, span, span] = tree.visible()
            row += [b] * sum(s.measured for s in tree.sequences)
            before += [at + n for s, p in zip(tree.sequences, tree.paths, strict=True) for n in p[s.start - 1 : -1]]
        sequences = [s for t in trees for s in t.sequences]
        number = [n for n, s in enumerate(sequences) for _ in range(s.measured)]
        measured = [i for s in sequences for i in s.ids[s.start :]]
        row_T, before_T, sequence_T, measured_T = (
            torch.tensor(x, device=device) for x in (row, before, number, measured)
        )
        return cls(
            ids_BL.to(device),
            row_T,
            before_T,
            sequence_T,
            measured_T,
            targets(sequences, device),
            len(sequences),
            position_BL.to(device),
            visible_BLL.to(device),
            max(len(s.ids) for s in sequences),
        )

    def inputs(self, lm: Any) -> dict[str, Any]:
        return {"input_ids": self.ids_BL, "position_ids": self.position_BL, "attention_mask": self._masks(lm)}

    def _masks(self, lm: Any) -> Any:
        """The mask [B, 1, L, L] as transformers takes a ready-made one, for each kind of layer where they differ.

        A ready-made mask stands in place of the model's sliding window, so that the window is built in.
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
        """True and False for sdpa; 0 and the most negative number, to be added to the scores, for eager attention."""
        kind, mask = lm.config._attn_implementation, visible_BLL[:, None]
        if kind == "sdpa":
            return mask
        if kind != "eager":
            raise LeewayError(f"optim.layout: packed does not go with {kind} attention", fix="use layout: padded")
        return torch.zeros(mask.shape, dtype=lm.dtype, device=mask.device).masked_fill(~mask, torch.finfo(lm.dtype).min)


def lay(examples: Examples, device: torch.device, layout: Layout = "padded") -> Laid:
    """The sequences of `examples` as one micro-batch."""
    if layout == "fused":
        return Flat.of(examples, device)
    return Packed.of(examples, device) if layout == "packed" else Padded.of([s for e in examples for s in e], device)


def longest(example: Seq[Sequence]) -> int:
    """Tokens of the example's longest sequence."""
    return max(len(s.ids) for s in example)


def stored(example: Seq[Sequence]) -> int:
    """Positions that the example takes when it is packed."""
    return len(Tree.of(example).ids)


def targets(sequences: Seq[Sequence], device: torch.device) -> Tensor | None:
    """Which measured tokens are targets, [T]; None where all are."""
    if all(s.start == s.target_start for s in sequences):
        return None
    flags = [k >= s.target_start for s in sequences for k in range(s.start, len(s.ids))]
    return torch.tensor(flags, device=device)


def place(lengths: Seq[int], capacity: int) -> tuple[list[tuple[int, int]], int]:
    """(row, first position) of each item, and the number of rows of this capacity; an item that is longer gets its own.

    Longest first, into the first row that has room (Johnson 1973, Near-optimal bin packing algorithms).
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
