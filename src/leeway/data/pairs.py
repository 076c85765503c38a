"""Preference pairs: how the dispreferred answer of an example is made. The strategy stands in the manifest.

dataset: the answer that the data set itself holds. corrupted: the preferred answer with a wrong final number or with a
reasoning step dropped (and, since the number alone would give it away, always with a wrong final number), drawn from
(seed, example id) alone and never equal to the right answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Literal

import numpy as np

from leeway.data.items import Example
from leeway.errors import LeewayError
from leeway.hashing import derive_seed

Strategy = Literal["dataset", "corrupted"]

NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")


def make_pairs(examples: Seq[Example], strategy: Strategy, *, needed_by: Seq[str], seed: int = 0) -> list[Example]:
    """Examples with their dispreferred answers; raises LeewayError where an objective in `needed_by` would lack one."""
    paired = list(examples) if strategy == "dataset" else [corrupt(e, seed) for e in examples]
    for e in paired:
        if needed_by and e.dispreferred is None:
            raise LeewayError(
                f"pairs: example {e.id} has no rejected answer, and {', '.join(needed_by)} needs one",
                fix="add `rejected` to the training file, set pairs: {from: corrupted}, or leave these objectives out",
            )
        if needed_by and e.dispreferred is not None and e.dispreferred.strip() == e.preferred.strip():
            raise LeewayError(f"pairs: example {e.id} has two equal answers", fix="mend or remove that record")
    return paired


def corrupt(example: Example, seed: int) -> Example:
    """The example with a corrupted copy of its preferred answer as the dispreferred one."""
    rng = np.random.default_rng(derive_seed("corrupted", seed, example.id))
    found = list(NUMBER.finditer(example.preferred))
    if not found:
        raise LeewayError(
            f"pairs: example {example.id} has no number in its answer to corrupt",
            fix="use pairs: {from: dataset}",
        )
    last = found[-1]
    head, tail = example.preferred[: last.start()], example.preferred[last.end() :]
    lines = head.split("\n")
    if len(lines) > 2 and rng.random() < 0.5:
        del lines[int(rng.integers(len(lines) - 1))]
    return replace(example, dispreferred="\n".join(lines) + _wrong(last[0], rng) + tail)


def _wrong(number: str, rng: np.random.Generator) -> str:
    """Another number of the same form: off by a little, by a digit's weight, or by a factor."""
    plain = number.replace(",", "")
    decimals = len(plain.split(".")[1]) if "." in plain else 0
    value = float(plain)
    choices = [value + d for d in (1, -1, 2, -2, 10, -10)] + [value * 2, value * 10]
    wrong = [c for c in choices if c != value and (c >= 0 or value < 0)]
    grouping = "," if "," in number else ""
    return f"{wrong[int(rng.integers(len(wrong)))]:{grouping}.{decimals}f}"
