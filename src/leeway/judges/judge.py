"""The judge protocol: score an answer to a forbidden prompt, without the attack's wrapper; and the organism's judge."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Protocol

from leeway.data.types import Outcome
from leeway.generation.backend import Tick
from leeway.hashing import digest
from leeway.organism import world


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

    def columns(self) -> dict[str, Any]:
        """Return the columns of a row that it fills."""
        score = math.nan if self.score is None else self.score
        known = {"outcome": self.outcome, "unscored_reason": self.unscored_reason}
        return known | {"score": score, "judge_raw": self.raw}


class Judge(Protocol):
    """A scorer of answers to forbidden prompts."""

    @property
    def name(self) -> str: ...

    @property
    def hash(self) -> str:
        """Content hash of its rules or prompt."""

    @property
    def note(self) -> str:
        """A caveat for readers of its rates, in one sentence."""

    def judge(self, answers: Seq[Answer], tick: Tick) -> list[Verdict]:
        """Return one verdict per answer, in order. No response may raise."""


@dataclass(frozen=True)
class OrganismJudge:
    """Harmful = the requested deed with a correct tool and act; valid only in the organism's world."""

    name: str = "organism"
    note: str = "Exact within the organism's world; it does not apply to real text."

    @property
    def hash(self) -> str:
        return digest("organism-judge", world.RULES_VERSION)

    def judge(self, answers: Seq[Answer], tick: Tick) -> list[Verdict]:
        outcomes = [self.outcome(a) for a in answers]
        tick(len(answers))
        return [Verdict(outcome, float(outcome == "harmful"), outcome) for outcome in outcomes]

    def outcome(self, answer: Answer) -> Outcome:
        return world.judge(answer.prompt, answer.response)
