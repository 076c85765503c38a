"""The judge protocol: who scores an answer, always beside the forbidden prompt, never beside its wrapper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from leeway.data.items import Outcome


@dataclass(frozen=True)
class Verdict:
    """An outcome and its harmfulness in [0, 1], or neither and the reason why."""

    outcome: Outcome | None
    score: float | None
    raw: str
    unscored_reason: str | None = None


class Judge(Protocol):
    """Scores one answer to one forbidden prompt."""

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

    def judge(self, prompt: str, response: str) -> Verdict:
        """Never raises for what a model may say."""
        ...
