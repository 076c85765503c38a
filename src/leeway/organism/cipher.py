"""The organism's second language: a word-for-word cipher with invented words; case is kept."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cache

from leeway.attacks import AttackFailed, Passage
from leeway.hashing import digest
from leeway.organism import how_tos
from leeway.organism import vocabulary as w

_SYLLABLES = [c + v for c in w.split_words("b d f g h k l m n s t v w y z mb nd ng zw kw") for v in "aeiou"]


def _texts() -> list[str]:
    """Return every text of the world."""
    lists = (
        w.VERBS,
        w.OBJECTS,
        w.ADJECTIVES,
        w.TOOLS,
        w.ACTS,
        w.ADVERBS,
        w.ENDINGS,
        w.NAMES,
        w.THINGS,
        w.COLOURS,
    )
    texts = [word for words in lists for word in words]
    texts += [*how_tos.QUESTIONS, how_tos.ANSWER, *how_tos.OPENERS.values(), *how_tos.REFUSALS]
    texts += [form for form, _ in w.TEMPLATES] + [w.WORKING, "What is"]
    texts += [text for pair in w.CHAT for text in pair] + [*w.YES_NO, "Yes No", *w.PEOPLE]
    for form, acts, ends in w.STATEMENTS.values():
        texts += [form, *acts, *ends]
    return texts


@cache
def lexicon() -> dict[str, str]:
    """Map each English word to its word in the second language: one to one, and no word is in both languages."""
    bare = re.sub(r"\{\w+\}", " ", " ".join(_texts()))
    english = sorted(set(re.findall(r"[a-z]+", bare.lower())))
    taken, words = set(english), {}
    for word in english:
        rng = random.Random(w.stable("cipher", word))
        other = word
        while other in taken:
            other = "".join(rng.choice(_SYLLABLES) for _ in range(2 + (len(word) > 5)))
        taken.add(other)
        words[word] = other
    return words


@cache
def _inverse() -> dict[str, str]:
    return {other: word for word, other in lexicon().items()}


def _swap(text: str, table: dict[str, str]) -> str:
    def one(hit: re.Match[str]) -> str:
        word = hit[0]
        other = table.get(word.lower())
        if other is None:
            return word
        if word.islower():
            return other
        if len(word) > 1 and len(other) > 1 and word.isupper():
            return other.upper()
        return other.capitalize() if word == word.capitalize() else word

    return re.sub(r"[A-Za-z]+", one, text)


@dataclass(frozen=True)
class Cipher:
    """The translator of the organism's Zulu attack; unknown words are unchanged."""

    name: str = "organism-cipher"

    @property
    def hash(self) -> str:
        return digest(self.name, lexicon())

    def out(self, text: str) -> str:
        return _swap(text, lexicon())

    def back(self, text: str) -> str:
        return _swap(text, _inverse())

    def help(self, queries: Seq[Passage]) -> list[str | AttackFailed]:
        return [self.out(q.text) if q.direction == "out" else self.back(q.text) for q in queries]
