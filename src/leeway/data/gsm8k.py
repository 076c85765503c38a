"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168): training examples, test items and shots, under one versioned prompt."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from leeway.data.readers import Source, field, load
from leeway.data.types import CapabilityItem, Example
from leeway.errors import LeewayError
from leeway.hashing import derive_seed

TRAIN = Source(("gsm8k/train.jsonl.gz", "gsm8k/train.jsonl"), "openai/gsm8k", "main", "train")
TEST = Source(("gsm8k/test.jsonl", "gsm8k/test.jsonl.gz"), "openai/gsm8k", "main", "test")

PROMPT_VERSION = 1
PROMPT = "{question}\n\nReason step by step. End with a line that reads: #### and the final number."
CALCULATOR = re.compile(r"<<[^<>]*>>")
STEP = re.compile(r"<<\s*(\d[\d.]*)\s*([-+*/])\s*(\d[\d.]*)\s*=\s*(-?\d[\d.]*)\s*>>")
STEP_PROMPT = "Calculate {a} {op} {b}. Answer with the number only."


def _records(source: Source, revision: str | None) -> tuple[list[tuple[str, str]], str]:
    """Return the questions as prompts, their answers, and their origin."""
    records, origin = load(source, revision=revision)
    found = []
    for n, record in enumerate(records, 1):
        question, answer = (field(record, (c,), f"gsm8k {source.split}, record {n}") for c in ("question", "answer"))
        found.append((PROMPT.replace("{question}", question), answer))
    return found, origin


def train_examples(revision: str | None = None) -> tuple[list[Example], str]:
    """Return the official training split, without calculator annotations (`<<48/2=24>>`), and its origin."""
    records, origin = _records(TRAIN, revision)
    return [Example(f"gsm8k-train/{n}", q, CALCULATOR.sub("", a)) for n, (q, a) in enumerate(records)], origin


def held_out_items(revision: str | None = None) -> tuple[list[CapabilityItem], str]:
    """Return the official test split and its origin; the reference is the number after `####`."""
    records, origin = _records(TEST, revision)
    items = []
    for n, (question, answer) in enumerate(records):
        gold = answer.rsplit("####", 1)[-1].strip().replace(",", "")
        items.append(CapabilityItem(f"gsm8k/{n}", question, gold))
    return items, origin


def step_items(revision: str | None = None) -> tuple[list[CapabilityItem], str]:
    """Return every distinct calculation with two numbers in the test split's solutions, and their origin.

    A simpler question about the same skill, for models that solve hardly any whole problem.
    """
    records, origin = _records(TEST, revision)
    found = {(a, op, b): result for _, answer in records for a, op, b, result in STEP.findall(answer)}
    return [  # a slash in an id parts an item from its group
        CapabilityItem(f"gsm8k-steps/{a}{op.replace('/', '÷')}{b}", STEP_PROMPT.format(a=a, op=op, b=b), result)
        for (a, op, b), result in found.items()
    ], origin


def shots(k: int, *, exclude: Iterable[str] = (), seed: int = 0, revision: str | None = None) -> list[tuple[str, str]]:
    """Return `k` training questions with their answers, the first of a fixed random order.

    Prompts in `exclude` (those of the test items) are skipped. Raise LeewayError if fewer than `k` are left.
    """
    examples, origin = train_examples(revision)
    order = np.random.default_rng(derive_seed("shots", "gsm8k", seed)).permutation(len(examples))
    excluded = set(exclude)
    chosen = [(e.prompt, e.preferred) for e in (examples[int(i)] for i in order) if e.prompt not in excluded]
    if not 0 <= k <= len(chosen):
        what = f"evals.capability: {k} shots of gsm8k, and {len(chosen)} examples are available ({origin})"
        raise LeewayError(what, fix="use fewer shots")
    return chosen[:k]


# how an answer writes a number in LaTeX, for grading and for corrupting it
COMMAND = r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{"
# content of a box: braces belong to a command, as in \text{…}, or to an index; of nested boxes, the inner one
IN_BOX = r"(?:[^{}\\^_]|\\(?!boxed\{)[a-zA-Z]++(?:\{[^{}]*\})*+|\\[^a-zA-Z]|[\^_](?:\{[^{}]*\})?+)*"
