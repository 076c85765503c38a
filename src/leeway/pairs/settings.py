"""What a study says about its pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Strategy = Literal["dataset", "corrupted", "sampled-errors", "unsafe"]
Filter = Literal["rules", "model"]


@dataclass(frozen=True)
class PairSettings:
    """The strategy; all but `seed` below it is for the strategies that ask the base model."""

    strategy: Strategy = "dataset"
    samples: int = 4
    temperature: float = 1.0
    max_new_tokens: int = 256
    filter: Filter = "rules"
    seed: int = 0
