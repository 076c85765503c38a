"""The shapes that data has once it is loaded, whatever file or hub it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
