"""The backend protocol: whoever answers prompts. Two questions only: what would you say, and which of these?"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

Conversation = list[dict[str, str]]
NOT_FINITE = "the model's logits are not finite"  # a failure that asking again does not mend
OVERLONG = "exceed its context of"  # nor this one
Tick = Callable[[int], None]  # called with the number of requests just answered


@dataclass(frozen=True)
class Request:
    """A conversation to go on with for at most `max_new_tokens`: greedily, or drawn at a temperature.

    A drawn answer is a function of the prompt's ids, `temperature`, `sample` and `seed`: pure ancestral sampling, no
    top-k, no top-p. `sample` tells several answers to one prompt apart.
    """

    conversation: Conversation
    max_new_tokens: int
    temperature: float = 0.0
    sample: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"a temperature of {self.temperature}: 0 is greedy, above it answers are drawn")


@dataclass(frozen=True)
class Reply:
    """The text, how many tokens it took, and whether the limit cut it off; or why there is none (`failure`).

    A failure of transport or of the model's numbers is no answer: whatever was to be scored is unscored.
    """

    text: str
    new_tokens: int
    cut: bool
    failure: str | None = None


@dataclass(frozen=True)
class Choice:
    """Next-token probability of each option, summed over its spellings, as a share of the whole vocabulary."""

    mass: dict[str, float]
    failure: str | None = None


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8; a lone surrogate, one half of a character, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class Backend(Protocol):
    """Answers conversations under one checkpoint and one chat template."""

    @property
    def identity(self) -> str:
        """Who answers: a hash over the weights and adapter, or over an endpoint's address and model name."""
        ...

    @property
    def template_hash(self) -> str:
        """Identity of the chat template and of what stands before every prompt."""
        ...

    def complete(self, requests: Seq[Request], tick: Tick) -> list[Reply]:
        """One reply per request, in their order."""
        ...

    def choose(self, conversations: Seq[Conversation], options: Seq[str], tick: Tick) -> list[Choice]:
        """How likely each option is to come next, in the conversations' order."""
        ...
