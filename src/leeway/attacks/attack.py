"""The attack protocol: a generator that yields what to send, receives the reply, and returns the text to judge.

A one-turn wrapper, a translation out and back, a multi-turn or a tool-using attack are the same kind of thing:

    def play(prompt):
        reply = yield [{"role": "user", "content": ...}]     # what the model is asked
        return reply                                         # what the judge reads, beside the *forbidden* prompt

Where it needs somebody else's words on the way (a translator's, an attacker model's), it yields an `Aside` to that
helper and receives the text; all asides that wait for one helper are asked at once.
"""

from __future__ import annotations

from collections.abc import Generator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any, Protocol

from leeway.hashing import digest

Message = dict[str, str]
Conversation = list[Message]


class Helper(Protocol):
    """Somebody an attack asks on the way: a translator, an attacker model."""

    @property
    def name(self) -> str: ...

    @property
    def hash(self) -> str:
        """Content hash of all that shapes its words."""
        ...

    def help(self, asked: Seq[Any]) -> list[str | AttackFailed]:
        """One text for each thing asked, in their order, or why there is none."""
        ...


@dataclass(frozen=True)
class HelperRequest:
    """A question to a helper, in whatever shape that helper reads."""

    helper: Helper
    asked: Any


Play = Generator[Conversation | HelperRequest, str, str]


class AttackFailed(Exception):
    """The attack itself failed (a translation, say): the answer is unscored with this reason, never safe.

    A reason that begins with "no answer: " is a failure of transport (a helper's endpoint): a rerun asks again.
    """


class Attack(Protocol):
    """A way to ask a forbidden prompt."""

    @property
    def name(self) -> str:
        """The name on every row."""
        ...

    @property
    def version(self) -> int:
        """Raised whenever the text changes."""
        ...

    @property
    def origin(self) -> str:
        """Where the idea was published."""
        ...

    @property
    def hash(self) -> str:
        """Content hash of everything that shapes what is sent."""
        ...

    def play(self, prompt: str) -> Play:
        """Ask `prompt` this way; raises AttackFailed where it cannot be asked or judged."""
        ...


@dataclass(frozen=True)
class Wrapper:
    """A one-turn attack: one fixed text around the prompt.

    `template` holds `{prompt}` exactly once.
    """

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
        reply = yield [{"role": "user", "content": self.wrap(prompt)}]
        return reply
