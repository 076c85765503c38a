"""GSM8K's training examples in one fixed order, paired, and its test questions as prompts."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from leeway.data import gsm8k
from leeway.data.types import Example
from leeway.pairs.build import corrupt

Pairs = Literal["strangers", "corrupted"]


def examples(pairs: Pairs) -> list[Example]:
    """All examples, shuffled. `strangers`: rejected is the answer to another question (alike in its prompt alone).

    `corrupted`: rejected is the preferred answer with another number, so that most of its beginning is the same.
    """
    found, _ = gsm8k.train_examples()
    order = np.random.default_rng(0).permutation(len(found))
    shuffled = [found[int(i)] for i in order]
    if pairs == "strangers":
        return strangers(shuffled)
    return [replace(e, dispreferred=corrupt(e, 0).text) for e in shuffled]


def strangers(shuffled: list[Example]) -> list[Example]:
    """Each example's rejected answer is the next one's whose first word is another."""
    paired = []
    for k, e in enumerate(shuffled):
        after = (shuffled[(k + d) % len(shuffled)].preferred for d in range(1, len(shuffled)))
        paired.append(replace(e, dispreferred=next(a for a in after if a.split()[0] != e.preferred.split()[0])))
    return paired


def questions(n: int) -> list[str]:
    """The first `n` test questions, as prompts."""
    return [item.prompt for item in gsm8k.held_out_items()[0][:n]] if n else []


def corpus() -> list[str]:
    """What the tokenizer is trained on."""
    found, _ = gsm8k.train_examples()
    return [text for e in found for text in (e.prompt, e.preferred)]
