"""How sequences lie in one micro-batch: where their tokens are, and which hidden state predicts each measured one.

Shape legend: B rows, L positions, T measured tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from leeway.data.chat import Sequence


@dataclass(frozen=True)
class Padded:
    """B sequences padded on the right to length L: one row each."""

    ids_BL: Tensor
    mask_BL: Tensor
    row_T: Tensor
    before_T: Tensor  # position whose hidden state predicts the measured token
    sequence_T: Tensor
    measured_T: Tensor  # the measured tokens' ids
    target_T: Tensor | None  # which of them are targets; None where all are
    sequences: int

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
        return cls(ids_BL, mask_BL, row_T, before_T, row_T, measured_T, target_T, len(sequences))

    def inputs(self) -> dict[str, Any]:
        """What the decoder is called with."""
        return {"input_ids": self.ids_BL, "attention_mask": self.mask_BL}


def targets(sequences: Seq[Sequence], device: torch.device) -> Tensor | None:
    """Which measured tokens are targets, [T]; None where all are."""
    if all(s.start == s.target_start for s in sequences):
        return None
    flags = [k >= s.target_start for s in sequences for k in range(s.start, len(s.ids))]
    return torch.tensor(flags, device=device)
