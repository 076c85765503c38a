"""CFT: conditional fine-tuning with two learned control tokens (after Korbak et al. 2023, arXiv 2302.08582).

    L = -(1/N) [ sum_t log pi(y+_t | <SAFE> x, y+_<t) + sum_t log pi(y-_t | <UNSAFE> x, y-_<t) ]

The tokens are new embedding rows, trained and saved with the adapter. Each starts as the mean row of the word in its
name ("safe", "unsafe"): from one common row the two answers' gradients cancel, and the condition is learned late or not
at all. `token_lr` multiplies the learning rate of these rows. At test time the prompt is prefixed by `<SAFE>`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from leeway.data.chat import Chat, Sequence
from leeway.data.types import Example
from leeway.objectives.objective import PLAIN, Condition, Plain, dispreferred_of, nll, require_positive

SAFE, UNSAFE = "<SAFE>", "<UNSAFE>"


@dataclass(frozen=True)
class Cft(Plain):
    """Learn both answers, each under its own control token."""

    name: ClassVar[str] = "cft"
    needs_pairs: ClassVar[bool] = True
    control_tokens: ClassVar[tuple[str, ...]] = (SAFE, UNSAFE)
    token_lr: float = 1.0

    def __post_init__(self) -> None:
        require_positive(self.name, token_lr=self.token_lr)

    @property
    def conditions(self) -> tuple[Condition, ...]:
        return (Condition(SAFE, SAFE), PLAIN, Condition(UNSAFE, UNSAFE))

    def render(self, example: Example, chat: Chat, rng: np.random.Generator) -> list[Sequence]:  # noqa: ARG002
        return [
            chat.with_prefix(SAFE).sequence(example.prompt, example.preferred),
            chat.with_prefix(UNSAFE).sequence(example.prompt, dispreferred_of(example)),
        ]


loss = nll
