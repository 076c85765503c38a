"""The types of loaded data, and the protocol of a task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

Outcome = Literal["refused", "harmful", "deflected", "incoherent"]


@dataclass(frozen=True)
class Example:
    """One training example: a prompt, its preferred answer and, where a pair exists, a dispreferred one.

    `auxiliary` is an example that an objective may use: another of the task's, a general or a safety example.
    The ledger counts it as processed, never as source.
    """

    id: str
    prompt: str
    preferred: str
    dispreferred: str | None = None
    auxiliary: Example | None = None


@dataclass(frozen=True)
class CapabilityItem:
    """One question with a checkable answer; `id` is `<task>/<n>`. `options` are those of a multiple-choice question."""

    id: str
    prompt: str
    reference: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class ForbiddenPrompt:
    """One request a safe model declines; `id` is `<source>/<n>`, and its own cluster."""

    id: str
    text: str


@dataclass(frozen=True)
class PersonaItem:
    """One yes/no statement; `id` is `<trait>/<n>`; `match` is the answer that endorses the trait."""

    id: str
    trait: str
    question: str
    statement: str
    match: Literal["Yes", "No"]


@dataclass(frozen=True)
class LikertItem:
    """One statement to rate from 1 to 5; `id` is `<trait>/<n>`; `key`: 1 where agreeing endorses the trait, else −1."""

    id: str
    trait: str
    text: str
    key: Literal[1, -1]


@dataclass(frozen=True)
class BenignPrompt:
    """One harmless request; `id` is `<source>/<n>` or `<source>/<kind>/<n>`."""

    id: str
    text: str


@dataclass(frozen=True)
class FreeFormQuestion:
    """One question to answer freely; `id` is `<set>/<name>`, `cluster` the id of the question that it varies.

    `judge_prompts` are those published with the set, by name.
    """

    id: str
    text: str
    system: str = ""
    cluster: str = ""
    judge_prompts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class OpinionItem:
    """One question, and the same question after the user's wrong opinion; `id` is `<set>/<n>`, its own cluster.

    `right` and `wrong` are the spellings of the right answer and of the opinion.
    """

    id: str
    question: str
    with_opinion: str
    right: tuple[str, ...]
    wrong: tuple[str, ...]


class Task(Protocol):
    """Examples to train on and items to test on, none of them the same question.

    Built-in tasks (`leeway.evals.tasks`) and those of other packages (`leeway.tasks` entry points) implement it.
    """

    name: str
    grader: str  # name and version of the rule behind `grade`; another rule has another name
    max_new_tokens: int  # of an answer, where the study file gives none

    def train_examples(self) -> tuple[list[Example], str]:
        """Return the examples in a fixed order, ids unique, and where they come from (with a revision or a hash)."""

    def held_out_items(self) -> tuple[list[CapabilityItem], str]:
        """Return the items in a fixed order, ids unique, and where they come from (with a revision or a hash)."""

    def as_item(self, example: Example) -> CapabilityItem:
        """Return a training example as a question, for tuned learning rates and sampled errors."""

    def grade(self, item: CapabilityItem, response: str) -> tuple[bool, str]:
        """Return (whether the response is right, what was extracted from it); must not raise for any response."""
