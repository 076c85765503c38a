"""SFT with safety data mixed in: the baseline that any objective has to beat.

    L = -(1/N) [ sum_t log pi(y_t | x, y_<t) + sum_t log pi(s_t | z, s_<t) ]      (z, s): a safety example

With probability `share` a safety example (such as a forbidden prompt and its refusal) is added to an example. N counts
the targets of both: one mean per token over the mixture (after Bianchi et al. 2024, arXiv 2309.07875).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from leeway.data.chat import Chat, Sequence
from leeway.data.types import Example
from leeway.objectives.objective import AuxiliaryKind, Plain, auxiliary_of, nll, render_preferred


@dataclass(frozen=True)
class SftSafety(Plain):
    """Maximum likelihood of the preferred answers and of a share of safety examples."""

    name: ClassVar[str] = "sft_safety"
    share: float = 0.25

    @property
    def auxiliary(self) -> AuxiliaryKind:
        return "safety" if self.share else ""

    def render(self, example: Example, chat: Chat, rng: np.random.Generator) -> list[Sequence]:
        safety = render_preferred(auxiliary_of(example), chat) if rng.random() < self.share else []
        return [*render_preferred(example, chat), *safety]

    def worst_case(self, example: Example, chat: Chat) -> list[Sequence]:
        """Include the safety example once it is attached."""
        safety = render_preferred(example.auxiliary, chat) if example.auxiliary else []
        return [*render_preferred(example, chat), *safety]


loss = nll
