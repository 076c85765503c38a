"""Zulu: translate the prompt into a low-resource language, and the answer back before it is judged.

A failed translation is unscored. Translators of real text are in `evals/translators.py`.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Generic, Literal, Protocol, TypeVar, cast

from leeway.attacks.attack import AttackFailed, Helper, HelperRequest, Play
from leeway.hashing import digest


class Translator(Protocol):
    """Translate one text at a time. Both methods raise AttackFailed if they cannot."""

    @property
    def name(self) -> str: ...

    @property
    def hash(self) -> str: ...

    def out(self, text: str) -> str: ...

    def back(self, text: str) -> str: ...


@dataclass(frozen=True)
class Passage:
    """Zulu's query: a text to translate `out` into the other language or `back` from it."""

    direction: Literal["out", "back"]
    text: str


@dataclass(frozen=True)
class TranslatorHelper:
    """Adapt a Translator to the Helper protocol."""

    translator: Translator

    @property
    def name(self) -> str:
        return self.translator.name

    @property
    def hash(self) -> str:
        return self.translator.hash

    def help(self, queries: Seq[Passage]) -> list[str | AttackFailed]:
        return [self._translate(p) for p in queries]

    def _translate(self, passage: Passage) -> str | AttackFailed:
        try:
            translate = self.translator.out if passage.direction == "out" else self.translator.back
            return translate(passage.text)
        except AttackFailed as failed:
            return failed


T = TypeVar("T", bound=Translator | Helper)


@dataclass(frozen=True)
class Zulu(Generic[T]):
    """Translate with one helper, which takes `Passage`s. An empty answer is judged without translation."""

    translator: T
    name: str = "zulu"
    version: int = 1
    origin: str = "low-resource translation, Yong et al. 2023, arXiv 2310.02446"
    helper: Helper = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        given = self.translator
        helper = given if hasattr(given, "help") else TranslatorHelper(cast(Translator, given))
        object.__setattr__(self, "helper", helper)

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
