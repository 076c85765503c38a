"""The backend protocol: complete conversations, or give the probabilities of options as the next token."""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

Conversation = list[dict[str, str]]
NOT_FINITE = "the model's logits are not finite"
OVERLONG = "exceed its context of"
CUT_THINKING = "the limit of new tokens cut it off inside its thinking"
ENDED_THINKING = "it ended inside its thinking"
PERMANENT = (NOT_FINITE, OVERLONG, CUT_THINKING, ENDED_THINKING)  # failures that a retry repeats
Tick = Callable[[int], None]  # called with the number of requests or answers just completed


@dataclass(frozen=True)
class Request:
    """A conversation to answer by at most `max_new_tokens`: greedy at temperature 0, else sampled.

    A sampled reply is a function of the prompt's ids, `temperature`, `sample` and `seed`: ancestral sampling without
    top-k or top-p. `sample` indexes several replies to one prompt. A conversation that ends with an assistant turn is
    continued: the reply is what follows that turn's text.
    """

    conversation: Conversation
    max_new_tokens: int
    temperature: float = 0.0
    sample: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature {self.temperature}: it must be finite and not negative")


@dataclass(frozen=True)
class Reply:
    """The text, its length in tokens, and whether the limit cut it off; or why there is none: the item is unscored.

    `reasoning` is what a reasoning model wrote before its final answer, the text (`generation.thinking`).
    """

    text: str
    new_tokens: int
    cut: bool
    failure: str | None = None
    reasoning: str = ""


@dataclass(frozen=True)
class Choice:
    """Next-token probability of each option, summed over its spellings."""

    mass: dict[str, float]
    failure: str | None = None


def is_prefilled(conversation: Conversation) -> bool:
    """Whether the conversation ends with the beginning of the answer, to be continued."""
    return conversation[-1]["role"] == "assistant"


def context_fault(prompt_tokens: int, new_tokens: int, context: int) -> str | None:
    """Return the failure of a request whose prompt and whole reply exceed the context, or None."""
    if prompt_tokens + new_tokens <= context:
        return None
    return f"a prompt of {prompt_tokens} tokens and {new_tokens} new ones {OVERLONG} {context}"


def spellings(option: str) -> set[str]:
    """Return the single tokens that count for an option: its case variants, with and without a leading space.

    A space is written as in text, or as sentencepiece and byte-level tokenizers write it.
    """
    return {space + form for form in (option, option.lower(), option.upper()) for space in ("", *" ▁Ġ")}


class Backend(Protocol):
    """One checkpoint with one chat template."""

    @property
    def identity(self) -> str:
        """Hash of the weights and adapter, or of an endpoint's address and model name."""

    @property
    def template_hash(self) -> str:
        """Hash of the chat template and the prompt prefix."""

    def complete(self, requests: Seq[Request], tick: Tick) -> list[Reply]:
        """Return one reply per request, in order."""

    def choose(self, conversations: Seq[Conversation], options: Seq[str], tick: Tick) -> list[Choice]:
        """Return each option's next-token probability per conversation, in order."""
