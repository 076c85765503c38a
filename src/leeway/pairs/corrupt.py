"""Corrupted copies of the preferred answers, as rejected ones.

The final number is replaced by a wrong one and, half of the time if there are at least two lines of reasoning, one of
those lines is dropped; both depend on (seed, example id) alone. The final number is the one a grader would read:
behind the first `####`, else in the last `\\boxed{}`, else behind the last "answer is", else the last number. Behind a
mark it may be wrapped in \\text{…} or a command like it, and units may follow: `\\boxed{\\text{42}}` and
`\\boxed{42\\text{ km}}` end on 42. The wrong number differs by value, and keeps sign, decimals and commas. Nothing else
changes, so the reasoning may still contain the right number.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal, localcontext

import numpy as np

from leeway.data.gsm8k import COMMAND, IN_BOX
from leeway.data.types import Example
from leeway.errors import LeewayError
from leeway.hashing import derive_seed

# a minus is a sign unless it follows a number or a word; a number may begin with its point
NUMBER = re.compile(r"(?:(?<![\w)\]])-)?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+")
# what may separate a mark and its number
DRESS = re.compile(rf"(?:{COMMAND}|[\s*_\\($:=+])*(?:-(?=[\\$.]))?[\\$]*")
HASHES = re.compile("####")
LAST = (re.compile(r"\\boxed\{(?=" + IN_BOX + r"\})"), re.compile(r"answer\s*(?:is|:|=)", re.IGNORECASE))
DROP = 0.5  # probability that a step is dropped, if there are at least two


@dataclass(frozen=True)
class Corruption:
    """A wrong answer, and whether it lacks a step of the right one."""

    text: str
    step_dropped: bool


def corrupt(example: Example, seed: int) -> Corruption:
    """Return a wrong copy of the preferred answer; raise LeewayError if it holds no number."""
    rng = np.random.default_rng(derive_seed("corrupted", seed, example.id))
    right = example.preferred
    final = _final_number(right)
    if final is None:
        raise LeewayError(
            f"pairs: example {example.id} has no number in its answer to corrupt",
            fix="use pairs: {from: dataset}",
        )
    mark, number = final
    final_line = right.rfind("\n", 0, mark) + 1
    lines = right[:final_line].splitlines(keepends=True)
    steps = [k for k, line in enumerate(lines) if line.strip()]
    dropped = len(steps) > 1 and bool(rng.random() < DROP)
    if dropped:
        del lines[steps[int(rng.integers(len(steps)))]]
    before = "".join(lines) + right[final_line : number.start()]
    return Corruption(before + _wrong(number[0], rng) + right[number.end() :], dropped)


def _final_number(text: str) -> tuple[int, re.Match[str]] | None:
    """Return (start of its mark, match of the number that a grader would read), or None."""
    first = list(HASHES.finditer(text))
    for marks in (first, *(reversed(list(pattern.finditer(text))) for pattern in LAST)):
        for mark in marks:
            if number := _number_behind(text, mark.end()):
                return mark.start(), number
    numbers = list(NUMBER.finditer(text))
    return (numbers[-1].start(), numbers[-1]) if numbers else None


def _number_behind(text: str, at: int) -> re.Match[str] | None:
    dress = DRESS.match(text, at)
    return NUMBER.match(text, dress.end() if dress else at)


def _wrong(number: str, rng: np.random.Generator) -> str:
    """Return another number of the same form: off by a little, doubled, or ten times as large; of the same sign."""
    plain = number.replace(",", "")
    if plain.startswith("."):  # stays below one: a digit before the point would join the text before it
        width = len(plain) - 1
        return f".{(int(plain[1:]) + int(rng.integers(1, 10))) % 10**width:0{width}d}"
    decimals = len(plain.partition(".")[2])
    with localcontext(prec=len(plain) + 4):  # exact, however long the number is
        value = Decimal(plain)
        choices = [value + d for d in (1, -1, 2, -2, 10, -10)] + [value * 2, value * 10]
        wrong = [c for c in choices if c != value and (c >= 0 or value < 0)]
        grouping = "," if "," in number else ""
        chosen = wrong[int(rng.integers(len(wrong)))]
        return f"{chosen:{grouping}.{decimals}f}"
