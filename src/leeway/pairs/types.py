"""What a study says about its pairs.

What became of every example and of every answer that was tried: for the manifest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

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


@dataclass(frozen=True)
class PairReport:
    """`attempted` answers were tried, one at most `accepted` for each example; the others are `rejected` by reason.

    Examples without an accepted answer are `left_out`, for every objective alike. `counts` is what a strategy has to
    say of its own: steps dropped, manners, rounds.
    """

    strategy: str
    settings: Mapping[str, Any]
    hashes: Mapping[str, str]
    examples: int
    attempted: int
    accepted: int
    rejected: Mapping[str, int] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.accepted + sum(self.rejected.values()) != self.attempted:
            raise ValueError(f"{self.attempted} answers: {self.accepted} accepted, {dict(self.rejected)} rejected")
        if self.accepted + len(self.left_out) != self.examples:
            raise ValueError(f"{self.examples} examples: {self.accepted} paired, {len(self.left_out)} left out")

    @property
    def acceptance_rate(self) -> float:
        """The share of the tried answers that was accepted."""
        return self.accepted / self.attempted if self.attempted else 0.0

    @property
    def paired_share(self) -> float:
        """The share of the examples that are trained on."""
        return self.accepted / self.examples if self.examples else 0.0

    def to_json(self) -> dict[str, Any]:
        plain = asdict(self) | {"left_out": {"count": len(self.left_out), "ids": list(self.left_out)}}
        return plain | {"acceptance_rate": self.acceptance_rate, "paired_share": self.paired_share}
