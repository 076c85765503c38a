"""IPO: identity preference optimisation (Azar et al. 2023, arXiv 2310.12036, equation 17; beta is its tau).

    h = (log pi(y+|x) - log pi_ref(y+|x)) - (log pi(y-|x) - log pi_ref(y-|x))
    L = mean ( h - 1 / (2 beta) )^2

`length: sum` takes log-probabilities summed over answer tokens, as the equation is written; `mean` divides each
answer's by its own number of tokens, as some trainers do (beta then means another thing: the scale of h is per token).
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from torch import Tensor

from leeway.data.chat import Chat, Sequence
from leeway.data.types import Example
from leeway.model.forward import TokenStats
from leeway.objectives.dpo import margins
from leeway.objectives.objective import Needs, Plain, positive, render_pair


def loss(
    chosen_N: Tensor, rejected_N: Tensor, ref_chosen_N: Tensor, ref_rejected_N: Tensor, beta: float = 0.1
) -> Tensor:
    """Per-pair IPO loss, [N], nats squared: (1 / (2 beta))^2 where policy and reference agree."""
    return (margins(chosen_N, rejected_N, ref_chosen_N, ref_rejected_N, 1.0) - 1 / (2 * beta)) ** 2


@dataclass(frozen=True)
class Ipo(Plain):
    """Preference pairs against a frozen reference, pulled to a margin of fixed size and not beyond it."""

    name: ClassVar[str] = "ipo"
    needs_pairs: ClassVar[bool] = True
    needs_reference: ClassVar[Needs] = "logps"
    beta: float = 0.1
    length: Literal["sum", "mean"] = "sum"

    def __post_init__(self) -> None:
        positive(self.name, beta=self.beta)

    def render(self, example: Example, chat: Chat, rng: np.random.Generator) -> Seq[Sequence]:  # noqa: ARG002
        return render_pair(example, chat)

    def loss(self, policy: TokenStats, reference: TokenStats | None) -> Tensor:
        if reference is None:
            raise ValueError("IPO needs the reference's statistics")
        pi_S, ref_S = (s.sum_S() if self.length == "sum" else s.mean_S() for s in (policy, reference))
        return loss(pi_S[0::2], pi_S[1::2], ref_S[0::2], ref_S[1::2], self.beta).sum() / policy.totals.examples


objective = Ipo
