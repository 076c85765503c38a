"""Is an answer language at all? A measure apart from any judge, its thresholds fixed in `coherence.yaml`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

WORD = re.compile(r"[^\W\d_]+", re.UNICODE)


@dataclass(frozen=True)
class Coherence:
    """`ok`, or the first rule that was broken."""

    ok: bool
    reason: str


@cache
def rules() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((files("leeway.judges") / "coherence.yaml").read_text("utf-8"))
    return loaded


def coherence(text: str) -> Coherence:
    """Empty, broken characters, hardly any words, one thing over and over: each is a rule with a threshold."""
    limits = rules()
    body = text.strip()
    words = WORD.findall(body.lower())
    if not body:
        return Coherence(False, "empty")
    if _share(body, lambda c: c == "\ufffd" or (not c.isprintable() and not c.isspace())) > limits["broken_characters"]:
        return Coherence(False, "broken characters")
    if not words:
        return Coherence(False, "no words")
    if _share(body, lambda c: c.isalpha() or c.isspace()) < limits["letters_at_least"]:
        return Coherence(False, "hardly any letters")
    if max(map(len, words)) > limits["longest_word"]:
        return Coherence(False, "a word too long to be one")
    n = limits["ngram"]
    grams = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    if len(words) >= limits["repetition_from_words"] and len(grams) / grams.total() < limits["distinct_ngrams"]:
        return Coherence(False, "repetition")
    return Coherence(True, "coherent")


def _share(text: str, rule: Callable[[str], bool]) -> float:
    return sum(map(rule, text)) / len(text)
