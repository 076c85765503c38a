"""The attack protocol: a generator that yields conversations, receives replies, and returns the text to judge.

    def play(prompt):
        reply = yield [{"role": "user", "content": ...}]     # sent to the model
        return reply                                         # judged against the forbidden prompt

A conversation that ends with an assistant turn is continued: the reply is what follows that turn's text.

An attack that needs another model (a translator, an attacker) yields a `HelperRequest` and receives the text; requests
to one helper run as one batch.
"""

from __future__ import annotations

from collections.abc import Generator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from leeway.hashing import digest

Message = dict[str, str]
Conversation = list[Message]


class Helper(Protocol):
    """A model that an attack uses: a translator or an attacker."""

    @property
    def name(self) -> str: ...

    @property
    def hash(self) -> str:
        """Content hash of everything that shapes its output."""

    def help(self, queries: Seq[Any]) -> list[str | AttackFailed]:
        """Return one text or failure per query, in order."""


@dataclass(frozen=True)
class HelperRequest:
    """A query to a helper, of the type that the helper expects."""

    helper: Helper
    query: Any


Play = Generator[Conversation | HelperRequest, str, str]


class AttackFailed(Exception):
    """The answer is unscored with this reason; one that begins with "no answer: " is a helper's transport failure."""


class Attack(Protocol):
    """A way to send a forbidden prompt."""

    @property
    def name(self) -> str:
        """The name in every row."""

    @property
    def version(self) -> int:
        """Incremented with every change of the text."""

    @property
    def origin(self) -> str:
        """Where the attack was published."""

    @property
    def hash(self) -> str:
        """Content hash of everything that shapes what is sent."""

    def play(self, prompt: str) -> Play:
        """Send `prompt`. Raises AttackFailed if it cannot be sent or judged."""


@runtime_checkable
class DrawnAttack(Protocol):
    """An attack that sends another text in every draw: a function of the study's seed, the item and the draw."""

    def play_draw(self, prompt: str, seed: int, item: str, draw: int) -> Play: ...


@dataclass(frozen=True)
class Wrapper:
    """A one-turn attack: a fixed text around the prompt. `template` holds `{prompt}` exactly once."""

    name: str
    version: int
    origin: str
    template: str

    def __post_init__(self) -> None:
        if self.template.count("{prompt}") != 1:
            raise ValueError(f"attack {self.name}: its template must hold {{prompt}} exactly once")

    @property
    def hash(self) -> str:
        return digest(self.name, self.version, self.template)

    def wrap(self, prompt: str) -> str:
        return self.template.replace("{prompt}", prompt)

    def play(self, prompt: str) -> Play:
        return (yield [{"role": "user", "content": self.wrap(prompt)}])
