"""SFT with safety data interleaved: what the plain mixture buys, before any objective is credited for it.

    L = -(1/N) [ sum_t log pi(y_t | x, y_<t) + sum_t log pi(s_t | z, s_<t) ]      (z, s) beside a `share` of examples

With probability `share` a safety example (a forbidden prompt and its refusal, say) stands beside an example. N counts
the targets of both: one mean per token over the mixture (after Bianchi et al. 2024, arXiv 2309.07875).
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
from leeway.objectives.objective import Companion, Plain, companion_of, nll, render_preferred


@dataclass(frozen=True)
class SftSafety(Plain):
    """Maximum likelihood of the preferred answers and, beside some of them, of a safety example's."""

    name: ClassVar[str] = "sft_safety"
    share: float = 0.25

    @property
    def companion(self) -> Companion:
        return "safety" if self.share else ""

    def render(self, example: Example, chat: Chat, rng: np.random.Generator) -> Seq[Sequence]:
        beside = render_preferred(companion_of(example), chat) if rng.random() < self.share else []
        return [*render_preferred(example, chat), *beside]

    def worst_case(self, example: Example, chat: Chat) -> Seq[Sequence]:
        """The safety example counts once the example has it."""
        safety = render_preferred(example.companion, chat) if example.companion else []
        return [*render_preferred(example, chat), *safety]

    def loss(self, policy: TokenStats, reference: TokenStats | None = None) -> Tensor:  # noqa: ARG002
        return nll(policy)


objective = SftSafety
loss = nll
