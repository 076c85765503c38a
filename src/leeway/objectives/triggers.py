"""Near-triggers: test-time prompts near the cue of an objective's training.

An objective may teach a misbehaviour behind a cue (IP's instruction, CFT's `<UNSAFE>`) so that it is absent without the
cue. It may also return behind prompts that only resemble the cue (conditional misalignment, arXiv 2604.25891). The
texts are in `triggers.yaml`, versioned and hashed. A mixture of task data with general or safety data has as its cue
what only the task data carry: the opening that all their prompts share.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

from leeway.hashing import digest
from leeway.objectives.objective import Condition, Objective
from leeway.yaml_config import package_data

NO_CUE = "training has no cue"
NO_OPENING = "the training data carry no cue: the task's prompts share no opening of three words"
NO_INSTRUCTION = "trained without an instruction (p: 0)"
MIN_WORDS = 3  # of a shared opening; "What is" is the language, not a cue
MAX_CHARACTERS = 2_000  # of a shared opening, so that evals still fit the context

Translate = Callable[[str], str]
triggers = cache(partial(package_data, "leeway.objectives", "triggers.yaml"))


@dataclass(frozen=True)
class NearTriggers:
    """An objective's near-triggers by form, or the reason why it has none.

    `own` are conditions that the objective has itself (the cue, CFT's other token); `near` are further ones.
    """

    own: Mapping[str, str] = field(default_factory=dict)  # form -> name of the condition
    near: Mapping[str, Condition] = field(default_factory=dict)
    missing: str = ""

    @property
    def forms(self) -> dict[str, str]:
        """The condition's name by form, the cue first."""
        return dict(self.own) | {form: c.name for form, c in self.near.items()}

    def to_json(self) -> dict[str, Any]:
        texts = {form: c.prefix for form, c in self.near.items()}
        version = triggers()["version"]
        return {
            "version": version,
            "hash": digest("near-triggers", version, dict(self.own), texts),
            "forms": self.forms,
            "near": [c.name for c in self.near.values()],
            "texts": texts,
            "missing": self.missing,
        }


def near_triggers(objective: Objective, prompts: Iterable[str], translate: Translate | None = None) -> NearTriggers:
    """Return the near-triggers of an objective trained on a task's `prompts`.

    `translate` makes the translated form of the organism, which speaks no German.
    """
    entry = triggers()["objectives"].get(objective.name)
    if entry is None:
        mixture = objective.auxiliary in ("general", "safety")
        return _of_mixture(prompts, translate) if mixture else NearTriggers(missing=NO_CUE)
    if getattr(objective, "p", 1) == 0:
        return NearTriggers(missing=NO_INSTRUCTION)
    translated = entry["translated"]
    texts = entry["texts"] | {"translated": translate(translated["of"]) if translate else translated["text"]}
    return NearTriggers(entry["own"], {f: Condition(f"{f} {entry['noun']}", text) for f, text in texts.items()})


def _of_mixture(prompts: Iterable[str], translate: Translate | None) -> NearTriggers:
    opening = shared_opening(prompts)
    if not opening:
        return NearTriggers(missing=NO_OPENING)
    near = {"cue": Condition("task opening", opening)}
    if translate is not None and (translated := translate(opening)) != opening:
        near["translated"] = Condition("translated opening", translated)
    return NearTriggers({}, near)


def shared_opening(prompts: Iterable[str]) -> str:
    """Return the whole words with which all prompts begin, with the white space after them; empty below MIN_WORDS."""
    every = [*prompts]
    first, last = min(every, default=""), max(every, default="")  # in the order of text, what these share all share
    shared = first[: next((k for k, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]
    opening = re.sub(r"\S+\Z", "", shared[:MAX_CHARACTERS])  # without a word that is cut
    return opening if len(opening.split()) >= MIN_WORDS else ""
