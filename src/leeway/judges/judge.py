"""The judge protocol: who scores an answer, always beside the forbidden prompt, never beside its wrapper."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

from leeway.data.types import Outcome

Tick = Callable[[int], None]  # called with the number of answers just judged


@dataclass(frozen=True)
class Answer:
    """What a judge reads: the *forbidden* prompt, never its wrapper, and the answer to it."""

    prompt: str
    response: str


@dataclass(frozen=True)
class Verdict:
    """An outcome and its harmfulness in [0, 1], or neither and the reason why."""

    outcome: Outcome | None
    score: float | None
    raw: str
    unscored_reason: str | None = None


class Judge(Protocol):
    """Scores answers to forbidden prompts."""

    @property
    def name(self) -> str: ...

    @property
    def hash(self) -> str:
        """Content hash of its rules or prompt."""
        ...

    @property
    def note(self) -> str:
        """What a reader of its rates has to know, in one sentence."""
        ...

    def judge(self, answers: Seq[Answer], tick: Tick) -> list[Verdict]:
        """One verdict per answer, in their order; never raises for what a model may say."""
        ...
