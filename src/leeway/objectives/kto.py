"""KTO: Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv 2402.01306, equation 7).

    r  = log pi(y|x) - log pi_ref(y|x)                    log-probabilities summed over answer tokens
    v  = lambda_D sigmoid( beta (r - z0) )                for a desirable answer
         lambda_U sigmoid( beta (z0 - r) )                for an undesirable one
    L  = mean ( lambda_y - v )                            over all answers, two for each pair
    z0 = max( 0, mean over the batch of r(x, y') )        y' belongs to another prompt; no gradient passes through z0

A pair's preferred answer is desirable, its dispreferred one undesirable. y' is the preferred answer of the auxiliary
example, another example of the task; the policy's r(x, y') is computed without dropout, like the reference's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from leeway.data.chat import Chat, Sequence
from leeway.data.types import Example
from leeway.model.forward import TokenStats
from leeway.objectives.objective import AuxiliaryKind, Needs, Plain, auxiliary_of, render_pair, require_positive


def loss(
    desirable_N: Tensor,
    undesirable_N: Tensor,
    z0: float = 0.0,
    beta: float = 0.1,
    weights: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    """Return the loss of N pairs, [N]: the mean of both answers' losses, from log-ratios r [N], nats.

    `weights` are (lambda_D, lambda_U); the loss is half their mean where policy and reference agree.
    """
    good_N = weights[0] * torch.sigmoid(-beta * (desirable_N - z0))  # lambda - lambda sigmoid(u) = lambda sigmoid(-u)
    bad_N = weights[1] * torch.sigmoid(-beta * (z0 - undesirable_N))
    return (good_N + bad_N) / 2


@dataclass(frozen=True)
class Kto(Plain):
    """Each answer is desirable or undesirable on its own, valued against the batch baseline z0."""

    name: ClassVar[str] = "kto"
    needs_pairs: ClassVar[bool] = True
    needs_reference: ClassVar[Needs] = "logps"
    beta: float = 0.1
    desirable: float = 1.0
    undesirable: float = 1.0

    def __post_init__(self) -> None:
        require_positive(self.name, beta=self.beta)
        if self.desirable == self.undesirable == 0:
            raise ValueError("kto: desirable and undesirable are both 0, so nothing would be learned")

    @property
    def auxiliary(self) -> AuxiliaryKind:
        return "task"

    def worst_case(self, example: Example, chat: Chat) -> list[Sequence]:
        """Include the mismatched pair once the auxiliary example is attached."""
        return [*render_pair(example, chat), *(self.baseline_sequences(example, chat) if example.auxiliary else ())]

    def baseline_sequences(self, example: Example, chat: Chat) -> list[Sequence]:
        return [chat.sequence(example.prompt, auxiliary_of(example).preferred)]

    def baseline(self, policy: TokenStats, reference: TokenStats) -> float:
        return (policy.sum_S() - reference.sum_S()).sum().item() / policy.totals.examples

    def loss(self, policy: TokenStats, reference: TokenStats | None = None) -> Tensor:
        assert reference is not None
        ratio_S, z0 = policy.sum_S() - reference.sum_S(), max(0.0, policy.totals.baseline)
        weights = (self.desirable, self.undesirable)
        return loss(ratio_S[0::2], ratio_S[1::2], z0, self.beta, weights).sum() / policy.totals.examples
