"""The judge protocol: score an answer to a forbidden prompt, without the attack's wrapper."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

from leeway.data.types import Outcome

Tick = Callable[[int], None]  # called with the number of answers just judged


@dataclass(frozen=True)
class Answer:
    """A judge's input: the forbidden prompt, never its wrapper, and the response."""

    prompt: str
    response: str


@dataclass(frozen=True)
class Verdict:
    """An outcome and its harmfulness in [0, 1], or the reason why the response is unscored."""

    outcome: Outcome | None
    score: float | None
    raw: str
    unscored_reason: str | None = None


class Judge(Protocol):
    """A scorer of answers to forbidden prompts."""

    @property
    def name(self) -> str: ...

    @property
    def hash(self) -> str:
        """Content hash of its rules or prompt."""
        ...

    @property
    def note(self) -> str:
        """A caveat for readers of its rates, in one sentence."""
        ...

    def judge(self, answers: Seq[Answer], tick: Tick) -> list[Verdict]:
        """Return one verdict per answer, in order. No response may raise."""
        ...
