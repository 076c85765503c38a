"""The output layer: logits from final hidden states, whole or in blocks of the vocabulary.

Shape legend: C tokens, D width, V vocabulary, N words of one block.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import nullcontext
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any, Literal

import torch
from torch import Tensor

Direction = Literal["reverse", "forward"]

HALF = (torch.bfloat16, torch.float16)
BLOCKED = -1e9  # finite, so that a difference of two blocked entries is zero and not NaN
CHUNK_ELEMENTS = 1 << 24  # logits held at once on a GPU: 64 MiB in float32
HELD_ELEMENTS = 1 << 22  # and on a CPU, where all of a chunk's logits are held: 16 MiB
ROWS = 512  # tokens of a chunk on a CPU
BLOCK_ELEMENTS = 1 << 19  # logits of a block on a CPU: 2 MiB, which two cores' caches hold
ROUND = 64  # a CPU's products are compiled for each number of rows they meet: few are met so


@dataclass(frozen=True)
class Logits:
    """Logits of the words from `start` to `stop`, soft-capped, [C, N]; d capped / d raw where they are."""

    start: int
    stop: int
    capped_CN: Tensor
    slope_CN: Tensor | None
    weight_ND: Tensor

    def times_weight(self, parts: Seq[Tensor], dtype: torch.dtype) -> Tensor:
        """sum over words of each part [C, N] times d logit / d hidden: [parts C, D], part and weight in `dtype`."""
        scaled = parts if self.slope_CN is None else [p * self.slope_CN for p in parts]
        return torch.cat([p.to(dtype) for p in scaled]) @ self.weight_ND.to(dtype)

    def rows(self, some: slice) -> Logits:
        """Of some of the tokens."""
        slope_CN = None if self.slope_CN is None else self.slope_CN[some]
        return replace(self, capped_CN=self.capped_CN[some], slope_CN=slope_CN)


@dataclass(frozen=True)
class Head:
    """The output layer: logits_TV = softcap(hidden_TD @ weight_VD.T).

    `softcap` is Gemma 2's final logit soft-capping, c * tanh(logits / c), or None. `blocked` are ids that are read but
    never predicted (control tokens): they have no share in the distribution. `reference` is the output layer that the
    reference's hidden states are read through, where it is another one than this: a weight that trains, or that is
    tied to an embedding that trains, is not the one that the reference had.
    """

    weight_VD: Tensor
    softcap: float | None = None
    blocked: tuple[int, ...] = ()
    reference: Head | None = None

    def logits(self, hidden_CD: Tensor) -> Tensor:
        """[C, V] logits in float32 (or float64): of half-precision states and weights too, never rounded to them."""
        return torch.cat([block.capped_CN for block in self.blocks(hidden_CD)], -1)

    def blocks(self, hidden_CD: Tensor) -> Iterator[Logits]:
        """The same, block by block.

        In half precision on a CPU states and a block of the weight are widened: no second copy of the weight is held.
        """
        words = len(self.weight_VD)
        widen = hidden_CD.dtype in HALF and not hidden_CD.is_cuda
        states_CD = hidden_CD.float() if widen else hidden_CD
        size = max(1, BLOCK_ELEMENTS // max(1, len(hidden_CD))) if hidden_CD.device.type == "cpu" else words
        for start in range(0, words, size):
            weight_ND = self.weight_VD[start : start + size]
            with torch.autocast(hidden_CD.device.type, enabled=False):
                raw_CN = _widened_product(states_CD, weight_ND) if widen else _product(states_CD, weight_ND)
            capped_CN = raw_CN if self.softcap is None else self.softcap * torch.tanh(raw_CN / self.softcap)
            slope_CN = None if self.softcap is None else self.slope(capped_CN)
            if here := [i - start for i in self.blocked if start <= i < start + size]:
                capped_CN[:, here] = BLOCKED
            yield Logits(start, min(start + size, words), capped_CN, slope_CN, weight_ND)

    def slope(self, capped: Tensor) -> Tensor:
        """d capped logit / d logit of a soft-capped head."""
        assert self.softcap is not None
        return 1 - (capped / self.softcap) ** 2

    def chunks(self, total: int, *, held: bool = False) -> list[slice]:
        """Runs of tokens whose logits are computed together, on a CPU about equally long.

        `held` where all of a run's logits are there at once.
        """
        words = len(self.weight_VD)
        if self.weight_VD.device.type != "cpu":
            size = max(1, CHUNK_ELEMENTS // words)
        else:
            most = max(1, min(ROWS, HELD_ELEMENTS // words)) if held else ROWS
            size = max(1, min(most, filled(-(-total // max(1, -(-total // most))))))
        return [slice(i, min(i + size, total)) for i in range(0, total, size)]


def filled(rows: int, multiple: int = ROUND) -> int:
    """The next multiple."""
    return -(-rows // multiple) * multiple


def _product(hidden_CD: Tensor, weight_ND: Tensor) -> Tensor:
    weight_ND = weight_ND.to(hidden_CD.dtype)
    if hidden_CD.dtype in HALF:  # on a GPU: its sums are in float32, and may be had as they are
        return torch.mm(hidden_CD, weight_ND.T, out_dtype=torch.float32)
    return hidden_CD @ weight_ND.T


def _widened_product(hidden_CD: Tensor, weight_ND: Tensor) -> Tensor:
    with _COARSE_INPUTS if weight_ND.dtype == torch.bfloat16 else nullcontext():
        return hidden_CD @ weight_ND.float().T


class _CoarseInputs:
    """float32 products through oneDNN, about twice as fast as the default on some CPUs.

    It may round its inputs to bfloat16, which changes nothing in numbers that were in bfloat16; sums are in float32.
    The setting is the whole process's: of several threads the last one out puts it back.
    """

    def __init__(self) -> None:
        self._lock, self._within, self._before = Lock(), 0, ""
        self._settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]

    def __enter__(self) -> None:
        with self._lock:
            if self._within == 0:
                self._before, self._settings.fp32_precision = self._settings.fp32_precision, "bf16"
            self._within += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._within -= 1
            if self._within == 0:
                self._settings.fp32_precision = self._before


_COARSE_INPUTS = _CoarseInputs()
