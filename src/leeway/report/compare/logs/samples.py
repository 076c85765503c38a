"""What a reader returns for the logs of another evaluation tool: scored answers by task and checkpoint."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leeway.hashing import digest

ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # of a function that a log holds as text: another one in every process
SUBTASKS, ITEMS = "subtasks", "items"  # what counts equally in the score of a group of tasks
SHOWN = 120  # characters of a setting or an error in a message


@dataclass(frozen=True)
class ScoredAnswer:
    """One answer to one item, with the number of every metric or the reason for having none."""

    item: str  # its id; unique inside a part of the task
    repeat: int  # epoch, from 0
    content: Mapping[str, str]  # digest of what must be equal in every log, by name: input, choices, target
    part: str = ""  # subtask of a group of tasks
    prompt: str = ""  # digest of the rendered prompt; empty if the log does not hold it
    fields: Mapping[str, Any] = field(default_factory=dict)  # metadata of the item
    scores: Mapping[str, float] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)  # of the metrics without a number

    @property
    def key(self) -> tuple[str, str]:
        """What identifies the item inside its task."""
        return self.part, self.item


@dataclass(frozen=True)
class TaskLog:
    """One task of one checkpoint."""

    task: str
    path: Path
    model: str
    settings: Mapping[str, str]  # must be equal in all logs; the keys of one scorer are compared if both logs have it
    facts: Mapping[str, str]  # may differ: date, versions, seeds
    answers: Seq[ScoredAnswer]
    unusable: Mapping[str, str] = field(default_factory=dict)  # metrics without one number per answer, and why
    incomplete: str = ""  # how the run ended, if it did not complete
    run: str = ""  # identifies a run and its retries
    group: str = ""  # the group of tasks that this one belongs to
    weights: Mapping[str, str] = field(default_factory=dict)  # by metric, what counts equally in a group, if known

    @property
    def metrics(self) -> list[str]:
        """The metrics with a number, in the log's order."""
        return list(dict.fromkeys(m for a in self.answers for m in (*a.scores, *a.reasons) if m not in self.unusable))


@dataclass(frozen=True)
class Checkpoint:
    """The logs of one checkpoint; the first one of a comparison is the base."""

    name: str
    tool: str  # Inspect, lm-eval
    tasks: Mapping[str, TaskLog]


def flatten(value: Any, at: str) -> dict[str, str]:
    """Return nested settings as `at.key` → text, without those that are None or empty."""
    if isinstance(value, Mapping) and value:
        return {k: v for key, inner in value.items() for k, v in flatten(inner, f"{at}.{key}").items()}
    if value is None or value in ({}, [], ""):
        return {}
    return {at: plain(value)}


def plain(value: Any) -> str:
    """Return text as it is and other values as JSON, without memory addresses."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return ADDRESS.sub("", text)


def content_digest(value: Any) -> str:
    """Return a digest of any value that a log holds; None has none."""
    return "" if value is None else digest(json.loads(json.dumps(value, default=str)))


def shorten(text: str, size: int = SHOWN) -> str:
    """Return the first line of a text, with an ellipsis where something is left out."""
    line = (text.strip().splitlines() or [""])[0]
    return line if line == text.strip() and len(line) <= size else f"{line[:size]}…"
