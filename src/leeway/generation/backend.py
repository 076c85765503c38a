"""The backend protocol: whoever answers prompts. Two questions only: what would you say, and which of these?"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

Conversation = list[dict[str, str]]
Tick = Callable[[int], None]  # called with the number of requests just answered


@dataclass(frozen=True)
class Request:
    """A conversation to go on with, greedily, for at most `max_new_tokens`."""

    conversation: Conversation
    max_new_tokens: int


@dataclass(frozen=True)
class Reply:
    """The text, how many tokens it took, and whether the limit cut it off."""

    text: str
    new_tokens: int
    cut: bool


@dataclass(frozen=True)
class Choice:
    """Next-token probability of each option, summed over its spellings, as a share of the whole vocabulary."""

    mass: dict[str, float]


class Backend(Protocol):
    """Answers conversations under one checkpoint and one chat template."""

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
