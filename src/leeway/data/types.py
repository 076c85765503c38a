"""The shapes that data has once it is loaded, whatever file or hub it came from.

Tasks of other packages: what is trained on, and the questions that tell whether it was learned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from leeway.errors import LeewayError
from leeway.plugins import entry_points_of, load_entry_point

Outcome = Literal["refused", "harmful", "deflected", "incoherent"]


@dataclass(frozen=True)
class Example:
    """One training example: a prompt, its preferred answer and, where a pair exists, a dispreferred one.

    `companion` is another example that an objective may ask for beside it: one of the task's own, a general prompt's or
    a safety example. It is no part of what is matched: the ledger counts it as processed, never as source.
    """

    id: str
    prompt: str
    preferred: str
    dispreferred: str | None = None
    companion: Example | None = None


@dataclass(frozen=True)
class CapabilityItem:
    """One question with a checkable answer; `id` is `<task>/<n>`. `options` are what a choice is made between."""

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
    """One harmless request, whatever it sounds like; `id` is `<source>/<n>` or `<source>/<kind>/<n>`."""

    id: str
    text: str


GROUP = "leeway.tasks"
OURS = ("organism", "gsm8k", "supergpqa-engineering", "legal", "cyber", "openended", "files")
NEEDS = ("name", "origin", "grader", "max_new_tokens", "train_examples", "held_out_items", "as_item", "grade")


class Task(Protocol):
    """Examples to train on and items to test on, none of them the same question."""

    name: str
    origin: str  # where its data come from, with a revision or a hash: the manifest shows it
    grader: str  # the name and version of the rule behind `grade`; another rule has another name
    max_new_tokens: int  # how long an answer may be, where the study does not say

    def train_examples(self) -> list[Example]:
        """In a fixed order, each with an id of its own, `<task>/<n>`."""
        ...

    def held_out_items(self) -> list[CapabilityItem]:
        """In a fixed order, each with an id of its own."""
        ...

    def as_item(self, example: Example) -> CapabilityItem:
        """A training example as a question, for studies that tune a learning rate or draw the base model's errors."""
        ...

    def grade(self, item: CapabilityItem, response: str) -> tuple[bool, str]:
        """(right, what was found in the answer); never raises for what a model may say."""
        ...


def task_names() -> list[str]:
    """Of the tasks that installed packages bring (`leeway.tasks` entry points)."""
    return sorted(entry_points_of(GROUP, "task", OURS))


def load_task(name: str) -> Task:
    """By name; raises LeewayError where no installed package brings it, or what it brings is no task."""
    point = entry_points_of(GROUP, "task", OURS).get(name)
    if point is None:
        raise LeewayError(f"there is no task {name!r}", fix=f"one of: {', '.join([*OURS, *task_names()])}")
    task: Task = load_entry_point(point, "task", NEEDS)
    return task
