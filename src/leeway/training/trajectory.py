"""One training run (model x task x objective x seed) that stops at every budget and goes on from any checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from leeway.data.stream import AuxiliaryPool, BudgetStop, Schedule
from leeway.errors import LeewayError, NotFiniteError
from leeway.hashing import digest
from leeway.model import adapters
from leeway.model.forward import layout_of
from leeway.model.fsdp import local
from leeway.model.load import Model
from leeway.model.packing import Asked
from leeway.model.reference import Reference, freeze
from leeway.model.reference_cache import ReferenceCache
from leeway.objectives import Objective
from leeway.training import checkpoints
from leeway.training.batch import Batch, Optim, Renderer
from leeway.training.checkpoints import WarmStart
from leeway.training.distributed import ALONE, Distributed
from leeway.training.loop import Decay, Step, after_warmup, optimise
from leeway.training.precompute import Tell, precompute_reference

COUNTERS = ("target_tokens", "processed_tokens", "reference_tokens")


@dataclass(frozen=True)
class Settings:
    """How a trajectory is trained: the same for every objective of a study, but for a learning rate of its own.

    `tuning_tokens` is what the sweep that chose `lr` processed, for the ledger. `references` is where what a reference
    says is kept, asked about everything before the first step; without it a reference answers beside the policy.
    `layout` is settled once there is a model.
    """

    adapter: adapters.AdapterSettings
    lr: float
    warmup_steps: int
    weight_decay: float
    loop: Optim
    decay: Decay = "constant"
    tuning_tokens: int = 0
    references: ReferenceCache | None = None
    layout: Asked | None = None  # none: the loop's own


@dataclass
class Trajectory:
    """A model on its way along one objective's schedule; `step` is the last optimiser step taken.

    It begins with what `start` holds, where one is given, and with a fresh optimiser. Its objective is compared with
    the model that it begins as (`reference: start`), or with the base model (`base`).
    """

    alias: str
    objective: Objective
    seed: int
    model: Model
    schedule: Schedule
    settings: Settings
    auxiliary_pool: AuxiliaryPool = field(default_factory=AuxiliaryPool)
    start: WarmStart | None = None
    reference: Literal["start", "base"] = "start"
    ranks: Distributed = ALONE
    step: int = 0
    counted: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTERS, 0))

    def __post_init__(self) -> None:
        self.compared = self._begin()
        asked = self.settings.layout or self.settings.loop.layout
        layout = layout_of(asked, self.model, self.settings.adapter.kind, sharded=self.ranks.size > 1)
        self.settings = replace(self.settings, loop=replace(self.settings.loop, layout=layout))
        self.reference_hash = self.compared.hash
        if self.objective.needs_reference == "distribution":
            self.model.head = self.compared.head(self.model.head)
        self.init_hash = adapters.init_hash(self.model)
        self.renderer = Renderer(self.objective, self.model.chat, self.seed, self.auxiliary_pool)
        self.optimiser = torch.optim.AdamW(
            adapters.trainable(self.model), lr=self.settings.lr, weight_decay=self.settings.weight_decay
        )

    def _begin(self) -> Reference:
        """Put the model where the trajectory begins, and say what it is compared with."""
        parts = ("start", self.model.hash, str(self.model.head.weight_VD.dtype))
        adapters.attach(self.model, self.settings.adapter, seed=self.seed, control_tokens=self.objective.control_tokens)
        asked, beside = self.objective.needs_reference != "nothing", adapters.is_low_rank(self.model)
        started = self.start is not None and self.reference == "start"
        base = Reference(digest(*parts), freeze(self.model) if asked and not beside and not started else None)
        if self.start is None:
            return base
        if (found := WarmStart.of(self.start.folder).hash) != self.start.hash:
            raise LeewayError(
                f"{self.alias}: {self.start.folder} is not what it starts from (adapter_hash {found}, "
                f"not {self.start.hash})",
                fix="start in another --out",
            )
        if (theirs := self.start.told.get("base_hash", self.model.hash)) != self.model.hash:
            raise LeewayError(
                f"{self.alias}: {self.start.folder} was trained on another base model (hash {theirs}, "
                f"this study's is {self.model.hash})",
                fix="start from an adapter of this study's model",
            )
        adapters.restore(self.model, self.start.folder)
        if not started:
            return base
        return Reference(digest(*parts, self.start.hash), freeze(self.model) if asked else None)

    def train_to(
        self, mark: BudgetStop, log: Path, tick: Callable[[Step], None], asking: Tell = lambda *_: None
    ) -> None:
        """Go on to the step of `mark`, one line per step into `log`, on disk before this returns.

        `asking` hears how many of the reference's tokens are had, and of how many, where it is asked beforehand.
        """
        batches = (self._batch(k) for k in range(self.step + 1, mark.step + 1))
        settings, steps = self.settings, len(self.schedule.steps)
        self.ranks.shard(self.model, self.optimiser, self.compared)
        self.precompute_reference(asking)
        lr_at = after_warmup(settings.lr, settings.warmup_steps, settings.decay, steps)
        with (log if self.ranks.leads else Path(os.devnull)).open("a", encoding="utf-8") as lines:
            for done in optimise(
                self.model, self.objective, batches, self.optimiser, lr_at, settings.loop, self.compared, self.ranks
            ):
                self.step = done.step
                for name in COUNTERS:
                    self.counted[name] += getattr(done, name)
                lines.write(json.dumps(asdict(done), sort_keys=True) + "\n")
                lines.flush()
                tick(done)
            if self.ranks.leads:
                os.fsync(lines.fileno())

    def precompute_reference(self, asking: Tell = lambda *_: None) -> int:
        """Have all that is still to be asked of the reference kept; how many tokens went through it for that."""
        references = self.settings.references
        if references is None or self.objective.needs_reference == "nothing" or self.compared.kept is not None:
            return 0
        batches = (self._batch(k + 1) for k in range(len(self.schedule.steps)))
        loop, taken = self.settings.loop, self.step
        return precompute_reference(
            self.model, self.objective, batches, loop, self.compared, references, taken=taken, tell=asking
        )

    @property
    def spent(self) -> int:
        """Tokens that went through policy and reference so far."""
        return self.counted["processed_tokens"] + self.counted["reference_tokens"]

    def save(self, folder: Path, mark: BudgetStop) -> dict[str, Any]:
        """Write the checkpoint of `mark` with its ledger line, and return the line."""
        if not all(torch.isfinite(local(t)).all() for t in adapters.state(self.model).values()):
            raise NotFiniteError(
                f"{self.alias}, step {self.step}: the adapter holds values that are not finite",
                fix="lower optim.lr; the last checkpoint is kept",
            )
        return checkpoints.write(folder, self.model, self.optimiser, self._ledger(mark), self.ranks)

    def restore(self, folder: Path, mark: BudgetStop, *, to_train: bool) -> dict[str, Any]:
        """Take up where `folder` left off (for training, with the optimiser's state); returns its ledger line."""
        line = checkpoints.verified_ledger(folder)
        check_line(line, mark, folder)
        for name, ours in (("init_hash", self.init_hash), ("reference_hash", self.reference_hash)):
            _check_column(line, name, ours, folder)
        checkpoints.restore(folder, self.model, self.optimiser if to_train else None)
        self.step = mark.step
        self.counted = {name: int(line[name]) for name in COUNTERS}
        return line

    def _ledger(self, mark: BudgetStop) -> dict[str, Any]:
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
            "start_tokens": self._start_tokens(),
            "base_hash": self.model.hash,
        }

    def _start_tokens(self) -> int | None:
        """Source tokens that the start had been trained on: none of the base's, unknown (None) of a stranger's."""
        if self.start is None:
            return 0
        told = self.start.told
        return int(told["source_tokens"]) + int(told.get("start_tokens") or 0) if told else None

    def _batch(self, step: int) -> Batch:
        return self.renderer.batch(step, self.schedule.steps[step - 1])


def check_line(line: dict[str, Any], mark: BudgetStop, folder: Path) -> None:
    """Raise where a finished checkpoint's ledger line is not what this study's data give, naming the column."""
    for name in ("budget", "step", "source_tokens", "examples", "epochs", "data_hash"):
        _check_column(line, name, getattr(mark, name), folder)


def _check_column(line: dict[str, Any], name: str, ours: Any, folder: Path) -> None:
    if line.get(name) != ours:
        raise LeewayError(
            f"{folder}: ledger column {name} is {line.get(name)!r} there and {ours!r} in this study",
            fix="the data, model or settings have changed since: start in another --out",
        )
