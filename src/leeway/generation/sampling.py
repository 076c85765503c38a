"""Ancestral sampling: each token from softmax(logits / T), without top-k or top-p.

Each request has its own random stream, seeded by (prompt ids, temperature, sample, seed), and consumes one uniform
number per token. The rest of a batch can change a reply only through the rounding of logits, not through the random
numbers.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from leeway.hashing import derive_seed

BLOCK = 512  # tokens summed on the device before the cumulative sum on the CPU


def stream(prompt: Seq[int], temperature: float, sample: int, seed: int) -> np.random.Generator:
    """Return the random stream of one request."""
    return np.random.default_rng(derive_seed("answer", list(prompt), float(temperature), sample, seed))


def draw(logits_BV: Tensor, temperature: float, u_B: Tensor) -> Tensor:
    """Return the token at the u-quantile of softmax(logits / T) for each row, [B]; never one of probability 0.

    A cumulative sum over the vocabulary is not deterministic on a GPU, so sum blocks there and search on the CPU.
    """
    p_BV = (logits_BV.double() / temperature).softmax(-1)
    blocks_BKN = torch.nn.functional.pad(p_BV, (0, -p_BV.shape[1] % BLOCK)).view(len(p_BV), -1, BLOCK)
    sums_BK = blocks_BKN.sum(-1).cpu()
    block_B, rest_B = _quantile(sums_BK, u_B * sums_BK.sum(-1))
    rows = torch.arange(len(block_B))
    block_BN = blocks_BKN[rows.to(p_BV.device), block_B.to(p_BV.device)].cpu()
    within_B, _ = _quantile(block_BN, rest_B)
    return (
        (block_B * BLOCK + within_B).clamp(max=logits_BV.shape[1] - 1).to(logits_BV.device)
    )  # in range even if all is NaN


def _quantile(mass_BN: Tensor, target_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return (the first index whose cumulative sum exceeds the target, the remainder of the target within it)."""
    cumulative_BN = mass_BN.cumsum(-1)
    below_B = torch.minimum(target_B, torch.nextafter(cumulative_BN[:, -1], torch.zeros_like(target_B)))
    index_B = torch.searchsorted(cumulative_BN, below_B[:, None], right=True)[:, 0].clamp(max=mass_BN.shape[1] - 1)
    before_B = cumulative_BN.gather(1, index_B[:, None])[:, 0] - mass_BN.gather(1, index_B[:, None])[:, 0]
    return index_B, (below_B - before_B).clamp(min=0.0)


class NonFiniteGuard:
    """A logits processor that records each row's first step with NaN, +inf or only -inf among its scores.

    It forces the token `stop` there, so that the batch does not continue that row.
    """

    def __init__(self, stop: int) -> None:
        self.stop = stop
        self._bad: list[Tensor] = []  # one [B] per step, on the model's device

    def __call__(self, ids_BL: Tensor, scores_BV: Tensor) -> Tensor:  # noqa: ARG002 - the library's protocol
        bad_B = ~scores_BV.amax(-1).isfinite()  # amax propagates NaN
        self._bad.append(bad_B)
        stop_V = torch.full_like(scores_BV[0], -torch.inf)
        stop_V[self.stop] = 0.0
        return torch.where(bad_B[:, None], stop_V, scores_BV)

    def first_bad_steps(self) -> list[int | None]:
        """Return each row's first step without finite scores, or None."""
        bad_BS = torch.stack(self._bad, dim=1).tolist()
        return [row.index(True) if True in row else None for row in bad_BS]


@dataclass(frozen=True)
class AncestralSampler:
    """A logits processor that leaves only the sampled token; row b samples from `streams[b]`."""

    temperature: float
    streams: Seq[np.random.Generator]

    def tokens(self, scores_BV: Tensor, rows: Seq[int]) -> Tensor:
        """Sample one token per row, row b from stream rows[b]."""
        u_B = torch.tensor([self.streams[r].random() for r in rows], dtype=torch.float64)
        return draw(scores_BV, self.temperature, u_B)

    def __call__(self, ids_BL: Tensor, scores_BV: Tensor) -> Tensor:  # noqa: ARG002 - the library's protocol
        token_B = self.tokens(scores_BV, range(len(scores_BV)))
        return torch.full_like(scores_BV, -torch.inf).scatter_(1, token_B[:, None], 0.0)
