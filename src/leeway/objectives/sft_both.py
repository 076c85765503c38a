"""Control arm: maximum likelihood of both answers, unlabelled. CFT without its condition.

    L = -(1/N) [ sum_t log pi(y+_t | x, y+_<t) + sum_t log pi(y-_t | x, y-_<t) ]

DPO, ORPO and CFT see dispreferred answers, SFT, IP and KL never do. This arm sees the same tokens as CFT, so a
difference between the two is due to the condition, not to the text.
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
from leeway.objectives.objective import Plain, nll, render_pair


@dataclass(frozen=True)
class SftBoth(Plain):
    """Learn both answers of a pair."""

    name: ClassVar[str] = "sft_both"
    needs_pairs: ClassVar[bool] = True

    def render(self, example: Example, chat: Chat, rng: np.random.Generator) -> Seq[Sequence]:  # noqa: ARG002
        return render_pair(example, chat)

    def loss(self, policy: TokenStats, reference: TokenStats | None = None) -> Tensor:  # noqa: ARG002
        return nll(policy)


objective = SftBoth
loss = nll
