"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168): the final number of a chat answer, extracted by two stated rules.

strict: the number after the first `####` (as published; a model that runs on into a question of its own writes a
second). flexible: that number where there is one, else the one that the last `\\boxed{}` with a number opens with, else
the one after the last "answer is", else the last number of the answer.

A number may stand behind white space, bold marks, brackets, dollars and `\\text{`, and anything may follow it: units, a
percent sign, another sentence. Behind one of the three marks a quotient, `\\frac{1}{2}` or `1/2`, is its value; a bare
last number is only that number. Commas group thousands, `{,}`, `\\,` and `\\!` too, and `−` is a minus. Numbers are
compared by value: "5.0" = 5, "1,234" = 1234, "$5" = 5, "50%" = 50, "\\boxed{\\frac{1}{2}}" = 0.5.
"""

from __future__ import annotations

import json
import re
from decimal import Decimal, localcontext
from typing import Literal

from leeway.data.latex import COMMAND, IN_BOX

Rule = Literal["strict", "flexible"]

NUMBER = re.compile(r"[-+]?\$?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?<=\d)")
PLAIN = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
DRESS = re.compile(rf"(?:[\s*_\\($]|{COMMAND})*")
VALUE = re.compile(DRESS.pattern + r"([-+]?\\?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+))")
SLASH = re.compile(r"\s*/\s*(\d[\d,]*(?:\.\d+)?)")
FRACTION = re.compile(r"(?:[\s*_($]|\\[($\[])*([-+]?)\\[dt]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")
HASHES = re.compile("####+")
SAID = re.compile(r"answer\s*(?:is\s*[:=]?|:|=)", re.IGNORECASE)
BOXED = re.compile(r"\\boxed\{(" + IN_BOX + r")\}")


def plain(text: str) -> str:
    """Typographic and LaTeX spellings of a minus and of grouped thousands as `-` and `,`."""
    text = text.replace("−", "-").replace("{,}", ",")
    return re.sub(r"(?<=\d),?\\[,;!](?=\d{3})", ",", text)


def number(text: str) -> Decimal | None:
    """The value of a number as written, commas and dollars dropped; None where it is none."""
    bare = text.strip().replace("\\", "").replace("$", "")
    return Decimal(bare.replace(",", "")) if PLAIN.fullmatch(bare) else None


def opening(text: str) -> Decimal | None:
    """The value that a text opens with, behind its dress: a quotient or a number; None where it opens with neither."""
    fraction = FRACTION.match(text)
    if fraction:
        sign, *parts = (part or "" for part in fraction.groups())
        return _quotient(sign + "".join(parts[:2]).strip(), "".join(parts[2:]).strip())
    found = VALUE.match(text)
    if not found:
        return None
    over = SLASH.match(text, found.end())
    return _quotient(found[1], over[1]) if over else number(found[1])


def _quotient(above: str, below: str) -> Decimal | None:
    """a / b, with 50 digits or as many as tell it from its neighbours; None where it has no value."""
    a, b = number(above), number(below)
    if a is None or not b:
        return None
    with localcontext(prec=max(50, len(above) + len(below) + 10)):
        return a / b


def strict(response: str) -> Decimal | None:
    text = plain(response)
    for mark in HASHES.finditer(text):
        if (value := opening(text[mark.end() :])) is not None:
            return value
    return None


def flexible(response: str) -> Decimal | None:
    hashed = strict(response)
    if hashed is not None:
        return hashed
    text = plain(response)
    boxed = [m[1] for m in BOXED.finditer(text)]
    said = [text[m.end() :] for m in SAID.finditer(text)]
    for after in (boxed, said):
        values = [v for v in map(opening, reversed(after)) if v is not None]
        if values:
            return values[0]
    numbers = [m for m in NUMBER.findall(text) if m]
    return number(numbers[-1]) if numbers else None


def grade(reference: str, response: str, rule: Rule = "flexible") -> tuple[bool, str]:
    """(right by `rule`, both rules' verdicts as JSON)."""
    gold = number(plain(reference))
    if gold is None:
        raise ValueError(f"the reference {reference!r} is not a number")
    by_rule = {"strict": strict(response), "flexible": flexible(response)}
    raw = {k: {"found": None if v is None else str(v), "right": v == gold} for k, v in by_rule.items()}
    return by_rule[rule] == gold, json.dumps(raw, sort_keys=True)
