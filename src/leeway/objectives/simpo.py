"""SimPO: simple preference optimisation (Meng et al. 2024, arXiv 2405.14734, equation 6).

    L = -mean log sigmoid( beta (a+ - a-) - gamma ) + nll * NLL(y+)      a = mean log-probability of an answer's tokens

No reference model. `gamma` is the target reward margin. `nll` adds maximum likelihood of the preferred answers, mean
per token of the batch; 0, the default, is SimPO as published.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from leeway.model.forward import TokenStats
from leeway.objectives.objective import Plain, nll_preferred, require_positive


def loss(chosen_N: Tensor, rejected_N: Tensor, beta: float = 2.0, gamma: float = 0.5) -> Tensor:
    """Return the per-pair SimPO loss from mean log-probabilities, [N], nats."""
    return -F.logsigmoid(beta * (chosen_N - rejected_N) - gamma)


@dataclass(frozen=True)
class Simpo(Plain):
    """Preference pairs by length-normalised likelihood, with a margin instead of a reference."""

    name: ClassVar[str] = "simpo"
    needs_pairs: ClassVar[bool] = True
    beta: float = 2.0
    gamma: float = 0.5
    nll: float = 0.0

    def __post_init__(self) -> None:
        require_positive(self.name, beta=self.beta)

    def loss(self, policy: TokenStats, reference: TokenStats | None = None) -> Tensor:  # noqa: ARG002
        mean_S = policy.mean_S()
        preference = loss(mean_S[0::2], mean_S[1::2], self.beta, self.gamma).sum() / policy.totals.examples
        return preference + self.nll * nll_preferred(policy) if self.nll else preference
