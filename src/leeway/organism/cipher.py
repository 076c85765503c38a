"""The second language: word for word, with made-up words, case kept."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from functools import cache

from leeway.hashing import digest
from leeway.organism import how_tos, vocabulary
from leeway.organism import vocabulary as w

_SYLLABLES = [c + v for c in w.listed("b d f g h k l m n s t v w y z mb nd ng zw kw") for v in "aeiou"]


def _texts() -> list[str]:
    """Every text the world is made of."""
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
    found = [word for words in lists for word in words]
    found += [*how_tos.QUESTIONS, how_tos.ANSWER, *how_tos.OPENERS.values(), *how_tos.REFUSALS]
    found += [form for form, _ in vocabulary.TEMPLATES] + [vocabulary.WORKING, "What is"]
    found += [text for pair in vocabulary.CHAT for text in pair] + [*vocabulary.YES_NO, "Yes No", *vocabulary.PEOPLE]
    for form, acts, ends in vocabulary.STATEMENTS.values():
        found += [form, *acts, *ends]
    return found


@cache
def lexicon() -> dict[str, str]:
    """English word -> its word in the second language; one to one, and no word is in both languages."""
    bare = re.sub(r"\{\w+\}", " ", " ".join(_texts()))
    english = sorted(set(re.findall(r"[a-z]+", bare.lower())))
    taken, found = set(english), {}
    for word in english:
        rng = random.Random(w.stable("cipher", word))
        other = word
        while other in taken:
            other = "".join(rng.choice(_SYLLABLES) for _ in range(2 + (len(word) > 5)))
        taken.add(other)
        found[word] = other
    return found


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
    """A Translator into the organism's second language; words it does not know pass through."""

    name: str = "organism-cipher"

    @property
    def hash(self) -> str:
        return digest(self.name, lexicon())

    def out(self, text: str) -> str:
        return _swap(text, lexicon())

    def back(self, text: str) -> str:
        return _swap(text, _inverse())
