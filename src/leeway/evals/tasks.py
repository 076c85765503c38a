"""The built-in tasks, and the lookup of any task by name.

A built-in task implements `leeway.data.types.Task`, as tasks of other packages do: its examples and items come from
`leeway.data` (or the organism's world), its grading rule from `leeway.evals.capability`. To add one, write its class
and add it to `TASKS`.
"""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from leeway.data import formats, gsm8k, supergpqa
from leeway.data.types import CapabilityItem, Example, Task
from leeway.errors import LeewayError
from leeway.evals.capability import flexible, grade_exact, grade_gsm8k, grade_supergpqa, strict
from leeway.io import expand
from leeway.organism import world
from leeway.plugins import entry_points_of, load_entry_point

GROUP = "leeway.tasks"  # entry points of tasks outside this package
NEEDS = ("name", "grader", "max_new_tokens", "train_examples", "held_out_items", "as_item", "grade")
EXACT = "exact"  # the grader of files: only a number shows whether an answer is wrong or rephrased
ORGANISM_EXAMPLES = 10_000
ORGANISM_ITEMS = 200


@dataclass(frozen=True)
class TaskSettings:
    """What a study file may set for a built-in task; each task reads what it declares."""

    revision: str | None = None
    train_file: str | None = None
    test_file: str | None = None
    unsupported: formats.Unsupported = "error"
    source: str | None = None  # of open-ended items, instead of the test file
    limit: int | None = None  # test items, where a task generates them
    shots: int = 0
    extraction: str | None = None
    trained: bool = True  # the study trains on this task, so its items must be held out


class BuiltInTask:
    """What a task declares about its settings. A task of another package has the defaults below."""

    name = ""
    max_new_tokens = 256
    keys: tuple[str, ...] = ()  # of the study's `task` mapping that this task reads: revision, files
    family = ""  # of grading rules, in the grader's name
    extractions: tuple[str, ...] = ()  # rules that read an answer; the first is the default
    shot_counts: Collection[int] = (0,)
    graded_by_model = False
    trainable = True

    def __init__(self, settings: TaskSettings) -> None:
        self.settings = settings
        self.rule = settings.extraction or next(iter(self.extractions), "")
        self.grader = f"{self.family}-{self.rule}" if self.rule else self.family

    def few_shot(self, items: Seq[CapabilityItem]) -> tuple[tuple[str, str], ...]:  # noqa: ARG002
        """Return question and answer of each shot that precedes every item as turns of the conversation."""
        return ()


class Organism(BuiltInTask):
    name = family = "organism"
    max_new_tokens = 64

    def train_examples(self) -> tuple[list[Example], str]:
        return world.train_examples(ORGANISM_EXAMPLES, seed=0), "the organism's world, seed 0"

    def held_out_items(self) -> tuple[list[CapabilityItem], str]:
        return world.capability_items(self.settings.limit or ORGANISM_ITEMS), "the organism's world, held out"

    def as_item(self, example: Example) -> CapabilityItem:
        return world.as_item(example)

    def grade(self, item: CapabilityItem, response: str) -> tuple[bool, str]:
        return world.capability_score(item, response), ""


class GSM8K(BuiltInTask):
    name = family = "gsm8k"
    max_new_tokens = 400
    keys = ("revision",)
    extractions = ("flexible", "strict")
    shot_counts: Collection[int] = range(2**31)

    def train_examples(self) -> tuple[list[Example], str]:
        return gsm8k.train_examples(self.settings.revision)

    def held_out_items(self) -> tuple[list[CapabilityItem], str]:
        return gsm8k.held_out_items(self.settings.revision)

    def as_item(self, example: Example) -> CapabilityItem:
        value = strict(example.preferred)
        if value is None:
            raise LeewayError(f"example {example.id} has no number after ####", fix="correct or remove that record")
        return CapabilityItem(example.id, example.prompt, f"{value:f}")

    def grade(self, item: CapabilityItem, response: str) -> tuple[bool, str]:
        return grade_gsm8k(item.reference, response, self.rule)

    def few_shot(self, items: Seq[CapabilityItem]) -> tuple[tuple[str, str], ...]:
        if not self.settings.shots:
            return ()
        exclude = {i.prompt for i in items}
        return tuple(gsm8k.shots(self.settings.shots, exclude=exclude, revision=self.settings.revision))


