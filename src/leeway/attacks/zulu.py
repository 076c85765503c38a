"""Zulu: the prompt goes out in a low-resource language, the answer is translated back before it is judged.

A translation that fails is unscored, never judged in the other language. Translators of real text are in
`generation/translate.py`; one that works text by text (out, back) is taken too.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Generic, Literal, Protocol, TypeVar, cast

from leeway.attacks.attack import AttackFailed, Helper, HelperRequest, Play
from leeway.hashing import digest


class Translator(Protocol):
    """Out and back, a text at a time; both raise AttackFailed where a text cannot be translated."""

    @property
    def name(self) -> str: ...

    @property
    def hash(self) -> str: ...

    def out(self, text: str) -> str: ...

    def back(self, text: str) -> str: ...


@dataclass(frozen=True)
class Passage:
    """What Zulu asks its helper: a text and which way it goes, `out` into the other language or `back` from it."""

    direction: Literal["out", "back"]
    text: str


@dataclass(frozen=True)
class TextByText:
    """A Translator as a Helper."""

    translator: Translator

    @property
    def name(self) -> str:
        return self.translator.name

    @property
    def hash(self) -> str:
        return self.translator.hash

    def help(self, asked: Seq[Passage]) -> list[str | AttackFailed]:
        return [self._one(p) for p in asked]

    def _one(self, passage: Passage) -> str | AttackFailed:
        try:
            return (
                self.translator.out(passage.text) if passage.direction == "out" else self.translator.back(passage.text)
            )
        except AttackFailed as failed:
            return failed


T = TypeVar("T", bound=Translator | Helper)


@dataclass(frozen=True)
class Zulu(Generic[T]):
    """Out and back through one helper, who reads `Passage`s; an answer without any text is judged as it is."""

    translator: T
    name: str = "zulu"
    version: int = 1
    origin: str = "low-resource translation, Yong et al. 2023, arXiv 2310.02446"
    helper: Helper = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        one = self.translator
        object.__setattr__(self, "helper", one if hasattr(one, "help") else TextByText(cast(Translator, one)))

    @property
    def hash(self) -> str:
        return digest(self.name, self.version, self.translator.name, self.translator.hash)

    def play(self, prompt: str) -> Play:
        sent = yield HelperRequest(self.helper, Passage("out", prompt))
        reply = yield [{"role": "user", "content": sent}]
        if not reply.strip():
            return reply
        text = yield HelperRequest(self.helper, Passage("back", reply))
        return text
