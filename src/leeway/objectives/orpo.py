"""ORPO: odds-ratio preference optimisation (Hong et al. 2024, arXiv 2403.07691, equations 6 and 7).

    log odds(y|x) = a - log(1 - e^a)              a = mean log-probability of the answer's tokens
    L = nll * NLL(y+) - weight * mean log sigmoid( log odds(y+|x) - log odds(y-|x) )

Implementations differ in the NLL, so the convention is a setting. `nll_scope`: preferred answer tokens (`answer`), or
prompt and answer (`all`). `nll_mean`: mean per token of the optimiser batch (`token`), or mean over examples of
per-example means (`sequence`). The odds ratio always uses answer tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from leeway.data.chat import Chat, Sequence
from leeway.data.types import Example
from leeway.model.forward import TokenStats
from leeway.objectives.objective import Plain, nll_preferred, render_pair

LN2 = math.log(2.0)


def log1mexp(a: Tensor) -> Tensor:
    """log(1 - e^a) for a < 0, stable at both ends (Maechler 2012): expm1 near zero, log1p far from it."""
    near = a > -LN2
    safe_near, safe_far = torch.where(near, a, -LN2), torch.where(near, -LN2, a)
    return torch.where(near, torch.log(-torch.expm1(safe_near)), torch.log1p(-torch.exp(safe_far)))


def log_odds_ratio(chosen_N: Tensor, rejected_N: Tensor) -> Tensor:
    """Return log odds(chosen) - log odds(rejected) from mean log-probabilities a < 0, [N], nats."""
    tiny = -torch.finfo(chosen_N.dtype).tiny  # keeps the odds finite
    chosen_N, rejected_N = chosen_N.clamp(max=tiny), rejected_N.clamp(max=tiny)
    return (chosen_N - rejected_N) - (log1mexp(chosen_N) - log1mexp(rejected_N))


def loss(chosen_N: Tensor, rejected_N: Tensor) -> Tensor:
    """Return the per-pair odds-ratio loss, [N], nats, without weight and NLL."""
    return -F.logsigmoid(log_odds_ratio(chosen_N, rejected_N))


@dataclass(frozen=True)
class Orpo(Plain):
    """NLL of the preferred answers plus an odds-ratio term on each pair; no reference model."""

    name: ClassVar[str] = "orpo"
    needs_pairs: ClassVar[bool] = True
    weight: float = 0.05
    nll: float = 1.0
    nll_scope: Literal["answer", "all"] = "answer"
    nll_mean: Literal["token", "sequence"] = "token"

    def __post_init__(self) -> None:
        if self.weight == self.nll == 0:
            raise ValueError("orpo: weight and nll are both 0, so nothing would be learned")

    def render(self, example: Example, chat: Chat, rng: np.random.Generator) -> list[Sequence]:  # noqa: ARG002
        preferred, dispreferred = render_pair(example, chat)
        return [preferred.with_prompt() if self.nll_scope == "all" else preferred, dispreferred]

    def loss(self, policy: TokenStats, reference: TokenStats | None = None) -> Tensor:  # noqa: ARG002
        mean_S = policy.mean_S()
        ratio = loss(mean_S[0::2], mean_S[1::2]).sum() / policy.totals.examples
        return self.nll * self._supervised(policy) + self.weight * ratio

    def _supervised(self, policy: TokenStats) -> Tensor:
        """Return the NLL of the preferred sequences under the chosen convention, nats."""
        if self.nll_scope == "answer" and self.nll_mean == "token":
            return nll_preferred(policy)
        counted_T = policy.weight_T if self.nll_scope == "answer" else torch.ones_like(policy.logp_T)
        zero_S = torch.zeros(policy.sequences, dtype=policy.logp_T.dtype, device=policy.logp_T.device)
        sum_N = zero_S.index_add(0, policy.sequence_T, policy.logp_T * counted_T)[0::2]
        if self.nll_mean == "token":
            return -sum_N.sum() / policy.totals.preferred_measured
        count_N = zero_S.index_add(0, policy.sequence_T, counted_T)[0::2]
        return -(sum_N / count_N).sum() / policy.totals.examples