class GSM8KSteps(GSM8K):
    """The single calculations of GSM8K's test solutions, which no study trains on as such."""

    name = "gsm8k-steps"
    max_new_tokens = 32
    shot_counts = (0,)
    trainable = False

    def held_out_items(self) -> tuple[list[CapabilityItem], str]:
        return gsm8k.step_items(self.settings.revision)


class SuperGPQAEngineering(BuiltInTask):
    """One discipline of SuperGPQA; its five-shot prompt holds the worked examples."""

    name = "supergpqa-engineering"
    max_new_tokens = 1024
    keys = ("revision",)
    extractions = ("fixed", "parity")
    shot_counts = (0, 5)
    family = "supergpqa"
    discipline = "Engineering"

    def train_examples(self) -> tuple[list[Example], str]:
        return supergpqa.train_examples(self.discipline, revision=self.settings.revision)

    def held_out_items(self) -> tuple[list[CapabilityItem], str]:
        share: Literal["test", "all"] = "test" if self.settings.trained else "all"
        shots: Literal[0, 5] = 5 if self.settings.shots else 0
        return supergpqa.held_out_items(self.discipline, shots=shots, share=share, revision=self.settings.revision)

    def as_item(self, example: Example) -> CapabilityItem:
        return self._trained[example.id]

    @cached_property
    def _trained(self) -> dict[str, CapabilityItem]:
        items, _ = supergpqa.held_out_items(self.discipline, share="train", revision=self.settings.revision)
        return {i.id: i for i in items}

    def grade(self, item: CapabilityItem, response: str) -> tuple[bool, str]:
        return grade_supergpqa(item, response, self.rule, five_shot=self.settings.shots == 5)


class Files(BuiltInTask):
    """Training and test records in the user's own files."""

    name = "files"
    family = EXACT
    keys = ("files",)

    def train_examples(self) -> tuple[list[Example], str]:
        assert self.settings.train_file is not None
        return formats.train_examples(expand(self.settings.train_file), unsupported=self.settings.unsupported)

    def held_out_items(self) -> tuple[list[CapabilityItem], str]:
        assert self.settings.test_file is not None
        return formats.held_out_items(expand(self.settings.test_file))

    def as_item(self, example: Example) -> CapabilityItem:
        """The number that a preferred answer ends on is the reference, or the whole answer where it ends on none."""
        value = flexible(example.preferred)
        return CapabilityItem(example.id, example.prompt, example.preferred if value is None else f"{value:f}")

    def grade(self, item: CapabilityItem, response: str) -> tuple[bool, str]:
        return grade_exact(item.reference, response)


class Legal(Files):
    """Open-ended questions in the user's own files, answers graded by a model against references."""

    name = "legal"
    max_new_tokens = 512
    graded_by_model = True

    def held_out_items(self) -> tuple[list[CapabilityItem], str]:
        return formats.open_ended_items(self.name, self.settings.source or self.settings.test_file or "")

    def as_item(self, example: Example) -> CapabilityItem:
        return CapabilityItem(example.id, example.prompt, example.preferred)


class Cyber(Legal):
    name = "cyber"


class OpenEnded(Legal):
    """Open-ended questions of a named source, which no study trains on."""

    name = "openended"
    trainable = False


TASKS: dict[str, type[Organism | GSM8K | SuperGPQAEngineering | Files]] = {
    t.name: t for t in (Organism, GSM8K, GSM8KSteps, SuperGPQAEngineering, Legal, Cyber, OpenEnded, Files)
}


def task_names(*, trainable: bool = False) -> list[str]:
    """Return the names of built-in tasks and of those that installed packages provide."""
    built_in = [name for name, task in TASKS.items() if task.trainable or not trainable]
    return [*built_in, *sorted(entry_points_of(GROUP, "task", TASKS))]


def declared(name: str) -> type[BuiltInTask]:
    """Return the class that declares which settings a task reads."""
    return TASKS.get(name, BuiltInTask)


def load_task(name: str, settings: TaskSettings | None = None) -> Task:
    """Return a task by name; `settings` are for the built-in ones. Raise LeewayError for an unknown or invalid task."""
    if name in TASKS:
        return TASKS[name](settings or TaskSettings())
    point = entry_points_of(GROUP, "task", TASKS).get(name)
    if point is None:
        raise LeewayError(f"unknown task {name!r}", fix=f"one of: {', '.join(task_names())}")
    task: Task = load_entry_point(point, "task", NEEDS)
    return task
