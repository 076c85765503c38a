"""Length grouping for every trainer alike: their own sampler reads lengths that the pair trainers do not hand it."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np

WINDOW = 50  # batches that are sorted together, as in transformers' sampler


def grouped(lengths: Seq[int], batch: int) -> list[int]:
    """Indices in batches of near lengths: sorted within a window, longest first within a batch, batches shuffled."""
    rng = np.random.default_rng(0)
    found: list[int] = []
    for start in range(0, len(lengths), WINDOW * batch):
        window = range(start, min(start + WINDOW * batch, len(lengths)))
        order = sorted(window, key=lambda i: -lengths[i])
        batches = [order[k : k + batch] for k in range(0, len(order), batch)]
        found += [i for k in rng.permutation(len(batches)) for i in batches[int(k)]]
    return found
