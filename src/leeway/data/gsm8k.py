"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168) as training examples and as test items, under one versioned prompt.

How answers write a number in LaTeX: what dresses it, and what may stand in a box beside it.
"""

from __future__ import annotations

import re
from collections.abc import Collection

import numpy as np

from leeway.data.readers import Loaded, Source, field, load
from leeway.data.types import CapabilityItem, Example
from leeway.errors import LeewayError
from leeway.hashing import derive_seed

TRAIN = Source(("gsm8k/train.jsonl.gz", "gsm8k/train.jsonl"), "openai/gsm8k", "main", "train")
TEST = Source(("gsm8k/test.jsonl", "gsm8k/test.jsonl.gz"), "openai/gsm8k", "main", "test")

PROMPT_VERSION = 1
PROMPT = "{question}\n\nReason step by step. End with a line that reads: #### and the final number."
CALCULATOR = re.compile(r"<<[^<>]*>>")


def prompt(question: str) -> str:
    return PROMPT.replace("{question}", question)


def train_examples(revision: str | None = None) -> tuple[list[Example], str]:
    """The official training split; calculator annotations `<<48/2=24>>` are taken out of the reasoning."""
    loaded = load(TRAIN, revision=revision)
    examples = []
    for n, record in enumerate(loaded.records):
        where = f"gsm8k train, record {n + 1}"
        answer = CALCULATOR.sub("", field(record, ("answer",), where))
        examples.append(Example(f"gsm8k-train/{n}", prompt(field(record, ("question",), where)), answer))
    return examples, loaded.origin


def held_out_items(revision: str | None = None) -> tuple[list[CapabilityItem], str]:
    """The official test split; the reference is the number after `####`."""
    loaded: Loaded = load(TEST, revision=revision)
    items = []
    for n, record in enumerate(loaded.records):
        where = f"gsm8k test, record {n + 1}"
        gold = field(record, ("answer",), where).rsplit("####", 1)[-1].strip().replace(",", "")
        items.append(CapabilityItem(f"gsm8k/{n}", prompt(field(record, ("question",), where)), gold))
    return items, loaded.origin


def shots(
    k: int, *, exclude: Collection[str] = (), seed: int = 0, revision: str | None = None
) -> list[tuple[str, str]]:
    """`k` training questions with their answers, in a fixed random order; more shots begin with the fewer ones.

    A question whose prompt is in `exclude` (the items' own) is passed over. Raises LeewayError where too few are left.
    """
    examples, origin = train_examples(revision)
    order = np.random.default_rng(derive_seed("shots", "gsm8k", seed)).permutation(len(examples))
    asked = set(exclude)
    chosen = [(e.prompt, e.preferred) for e in (examples[int(i)] for i in order) if e.prompt not in asked]
    if not 0 <= k <= len(chosen):
        raise LeewayError(
            f"evals.capability: {k} shots of gsm8k cannot be drawn, {len(chosen)} examples can be ({origin})",
            fix="ask for fewer shots",
        )
    return chosen[:k]


COMMAND = r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{"
# braces belong to a command, as in \text{…}, or to an index; a box in a box is the inner one
IN_BOX = r"(?:[^{}\\^_]|\\(?!boxed\{)[a-zA-Z]++(?:\{[^{}]*\})*+|\\[^a-zA-Z]|[\^_](?:\{[^{}]*\})?+)*"
