"""Sequences that begin alike as one tree: what they share is stored, and goes through the model, once."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from leeway.data.chat import Sequence


@dataclass(frozen=True)
class Tree:
    """Sequences that begin alike, each token of a common beginning once: nodes in order, a node after its ancestors.

    ids, positions: of each node. paths: the nodes that each sequence runs through.
    """

    sequences: Seq[Sequence]
    ids: list[int]
    positions: list[int]
    paths: list[list[int]]

    @classmethod
    def of(cls, sequences: Seq[Sequence]) -> Tree:
        """Each sequence branches off where it leaves the earlier one that it follows longest."""
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

    def visible(self) -> Tensor:
        """Which nodes (columns) each node (row) sees: itself and its ancestors."""
        seen = torch.zeros(len(self.ids), len(self.ids), dtype=torch.bool)
        for path in self.paths:
            nodes = torch.tensor(path)
            seen[nodes[:, None], nodes] = torch.ones(len(path), len(path), dtype=torch.bool).tril()
        return seen


def common_prefix(a: Seq[int], b: Seq[int]) -> int:
    """How many ids two sequences begin with alike."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
