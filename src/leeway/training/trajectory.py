"""One training run (model x task x objective x seed) that stops at every budget and goes on from any checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from leeway.data.batches import Companions, Mark, Schedule
from leeway.errors import LeewayError
from leeway.hashing import derive_seed, digest
from leeway.model import adapters
from leeway.model.load import Model
from leeway.objectives import Objective
from leeway.training import checkpoints
from leeway.training.loop import Batch, Decay, Optim, Step, after_warmup, optimise
from leeway.training.renderer import Renderer

COUNTERS = ("target_tokens", "processed_tokens", "reference_tokens")


@dataclass(frozen=True)
class Settings:
    """How a trajectory is trained: the same for every objective of a study, but for a learning rate of its own.

    `tuning_tokens` is what the sweep that chose `lr` processed, for the ledger.
    """

    adapter: adapters.LoraSettings
    lr: float
    warmup_steps: int
    weight_decay: float
    loop: Optim
    decay: Decay = "constant"
    tuning_tokens: int = 0


@dataclass
class Trajectory:
    """A model on its way along one objective's schedule; `step` is the last optimiser step taken."""

    alias: str
    objective: Objective
    seed: int
    model: Model
    schedule: Schedule
    settings: Settings
    companions: Companions = field(default_factory=Companions)
    step: int = 0
    counted: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTERS, 0))

    def __post_init__(self) -> None:
        self.reference_hash = digest("start", self.model.hash, str(self.model.head.weight_VD.dtype))
        adapters.attach(self.model, self.settings.adapter, seed=self.seed, control_tokens=self.objective.control_tokens)
        self.init_hash = adapters.init_hash(self.model)
        self.renderer = Renderer(self.objective, self.model.chat, self.seed, self.companions)
        self.optimiser = torch.optim.AdamW(
            adapters.trainable(self.model), lr=self.settings.lr, weight_decay=self.settings.weight_decay
        )

    def train_to(self, mark: Mark, log: Path, tick: Callable[[Step], None]) -> None:
        """Go on to the step of `mark`, one line per step into `log`, on disk before this returns."""
        batches = (self._batch(k) for k in range(self.step + 1, mark.step + 1))
        settings, steps = self.settings, len(self.schedule.steps)
        lr_at = after_warmup(settings.lr, settings.warmup_steps, settings.decay, steps)
        with log.open("a", encoding="utf-8") as lines:
            for done in optimise(self.model, self.objective, batches, self.optimiser, lr_at, self.settings.loop):
                self.step = done.step
                for name in COUNTERS:
                    self.counted[name] += getattr(done, name)
                lines.write(json.dumps(asdict(done), sort_keys=True) + "\n")
                lines.flush()
                tick(done)
            os.fsync(lines.fileno())

    def save(self, folder: Path, mark: Mark) -> dict[str, Any]:
        """Write the checkpoint of `mark` with its ledger line, and return the line."""
        if not all(torch.isfinite(t).all() for t in adapters.state(self.model).values()):
            raise LeewayError(
                f"{self.alias}, step {self.step}: the adapter holds values that are not finite",
                fix="lower optim.lr; the last checkpoint is kept",
            )
        return checkpoints.write(folder, self.model, self.optimiser, self._ledger(mark))

    def restore(self, folder: Path, mark: Mark, *, to_train: bool) -> dict[str, Any]:
        """Take up where `folder` left off (for training, with the optimiser's state); returns its ledger line."""
        line = checkpoints.verified_ledger(folder)
        check_line(line, mark, folder)
        for name, ours in (("init_hash", self.init_hash), ("reference_hash", self.reference_hash)):
            _check_column(line, name, ours, folder)
        checkpoints.restore(folder, self.model, self.optimiser if to_train else None)
        self.step = mark.step
        self.counted = {name: int(line[name]) for name in COUNTERS}
        return line

    def _ledger(self, mark: Mark) -> dict[str, Any]:
        return {
            "objective": self.alias,
            "seed": self.seed,
            "budget": mark.budget,
            "step": mark.step,
            "source_tokens": mark.source_tokens,
            **self.counted,
            "examples": mark.examples,
            "epochs": mark.epochs,
            "data_hash": mark.data_hash,
            "init_hash": self.init_hash,
            "reference_hash": self.reference_hash,
            "lr": self.settings.lr,
            "tuning_tokens": self.settings.tuning_tokens,
        }

    def _batch(self, step: int) -> Batch:
        slots = self.schedule.steps[step - 1]
        return Batch(
            step,
            derive_seed("dropout", self.seed, step),
            tuple(s.example.id for s in slots),
            tuple(tuple(self.renderer.rendered(slot)) for slot in slots),
            tuple(found for slot in slots if (found := tuple(self.renderer.baseline(slot)))),
        )


def check_line(line: dict[str, Any], mark: Mark, folder: Path) -> None:
    """Raise where a finished checkpoint's ledger line is not what this study's data give, naming the column."""
    for name in ("budget", "step", "source_tokens", "examples", "epochs", "data_hash"):
        _check_column(line, name, getattr(mark, name), folder)


def _check_column(line: dict[str, Any], name: str, ours: Any, folder: Path) -> None:
    if line.get(name) != ours:
        raise LeewayError(
            f"{folder}: ledger column {name} is {line.get(name)!r} there and {ours!r} in this study",
            fix="the data, model or settings have changed since: start in another --out",
        )
