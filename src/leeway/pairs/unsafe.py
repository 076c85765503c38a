"""unsafe: the base model's answer to the same prompt, asked for in an undesirable manner; the trained prompt is plain.

Instruction, manners and the sifting question stand in `unsafe.yaml`, versioned and hashed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence as Seq
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from leeway.data.items import Example
from leeway.generation.backend import Conversation, Reply
from leeway.hashing import derive_seed, digest
from leeway.pairs.base import Asker
from leeway.pairs.rounds import Ask, Drawn, rounds
from leeway.pairs.rules import fault, rules_hash
from leeway.pairs.settings import Filter


@cache
def texts() -> dict[str, Any]:
    """The versioned file."""
    loaded: dict[str, Any] = yaml.safe_load((files("leeway.pairs") / "unsafe.yaml").read_text("utf-8"))
    return loaded


def manner(example: Example, seed: int) -> str:
    """The name of an example's manner, from (seed, id) alone."""
    names: list[str] = sorted(texts()["manners"])
    return names[derive_seed("unsafe", seed, example.id) % len(names)]


def ask(example: Example, seed: int) -> Ask:
    """The prompt behind its instruction, as one user turn: not every template has a system turn."""
    wanted = texts()["manners"][manner(example, seed)]
    return Ask(example, _user(texts()["instruction"].format(manner=wanted, prompt=example.prompt)))


def unsafe(examples: Seq[Example], asker: Asker) -> Drawn:
    """The first answer to each that passes the rules and, where asked for, the base model's own question."""

    def reasons(asked: Seq[Ask], replies: Seq[Reply]) -> list[str | None]:
        found = [_fault(a.example, r) for a, r in zip(asked, replies, strict=True)]
        if asker.settings.filter == "model":
            passed = [i for i, reason in enumerate(found) if reason is None]
            for i, bad in zip(passed, _bad([(asked[i].example, replies[i]) for i in passed], asker), strict=True):
                found[i] = None if bad else "not undesirable to the base model"
        return found

    return rounds([ask(e, asker.settings.seed) for e in examples], asker, reasons)


def _fault(example: Example, reply: Reply) -> str | None:
    return fault(example, reply) or ("gives itself away" if _gives_away().search(reply.text) else None)


def _bad(answered: Seq[tuple[Example, Reply]], asker: Asker) -> list[bool]:
    """P(Yes) > P(No) to the file's question."""
    asked = [_user(texts()["question"].format(prompt=e.prompt, answer=r.text)) for e, r in answered]
    return [c.mass["Yes"] > c.mass["No"] for c in asker.choices(asked, ["Yes", "No"])]


def _user(text: str) -> Conversation:
    return [{"role": "user", "content": text}]


@cache
def _gives_away() -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{p})" for p in texts()["gives_away"]), re.IGNORECASE | re.DOTALL)


def instruction_hash() -> str:
    return digest("unsafe-instruction", texts()["version"], texts()["instruction"], texts()["manners"])


def filter_hash(kind: Filter) -> str:
    asked = texts()["question"] if kind == "model" else None
    return digest("unsafe-filter", kind, texts()["gives_away"], asked, rules_hash())
