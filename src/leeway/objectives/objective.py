"""The objective protocol: which sequences go through the model, and a pure loss of their targets' statistics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence as Seq
from typing import ClassVar, Literal, Protocol

import numpy as np
from torch import Tensor

from leeway.data.chat import Chat, Sequence
from leeway.data.items import Example
from leeway.model.forward import TokenStats
from leeway.model.tokenstats import Direction

Needs = Literal["nothing", "logps", "distribution"]


class Objective(Protocol):
    """One way to learn from the same examples."""

    name: ClassVar[str]
    needs_pairs: ClassVar[bool]
    needs_reference: ClassVar[Needs]  # nothing, the reference's log-probs, or its whole distribution (for a KL)
    control_tokens: ClassVar[tuple[str, ...]]  # new embedding rows that are learned
    test_prefix: ClassVar[str]  # what stands before a prompt at test time

    @property
    def direction(self) -> Direction:
        """Which way a KL points, where one is needed."""
        ...

    def render(self, example: Example, chat: Chat, rng: np.random.Generator) -> Seq[Sequence]:
        """The token sequences of one example; each knows which of its tokens are targets."""
        ...

    def worst_case(self, example: Example, chat: Chat) -> Seq[Sequence]:
        """Every sequence that `render` can make of one example, whatever it draws."""
        ...

    def loss(self, policy: TokenStats, reference: TokenStats | None) -> Tensor:
        """A scalar, normalised by `policy.totals` so that micro-batches add up to the optimiser batch."""
        ...


class Plain(ABC):
    """What most objectives share: no pairs, no reference, no control tokens, plain prompts at test time."""

    needs_pairs: ClassVar[bool] = False
    needs_reference: ClassVar[Needs] = "nothing"
    control_tokens: ClassVar[tuple[str, ...]] = ()
    test_prefix: ClassVar[str] = ""

    @property
    def direction(self) -> Direction:
        return "reverse"

    @abstractmethod
    def render(self, example: Example, chat: Chat, rng: np.random.Generator) -> Seq[Sequence]:
        """Each objective's own."""

    def worst_case(self, example: Example, chat: Chat) -> Seq[Sequence]:
        """Most objectives draw nothing: there is one rendering."""
        return self.render(example, chat, np.random.default_rng(0))


def render_preferred(example: Example, chat: Chat) -> list[Sequence]:
    return [chat.sequence(example.prompt, example.preferred)]


def render_pair(example: Example, chat: Chat) -> list[Sequence]:
    """The preferred answer's sequence, then the dispreferred one's."""
    if example.dispreferred is None:
        raise ValueError(f"example {example.id} has no dispreferred answer")
    return [
        chat.sequence(example.prompt, example.preferred),
        chat.sequence(example.prompt, example.dispreferred),
    ]


def nll(policy: TokenStats) -> Tensor:
    """Mean negative log-likelihood per target token of the optimiser batch, nats."""
    return -policy.logp_T.sum() / policy.totals.tokens
