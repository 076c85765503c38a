"""KL-regularised SFT: maximum likelihood with a penalty for leaving the reference's distribution.

    L = NLL + weight * (1/N) sum_t D( pi(.|x, y_<t) || pi_ref(.|x, y_<t) )

The divergence is over the full vocabulary at every target token: single-sample estimators on data tokens are not a KL
(with k1 the gradient is a rescaled SFT). `reverse`, D(policy || reference), is the default; `forward` is
D(reference || policy).
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from leeway.data.chat import Chat, Sequence
from leeway.data.items import Example
from leeway.model.forward import TokenStats
from leeway.model.tokenstats import Direction
from leeway.objectives.objective import Needs, Plain, nll, render_preferred


def loss(logp_T: Tensor, kl_T: Tensor, weight: float = 0.001) -> Tensor:
    """Per-token loss, [T], nats: -log pi + weight * KL."""
    return weight * kl_T - logp_T


@dataclass(frozen=True)
class Kl(Plain):
    """SFT held near the model that the trajectory started from."""

    name: ClassVar[str] = "kl"
    needs_reference: ClassVar[Needs] = "distribution"
    weight: float = 0.001
    towards: Direction = "reverse"

    @property
    def direction(self) -> Direction:
        return self.towards

    def render(self, example: Example, chat: Chat, rng: np.random.Generator) -> Seq[Sequence]:  # noqa: ARG002
        return render_preferred(example, chat)

    def loss(self, policy: TokenStats, reference: TokenStats | None = None) -> Tensor:  # noqa: ARG002
        if policy.kl_T is None:
            raise ValueError("the KL objective needs the divergence to its reference")
        return nll(policy) + self.weight * policy.kl_T.sum() / policy.totals.tokens


objective = Kl
