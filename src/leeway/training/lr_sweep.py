"""`lr: tuned`: a small learning-rate sweep per objective, decided by accuracy on held-out examples."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from leeway.errors import LeewayError
from leeway.io import readable, verify_checksum, with_checksum, write_json


@dataclass(frozen=True)
class Trial:
    """One learning rate: its held-out accuracy, or None if it diverged (`failed` is the reason).

    `trained` counts tokens of policy and reference, `answered` the prompt and answer tokens of the grading.
    """

    lr: float
    accuracy: float | None
    trained: int
    answered: int
    failed: str = ""


@dataclass(frozen=True)
class LearningRateChoice:
    """The learning rate of an objective, and its trials."""

    lr: float
    items: int
    budget: int
    trials: tuple[Trial, ...]

    @property
    def tokens(self) -> int:
        """Tokens that the sweep processed, with reference passes and answers."""
        return sum(t.trained + t.answered for t in self.trials)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"tokens": self.tokens}


def choose(alias: str, trials: tuple[Trial, ...], *, items: int, budget: int) -> LearningRateChoice:
    """Return the most accurate learning rate; of equals the smallest, which drifts least."""
    scored = [t for t in trials if t.accuracy is not None]
    if not scored:
        raise LeewayError(
            f"optim.tune: {alias} diverged (non-finite loss) at every learning rate "
            f"({', '.join(f'{t.lr:g}' for t in trials)}; {trials[0].failed})",
            fix="give smaller ones in optim.tune.lrs",
        )
    best = min(scored, key=lambda t: (-(t.accuracy or 0.0), t.lr))
    return LearningRateChoice(best.lr, items, budget, trials)


def write(path: Path, choice: LearningRateChoice) -> None:
    write_json(path, with_checksum(choice.to_json()))


def read(path: Path) -> LearningRateChoice:
    with readable(path):
        raw = verify_checksum(json.loads(path.read_text("utf-8")))
        try:
            raw.pop("tokens")
            return LearningRateChoice(**{**raw, "trials": tuple(Trial(**t) for t in raw["trials"])})
        except (TypeError, KeyError) as error:
            raise ValueError(f"not a learning-rate choice: {error}") from error
