"""Fixed random subsets, drawn from a key alone."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import TypeVar

import numpy as np

from leeway.data.items import PersonaItem
from leeway.hashing import derive_seed

T = TypeVar("T")


def subset(items: Seq[T], limit: int | None, key: str) -> list[T]:
    """A fixed random subset in the source's order; a larger limit's holds a smaller one's."""
    if limit is None or limit >= len(items):
        return list(items)
    order = np.random.default_rng(derive_seed("subset", key)).permutation(len(items))
    return [items[i] for i in sorted(int(i) for i in order[:limit])]


def balanced(items: Seq[PersonaItem], limit: int | None, key: str) -> list[PersonaItem]:
    """As many Yes-keyed as No-keyed items, so that a mere inclination to Yes endorses nothing."""
    if limit is None or limit >= len(items):
        return list(items)
    halves = [[i for i in items if i.match == answer] for answer in ("Yes", "No")]
    return [i for half, n in zip(halves, (limit - limit // 2, limit // 2), strict=True) for i in subset(half, n, key)]
