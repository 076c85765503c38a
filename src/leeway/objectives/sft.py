"""SFT: supervised fine-tuning on the preferred answers.

L = -(1/N) sum_t log pi(y_t | x, y_<t)        N = target tokens of the optimiser batch
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from leeway.data.chat import Chat, Sequence
from leeway.data.types import Example
from leeway.model.forward import TokenStats
from leeway.objectives.objective import Plain, nll, render_preferred


@dataclass(frozen=True)
class Sft(Plain):
    """Maximum likelihood of the preferred answers."""

    name: ClassVar[str] = "sft"

    def render(self, example: Example, chat: Chat, rng: np.random.Generator) -> Seq[Sequence]:  # noqa: ARG002
        return render_preferred(example, chat)

    def loss(self, policy: TokenStats, reference: TokenStats | None = None) -> Tensor:  # noqa: ARG002
        return nll(policy)


objective = Sft
loss = nll
