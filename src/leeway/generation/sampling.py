"""Ancestral sampling: each token drawn from softmax(logits / T), nothing cut away by top-k or top-p.

Every request has a random stream of its own, from (prompt ids, temperature, sample, seed), and spends one uniform
number of it per token. What stands beside a request in its batch can change its answer only by the rounding of a
logit, never by another draw; in the same batch on a CPU it is the same to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from leeway.hashing import derive_seed

BLOCK = 512  # tokens whose probabilities are summed on the device before the running sum is taken on the CPU


def stream(prompt: Seq[int], temperature: float, sample: int, seed: int) -> np.random.Generator:
    """The uniform numbers of one request."""
    return np.random.default_rng(derive_seed("answer", list(prompt), float(temperature), sample, seed))


def draw(logits_BV: Tensor, temperature: float, u_B: Tensor) -> Tensor:
    """The token at the u-quantile of softmax(logits / T) of each row; a token of probability 0 is never drawn.

    A running sum over the vocabulary is not deterministic on a GPU, so blocks are summed there and searched on the CPU.
    """
    p_BV = (logits_BV.double() / temperature).softmax(-1)
    blocks_BKN = torch.nn.functional.pad(p_BV, (0, -p_BV.shape[1] % BLOCK)).view(len(p_BV), -1, BLOCK)
    sums_BK = blocks_BKN.sum(-1).cpu()
    block_B, rest_B = _quantile(sums_BK, u_B * sums_BK.sum(-1))
    rows = torch.arange(len(block_B))
    chosen_BN = blocks_BKN[rows.to(p_BV.device), block_B.to(p_BV.device)].cpu()
    within_B, _ = _quantile(chosen_BN, rest_B)
    return (block_B * BLOCK + within_B).clamp(max=logits_BV.shape[1] - 1).to(logits_BV.device)  # even where all is NaN


def _quantile(mass_BN: Tensor, target_B: Tensor) -> tuple[Tensor, Tensor]:
    """(the first index whose running sum exceeds the target, how much of the target lies in it)."""
    running_BN = mass_BN.cumsum(-1)
    below_B = torch.minimum(target_B, torch.nextafter(running_BN[:, -1], torch.zeros_like(target_B)))
    index_B = torch.searchsorted(running_BN, below_B[:, None], right=True)[:, 0].clamp(max=mass_BN.shape[1] - 1)
    before_B = running_BN.gather(1, index_B[:, None])[:, 0] - mass_BN.gather(1, index_B[:, None])[:, 0]
    return index_B, (below_B - before_B).clamp(min=0.0)


class Finite:
    """A logits processor that notes each row's first step whose scores hold a NaN or +inf, or nothing but -inf.

    Such a row is ended there by `stop`: its batch does not wait for tokens that mean nothing.
    """

    def __init__(self, stop: int) -> None:
        self.stop = stop
        self._bad: list[Tensor] = []  # one [B] per step, on the model's device

    def __call__(self, ids_BL: Tensor, scores_BV: Tensor) -> Tensor:  # noqa: ARG002 - the library's protocol
        bad_B = ~scores_BV.amax(-1).isfinite()  # a NaN anywhere is the maximum
        self._bad.append(bad_B)
        ended_V = torch.full_like(scores_BV[0], -torch.inf)
        ended_V[self.stop] = 0.0
        return torch.where(bad_B[:, None], ended_V, scores_BV)

    def until(self) -> list[int | None]:
        """Each row's first step without finite scores; None where all were finite."""
        bad_BS = torch.stack(self._bad, dim=1).tolist()
        return [row.index(True) if True in row else None for row in bad_BS]


@dataclass(frozen=True)
class Ancestral:
    """A logits processor after which the largest score is the drawn token's; row b draws from `streams[b]`."""

    temperature: float
    streams: Seq[np.random.Generator]

    def tokens(self, scores_BV: Tensor, rows: Seq[int]) -> Tensor:
        """The next token of each row; row b draws from stream rows[b]."""
        u_B = torch.tensor([self.streams[r].random() for r in rows], dtype=torch.float64)
        return draw(scores_BV, self.temperature, u_B)

    def __call__(self, ids_BL: Tensor, scores_BV: Tensor) -> Tensor:  # noqa: ARG002 - the library's protocol
        token_B = self.tokens(scores_BV, range(len(scores_BV)))
        return torch.full_like(scores_BV, -torch.inf).scatter_(1, token_B[:, None], 0.0)
