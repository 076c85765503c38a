"""The items of the learning check: examples of the task that no trajectory trains on, and prompts off the task."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from leeway.data.chat import Chat
from leeway.data.safety_prompts import subset
from leeway.data.stream import Schedule
from leeway.data.types import Example
from leeway.organism import world
from leeway.study.spec import Learning, Spec
from leeway.training.learning import LearningItems
from leeway.yaml_config import package_data

MIN_ITEMS = 16
WORLD_SEED = 1  # another one than that of the organism's auxiliary examples


def question(example: Example) -> str:
    """Return a prompt's words, so that a repeated question is not both trained on and held out."""
    return " ".join(example.prompt.casefold().split())


def learning_items(
    spec: Spec, examples: Sequence[Example], schedules: Iterable[Schedule], chat: Chat, room: int
) -> LearningItems:
    """Return the items of the learning check.

    The task's are drawn at random from the `examples` whose question no step of `schedules` trains on; so the check
    changes no training data. `room`: the tokens that a general prompt and its answer may take.
    """
    settings = spec.controls.learning
    if not isinstance(settings, Learning):
        return LearningItems(missing="switched off (controls.learning: false)")
    if spec.processes > 1 and spec.evals.backend.vllm is not None:
        return LearningItems(missing="training shards the model and vLLM answers: no process holds it whole")
    distinct = {id(s): s for s in schedules}.values()  # objectives share theirs
    seen = {question(e) for e in {id(i.example): i.example for s in distinct for t in s.steps for i in t}.values()}
    unseen: dict[str, Example] = {}
    for e in examples:
        if (asked := question(e)) not in seen:
            unseen.setdefault(asked, e)
    if len(unseen) < MIN_ITEMS:
        few = f"{len(unseen)} of {len(examples):,} examples are not trained on"
        return LearningItems(missing=f"{few}, and {MIN_ITEMS} are needed")
    task = subset(list(unseen.values()), settings.items, "learning")
    fits = [e for e in _general(spec, settings.general) if len(chat.sequence(e.prompt, e.preferred).ids) <= room]
    return LearningItems(tuple(task), tuple(fits))


def _general(spec: Spec, n: int) -> list[Example]:
    """Return answered prompts off the task: the organism's small talk and how-tos, or everyday questions."""
    if spec.model == "organism":
        return world.general_examples(n, WORLD_SEED)
    pairs = package_data("leeway.data", "general.yaml")["answers"]
    return subset([Example(f"general/{k}", p, a) for k, (p, a) in enumerate(pairs)], n, "general")
