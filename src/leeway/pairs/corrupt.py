"""Preference pairs that need no model: the data set's own dispreferred answers, and corrupted copies of the preferred.

dataset: the answer that the data set itself holds.
corrupted: the preferred answer with another final number and, half of the time where it has at least two lines of
reasoning, with one of those lines dropped. Drawn from (seed, example id) alone. The final number is the one that a
grader would read: behind the first `####`, else in the last `\\boxed{}`, else behind the last "answer is", else the
last number of the answer. Behind a mark it may stand in \\text{…} or a command like it, and units may follow, in
\\text{…} as well: `\\boxed{\\text{42}}` and `\\boxed{42\\text{ km}}` end on 42. The wrong one differs from it by value,
not only by how it is written; its sign, decimals and commas keep their form. Nothing else is changed, so the reasoning
may still hold the right number.
"""

from __future__ import annotations

import re
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from decimal import Decimal, localcontext
from typing import Literal

import numpy as np

from leeway.data.gsm8k import COMMAND, IN_BOX
from leeway.data.types import Example
from leeway.errors import LeewayError
from leeway.hashing import derive_seed

Strategy = Literal["dataset", "corrupted"]

# a minus stands before a number, not between two; a number may begin with its point
NUMBER = re.compile(r"(?:(?<![\w)\]])-)?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+")
# what may stand between a mark and its number
DRESS = re.compile(rf"(?:{COMMAND}|[\s*_\\($:=+])*(?:-(?=[\\$.]))?[\\$]*")
HASHES = re.compile("####")
LAST = (re.compile(r"\\boxed\{(?=" + IN_BOX + r"\})"), re.compile(r"answer\s*(?:is|:|=)", re.IGNORECASE))
DROP = 0.5  # chance that a step is dropped where there is one to drop


@dataclass(frozen=True)
class Corruption:
    """A wrong answer, and whether a step of the right one is missing in it."""

    text: str
    step_dropped: bool


def make_pairs(examples: Seq[Example], strategy: Strategy, *, needed_by: Seq[str], seed: int = 0) -> list[Example]:
    """Examples with their dispreferred answers; raises LeewayError where an objective in `needed_by` would lack one."""
    paired = list(examples) if strategy == "dataset" else [corrupt(e, seed) for e in examples]
    check_pairs(paired, needed_by)
    return paired


def check_pairs(examples: Seq[Example], needed_by: Seq[str]) -> None:
    """Raise LeewayError where an objective in `needed_by` would lack a rejected answer, or have two equal ones."""
    for e in examples if needed_by else ():
        if e.dispreferred is None:
            raise LeewayError(
                f"pairs: example {e.id} has no rejected answer, and {', '.join(needed_by)} needs one",
                fix="add `rejected` to the training file, set pairs: {from: corrupted}, or leave these objectives out",
            )
        if e.dispreferred.strip() == e.preferred.strip():
            raise LeewayError(f"pairs: example {e.id} has two equal answers", fix="mend or remove that record")


def corrupt(example: Example, seed: int) -> Example:
    """The example with a corrupted copy of its preferred answer; raises LeewayError where that holds no number."""
    return replace(example, dispreferred=corruption(example, seed).text)


def corruption(example: Example, seed: int) -> Corruption:
    """A wrong copy of the preferred answer; raises LeewayError where it holds no number."""
    rng = np.random.default_rng(derive_seed("corrupted", seed, example.id))
    right = example.preferred
    found = _final_number(right)
    if found is None:
        raise LeewayError(
            f"pairs: example {example.id} has no number in its answer to corrupt",
            fix="use pairs: {from: dataset}",
        )
    mark, number = found
    final_line = right.rfind("\n", 0, mark) + 1
    lines = right[:final_line].splitlines(keepends=True)
    steps = [k for k, line in enumerate(lines) if line.strip()]
    dropped = len(steps) > 1 and bool(rng.random() < DROP)
    if dropped:
        del lines[steps[int(rng.integers(len(steps)))]]
    kept = "".join(lines) + right[final_line : number.start()]
    return Corruption(kept + _wrong(number[0], rng) + right[number.end() :], dropped)


def _final_number(text: str) -> tuple[int, re.Match[str]] | None:
    """(where its mark begins, the number that a grader would read), or None."""
    first = list(HASHES.finditer(text))
    for marks in (first, *(reversed(list(pattern.finditer(text))) for pattern in LAST)):
        for mark in marks:
            if behind := _number_behind(text, mark.end()):
                return mark.start(), behind
    numbers = list(NUMBER.finditer(text))
    return (numbers[-1].start(), numbers[-1]) if numbers else None


def _number_behind(text: str, at: int) -> re.Match[str] | None:
    dress = DRESS.match(text, at)
    return NUMBER.match(text, dress.end() if dress else at)


def _wrong(number: str, rng: np.random.Generator) -> str:
    """Another number of the same form: off by a little, doubled, or ten times as large; never of the other sign."""
    plain = number.replace(",", "")
    if plain.startswith("."):  # stays below one: a digit before the point would join what stands before it
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
