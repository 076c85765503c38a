"""Zulu: translate the prompt into a low-resource language, and the answer back before it is judged.

A failed translation is unscored. Translators of real text are in `evals/attack_helpers.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from leeway.attacks.attack import Helper, HelperRequest, Play
from leeway.hashing import digest


@dataclass(frozen=True)
class Passage:
    """Zulu's query: a text to translate `out` into the other language or `back` from it."""

    direction: Literal["out", "back"]
    text: str


@dataclass(frozen=True)
class Zulu:
    """Translate with one helper, which takes `Passage`s. An empty answer is judged without translation."""

    translator: Helper
    name: str = "zulu"
    version: int = 1
    origin: str = "low-resource translation, Yong et al. 2023, arXiv 2310.02446"

    @property
    def hash(self) -> str:
        return digest(self.name, self.version, self.translator.name, self.translator.hash)

    def play(self, prompt: str) -> Play:
        sent = yield HelperRequest(self.translator, Passage("out", prompt))
        reply = yield [{"role": "user", "content": sent}]
        if not reply.strip():
            return reply
        text = yield HelperRequest(self.translator, Passage("back", reply))
        return text
