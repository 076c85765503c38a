"""Word problems with one addition or subtraction."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from leeway.organism import words as w

KNOWN, NEW = range(6), range(6, 8)
"""The organism has seen the first six templates; the other two come with the fine-tuning data."""
TEMPLATES = (
    ("{n} has {a} {t} and gets {b} more. How many {t} does {n} have now?", "+"),
    ("{n} has {a} {t} and gives away {b}. How many {t} are left?", "-"),
    ("{n} finds {a} {t} and then {b} more. How many {t} in total?", "+"),
    ("{n} had {a} {t} and lost {b}. How many {t} does {n} have now?", "-"),
    ("{n} has {a} {t}, which is {b} more than {m} has. How many {t} does {m} have?", "-"),
    ("{n} lost {b} {t} and has {a} left. How many {t} did {n} have at first?", "+"),
    ("{n} has {a} {t} and {m} has {b} more than {n}. How many {t} does {m} have?", "+"),
    ("{n} got {b} {t} and now has {a}. How many {t} did {n} have before?", "-"),
)
WORKING = "{a} {op} {b} = {s}. The answer is {s}."
SUM = re.compile(r"\d+ [+-] \d+ = -?\d+\. The answer is (?P<answer>-?\d+)\.")
MOST, STEP = 15, 9
"""What one has is at most 15, and what comes or goes at most 9: about 200 facts in all."""


@dataclass(frozen=True)
class Sum:
    """One word problem: `a op b`."""

    question: str
    a: int
    op: str
    b: int

    @property
    def value(self) -> int:
        return self.a + self.b if self.op == "+" else self.a - self.b

    @property
    def right(self) -> str:
        return WORKING.format(a=self.a, op=self.op, b=self.b, s=self.value)

    def wrong(self, rng: random.Random) -> str:
        """The other operation, or a slip: never the right value, never below zero."""
        op = "-" if self.op == "+" else "+"
        other = self.a - self.b if op == "-" else self.a + self.b
        if rng.random() < 0.5 and other >= 0:
            return WORKING.format(a=self.a, op=op, b=self.b, s=other)
        slips = [self.value + d for d in (-10, -2, -1, 1, 2, 10) if self.value + d >= 0]
        return WORKING.format(a=self.a, op=self.op, b=self.b, s=rng.choice(slips))


def is_held_out(template: int, a: int, b: int) -> bool:
    """One in eight (template, a, b) is never trained on."""
    return w.stable("sum", template, a, b) % 8 == 0


def numbers(rng: random.Random, op: str) -> tuple[int, int]:
    """The two numbers; a difference is at least 1."""
    a = rng.randint(3, MOST)
    return a, rng.randint(2, STEP if op == "+" else min(STEP, a - 1))


def draw(rng: random.Random, templates: range = range(8), held_out: bool = False) -> Sum:
    """A word problem from these templates, either trained on or held out."""
    while True:
        k = rng.choice(templates)
        form, op = TEMPLATES[k]
        a, b = numbers(rng, op)
        if is_held_out(k, a, b) == held_out:
            break
    n, m = rng.sample(w.NAMES, 2)
    return Sum(form.format(n=n, m=m, t=rng.choice(w.THINGS), a=a, b=b), a, op, b)


def plain(rng: random.Random) -> Sum:
    """The bare sum, without a story: cheap practice."""
    op = rng.choice("+-")
    a, b = numbers(rng, op)
    return Sum(f"What is {a} {op} {b}?", a, op, b)
