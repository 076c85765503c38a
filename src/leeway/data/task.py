"""Tasks of other packages: what is trained on, and the questions that tell whether it was learned."""

from __future__ import annotations

from typing import Protocol

from leeway.data.items import CapabilityItem, Example
from leeway.errors import LeewayError
from leeway.outside import loaded, points

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
    return sorted(points(GROUP, "task", OURS))


def load_task(name: str) -> Task:
    """By name; raises LeewayError where no installed package brings it, or what it brings is no task."""
    point = points(GROUP, "task", OURS).get(name)
    if point is None:
        raise LeewayError(f"there is no task {name!r}", fix=f"one of: {', '.join([*OURS, *task_names()])}")
    task: Task = loaded(point, "task", NEEDS)
    return task
