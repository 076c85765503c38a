"""`lr: tuned`: a small declared sweep per objective, chosen by capability on examples that nothing is trained on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from leeway.study.store import readable, whole_file


@dataclass(frozen=True)
class Trial:
    """One rate of the sweep: what it scored on the held-out examples, and the tokens that it took."""

    lr: float
    accuracy: float
    tokens: int


@dataclass(frozen=True)
class Choice:
    """The rate an objective is trained with, and all that were tried for it."""

    lr: float
    items: int
    budget: int
    trials: tuple[Trial, ...]

    @property
    def tokens(self) -> int:
        """Processed by the whole sweep, the reference's passes included."""
        return sum(t.tokens for t in self.trials)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def choose(trials: tuple[Trial, ...], *, items: int, budget: int) -> Choice:
    """The most accurate trial's rate; of several alike the smallest, which drifts least."""
    best = min(trials, key=lambda t: (-t.accuracy, t.lr))
    return Choice(best.lr, items, budget, trials)


def write(path: Path, choice: Choice) -> None:
    with whole_file(path) as scratch:
        scratch.write_text(json.dumps(choice.to_json(), indent=1, sort_keys=True) + "\n", "utf-8")


def read(path: Path) -> Choice:
    with readable(path):
        raw = json.loads(path.read_text("utf-8"))
        try:
            return Choice(**{**raw, "trials": tuple(Trial(**t) for t in raw["trials"])})
        except (TypeError, KeyError) as error:
            raise ValueError(f"not a choice of a learning rate: {error}") from error
