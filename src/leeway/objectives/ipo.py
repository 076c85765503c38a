"""IPO: identity preference optimisation (Azar et al. 2023, arXiv 2310.12036, equation 17; beta is its tau).

    h = (log pi(y+|x) - log pi_ref(y+|x)) - (log pi(y-|x) - log pi_ref(y-|x))
    L = mean ( h - 1 / (2 beta) )^2

`length: sum` sums log-probabilities over answer tokens, as in the equation; `mean` averages them, as some trainers do
(the scale of h, and so the meaning of beta, is then per token).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from leeway.model.forward import TokenStats
from leeway.objectives.dpo import margins
from leeway.objectives.objective import Needs, Plain, require_positive


def loss(
    chosen_N: Tensor, rejected_N: Tensor, ref_chosen_N: Tensor, ref_rejected_N: Tensor, beta: float = 0.1
) -> Tensor:
    """Return the per-pair IPO loss, [N], nats squared; (1 / (2 beta))^2 where policy and reference agree."""
    return (margins(chosen_N, rejected_N, ref_chosen_N, ref_rejected_N, 1.0) - 1 / (2 * beta)) ** 2


@dataclass(frozen=True)
class Ipo(Plain):
    """Preference pairs against a frozen reference, with a squared loss around a fixed margin."""

    name: ClassVar[str] = "ipo"
    needs_pairs: ClassVar[bool] = True
    needs_reference: ClassVar[Needs] = "logps"
    beta: float = 0.1
    length: Literal["sum", "mean"] = "sum"

    def __post_init__(self) -> None:
        require_positive(self.name, beta=self.beta)

    def loss(self, policy: TokenStats, reference: TokenStats | None = None) -> Tensor:
        assert reference is not None
        pi_S, ref_S = (s.sum_S() if self.length == "sum" else s.mean_S() for s in (policy, reference))
        return loss(pi_S[0::2], pi_S[1::2], ref_S[0::2], ref_S[1::2], self.beta).sum() / policy.totals.examples
