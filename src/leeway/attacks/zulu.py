"""Zulu: the prompt goes out in a low-resource language, the answer is translated back before it is judged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from leeway.attacks.attack import Play
from leeway.hashing import digest


class Translator(Protocol):
    """Out and back; both raise AttackFailed where a text cannot be translated."""

    @property
    def name(self) -> str: ...

    @property
    def hash(self) -> str: ...

    def out(self, text: str) -> str: ...

    def back(self, text: str) -> str: ...


@dataclass(frozen=True)
class Zulu:
    """Translation out and back; a failed translation is unscored, never judged in the other language."""

    translator: Translator
    name: str = "zulu"
    version: int = 1
    origin: str = "low-resource translation, Yong et al. 2023, arXiv 2310.02446"

    @property
    def hash(self) -> str:
        return digest(self.name, self.version, self.translator.name, self.translator.hash)

    def play(self, prompt: str) -> Play:
        reply = yield [{"role": "user", "content": self.translator.out(prompt)}]
        return self.translator.back(reply)
