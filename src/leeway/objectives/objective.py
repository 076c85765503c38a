"""The objective protocol: which sequences go through the model, and a pure loss of their targets' statistics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import numpy as np
from torch import Tensor

from leeway.data.chat import Chat, Sequence
from leeway.data.types import Example
from leeway.model.forward import TokenStats
from leeway.model.token_stats import Direction

Needs = Literal["nothing", "logps", "distribution"]
Companion = Literal["", "task", "general", "safety"]


@dataclass(frozen=True)
class Condition:
    """What stands before every prompt at test time, and the name of the column that holds its rows."""

    name: str
    prefix: str


PLAIN = Condition("plain", "")


class Objective(Protocol):
    """One way to learn from the same examples."""

    name: ClassVar[str]
    needs_pairs: ClassVar[bool]
    needs_reference: ClassVar[Needs]  # nothing, the reference's log-probs, or its whole distribution (for a KL)
    control_tokens: ClassVar[tuple[str, ...]]  # new embedding rows that are learned

    @property
    def direction(self) -> Direction:
        """Which way a KL points, where one is needed."""
        ...

    @property
    def companion(self) -> Companion:
        """What else is rendered beside each example: nothing, another task example, a general or a safety one."""
        ...

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """What it is measured under at test time; the first is what it would be used under."""
        ...

    def render(self, example: Example, chat: Chat, rng: np.random.Generator) -> Seq[Sequence]:
        """The token sequences of one example; each knows which of its tokens are measured, and which are targets."""
        ...

    def worst_case(self, example: Example, chat: Chat) -> Seq[Sequence]:
        """Every sequence that `render` or `baseline_sequences` can make of one example, whatever is drawn."""
        ...

    def baseline_sequences(self, example: Example, chat: Chat) -> Seq[Sequence]:
        """Sequences whose statistics enter the loss as a constant of the batch, without a gradient; mostly none."""
        ...

    def baseline(self, policy: TokenStats, reference: TokenStats) -> float:
        """This micro-batch's share of that constant; the shares of a batch are added."""
        ...

    def loss(self, policy: TokenStats, reference: TokenStats | None) -> Tensor:
        """A scalar, normalised by `policy.totals` so that micro-batches add up to the optimiser batch."""
        ...


class Plain(ABC):
    """What most objectives share: no pairs, no reference, no companion, no control tokens, plain prompts at test."""

    needs_pairs: ClassVar[bool] = False
    needs_reference: ClassVar[Needs] = "nothing"
    control_tokens: ClassVar[tuple[str, ...]] = ()

    @property
    def direction(self) -> Direction:
        return "reverse"

    @property
    def companion(self) -> Companion:
        return ""

    @property
    def conditions(self) -> tuple[Condition, ...]:
        return (PLAIN,)

    @abstractmethod
    def render(self, example: Example, chat: Chat, rng: np.random.Generator) -> Seq[Sequence]:
        """Each objective's own."""

    def worst_case(self, example: Example, chat: Chat) -> Seq[Sequence]:
        """Most objectives draw nothing: there is one rendering."""
        return [*self.render(example, chat, np.random.default_rng(0)), *self.baseline_sequences(example, chat)]

    def baseline_sequences(self, example: Example, chat: Chat) -> Seq[Sequence]:  # noqa: ARG002
        return ()

    def baseline(self, policy: TokenStats, reference: TokenStats) -> float:  # noqa: ARG002
        return 0.0


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


def companion_of(example: Example) -> Example:
    """The example's companion, which the trajectory has put there."""
    if example.companion is None:
        raise ValueError(f"example {example.id} came without its companion")
    return example.companion


def nll(policy: TokenStats) -> Tensor:
    """Mean negative log-likelihood per target token of the optimiser batch, nats."""
    return -(policy.logp_T * policy.weight_T).sum() / policy.totals.tokens


def nll_preferred(policy: TokenStats) -> Tensor:
    """The same over pairs: mean per target token of the batch's preferred answers, nats."""
    preferred_T = policy.sequence_T % 2 == 0
    return -(policy.logp_T * policy.weight_T)[preferred_T].sum() / policy.totals.preferred_tokens


def positive(kind: str, **settings: float) -> None:
    """Refuse zeros under which an objective learns nothing or divides by zero."""
    for name, value in settings.items():
        if value <= 0:
            raise ValueError(f"{kind}: {name} is {value}; a number above 0")
