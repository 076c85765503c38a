"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168): 0-shot chat, the final number extracted by two stated rules.

strict: the number after the first `####` (as published; a model that runs on into a question of its own writes a
second). flexible: that number where there is one, else the one inside the last
`\\boxed{}`, else the one after the last "answer is", else the last number of the answer. Numbers are compared by value:
"5.0" = 5, "1,234" = 1234, "$5" = 5, "50%" = 50.
"""

from __future__ import annotations

import json
import re
from decimal import Decimal

NUMBER = re.compile(r"[-+]?\$?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?<=\d)")
DRESSED = r"[\s*_\\($]*([-+]?\\?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+))"  # a number behind bold marks, brackets, dollars
HASHES = re.compile("####" + DRESSED)
BOXED = re.compile(r"\\boxed\{" + DRESSED + r"[^{}]*\}")
SAID = re.compile(r"answer\s*(?:is\s*[:=]?|:|=)" + DRESSED, re.IGNORECASE)
PLAIN = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


def number(text: str) -> Decimal | None:
    """The value of a number as written, commas and dollars dropped; None where it is none."""
    bare = text.strip().replace("\\", "").replace("$", "")
    return Decimal(bare.replace(",", "")) if PLAIN.fullmatch(bare) else None


def strict(response: str) -> Decimal | None:
    found = HASHES.search(response)
    return number(found[1]) if found else None


def flexible(response: str) -> Decimal | None:
    hashed = strict(response)
    if hashed is not None:
        return hashed
    for pattern in (BOXED, SAID):
        found = pattern.findall(response)
        if found:
            return number(found[-1])
    numbers = [m for m in NUMBER.findall(response) if m]
    return number(numbers[-1]) if numbers else None


def grade(reference: str, response: str) -> tuple[bool, str]:
    """(right by the flexible rule, both rules' verdicts as JSON)."""
    gold = number(reference)
    if gold is None:
        raise ValueError(f"the reference {reference!r} is not a number")
    by_rule = {"strict": strict(response), "flexible": flexible(response)}
    raw = {k: {"found": None if v is None else str(v), "right": v == gold} for k, v in by_rule.items()}
    return by_rule["flexible"] == gold, json.dumps(raw, sort_keys=True)
