"""`lr: tuned`: a small declared sweep per objective, chosen by capability on examples that nothing is trained on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from leeway.errors import LeewayError
from leeway.io import readable, verify_checksum, with_checksum, write_json


@dataclass(frozen=True)
class Trial:
    """One rate of the sweep: its accuracy on the held-out examples (none where training left the numbers, and why).

    `trained` tokens went through policy and reference, `answered` ones were read and written to be graded.
    """

    lr: float
    accuracy: float | None
    trained: int
    answered: int
    failed: str = ""


@dataclass(frozen=True)
class LearningRateChoice:
    """The rate an objective is trained with, and all that were tried for it."""

    lr: float
    items: int
    budget: int
    trials: tuple[Trial, ...]

    @property
    def tokens(self) -> int:
        """Processed by the whole sweep: the reference's passes and the answers included."""
        return sum(t.trained + t.answered for t in self.trials)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"tokens": self.tokens}


def choose(alias: str, trials: tuple[Trial, ...], *, items: int, budget: int) -> LearningRateChoice:
    """The most accurate trial's rate; of several alike the smallest, which drifts least."""
    scored = [t for t in trials if t.accuracy is not None]
    if not scored:
        raise LeewayError(
            f"optim.tune: {alias} left the numbers at every rate ({', '.join(f'{t.lr:g}' for t in trials)}; "
            f"{trials[0].failed})",
            fix="give smaller rates in optim.tune.lrs",
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
            raise ValueError(f"not a choice of a learning rate: {error}") from error
