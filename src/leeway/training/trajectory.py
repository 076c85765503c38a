"""One training run (model x task x objective x seed) with a checkpoint at every budget, resumable from any of them.
The learning-rate sweep (`lr: tuned`) chooses one rate per objective by accuracy on held-out examples.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter
from torch import Tensor

from leeway.data.chat import Sequence
from leeway.data.stream import AuxiliaryPool, BudgetStop, Schedule
from leeway.errors import LeewayError, NotFiniteError
from leeway.hashing import digest
from leeway.io import readable, verify_checksum, with_checksum, write_json
from leeway.model import adapters
from leeway.model.forward import APART, hidden_apart, hidden_at_measured, layout_of
from leeway.model.fsdp import local
from leeway.model.load import Model
from leeway.model.packing import Layout, LayoutSetting, pack_batch, place
from leeway.model.reference import Needed, Reference, ReferenceCache, ReferenceStats, as_reference, computed_as, freeze
from leeway.model.token_stats import token_logps
from leeway.objectives import Objective
from leeway.training import checkpoints
from leeway.training.batch import Batch, Optim, Renderer, micro_batches, reference_sequences
from leeway.training.checkpoints import WarmStart
from leeway.training.distributed import ALONE, Distributed
from leeway.training.loop import Decay, Step, after_warmup, optimise

OnProgress = Callable[[int, int], None]
COUNTERS = ("target_tokens", "processed_tokens", "reference_tokens")
MATCHED = ("budget", "step", "source_tokens", "examples", "epochs", "data_hash")  # ledger columns given by the data


@dataclass(frozen=True)
class Settings:
    """Training settings, equal for every objective of a study except a tuned learning rate.

    `tuning_tokens`: tokens processed by the sweep that chose `lr`, for the ledger. `references`: cache of reference
    statistics, filled before the first step; None computes the reference live. `layout` is resolved once the model is
    loaded.
    """

    adapter: adapters.AdapterSettings
    lr: float
    warmup_steps: int
    weight_decay: float
    loop: Optim
    decay: Decay = "constant"
    tuning_tokens: int = 0
    references: ReferenceCache | None = None
    layout: LayoutSetting | None = None  # None: the loop's own


@dataclass
class Trajectory:
    """Train a model along one objective's schedule; `step` is the last optimiser step taken.

    It starts from `start` if given, with a fresh optimiser. The objective's reference is the model that the trajectory
    starts from (`reference: start`), or the base model (`base`).
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
        requested = self.settings.layout or self.settings.loop.layout
        layout = layout_of(requested, self.model, self.settings.adapter.kind, sharded=self.ranks.size > 1)
        self.settings = replace(self.settings, loop=replace(self.settings.loop, layout=layout))
        self.reference_hash = self.compared.hash
        if self.objective.needs_reference == "distribution":
            self.model.head = self.compared.head(self.model.head)
        self.init_hash = adapters.init_hash(self.model)
        self.renderer = Renderer(self.objective, self.model.chat, self.seed, self.auxiliary_pool)
        groups = adapters.parameter_groups(self.model, self.settings.lr, self.objective.token_lr)
        self.optimiser = torch.optim.AdamW(groups, weight_decay=self.settings.weight_decay)

    def _begin(self) -> Reference:
        """Put the model into its initial state and return the reference."""
        parts = ("start", self.model.hash, str(self.model.head.weight_VD.dtype))
        adapters.attach(self.model, self.settings.adapter, seed=self.seed, control_tokens=self.objective.control_tokens)
        needed, low_rank = self.objective.needs_reference != "nothing", adapters.is_low_rank(self.model)
        started = self.start is not None and self.reference == "start"
        base = Reference(digest(*parts), freeze(self.model) if needed and not low_rank and not started else None)
        if self.start is None:
            return base
        if (found := WarmStart.of(self.start.folder).hash) != self.start.hash:
            what = f"{self.alias}: {self.start.folder} has changed (adapter_hash {found}, not {self.start.hash})"
            raise LeewayError(what, fix="use another --out")
        if (base_hash := self.start.ledger_line.get("base_hash", self.model.hash)) != self.model.hash:
            what = f"{self.alias}: {self.start.folder} was trained on another base model (hash {base_hash}, "
            what += f"this study's is {self.model.hash})"
            raise LeewayError(what, fix="start from an adapter of this study's model")
        adapters.restore(self.model, self.start.folder)
        if not started:
            return base
        return Reference(digest(*parts, self.start.hash), freeze(self.model) if needed else None)

    def train_to(
        self, mark: BudgetStop, log: Path, tick: Callable[[Step], None], on_reference: OnProgress = lambda *_: None
    ) -> None:
        """Train up to the step of `mark`, appending one line per step to `log`, flushed to disk before returning.

        `on_reference` receives (cached, total) tokens of the reference while it is precomputed.
        """
        batches = (self._batch(k) for k in range(self.step + 1, mark.step + 1))
        settings, steps = self.settings, len(self.schedule.steps)
        self.ranks.shard(self.model, self.optimiser, self.compared)
        self.precompute_reference(on_reference)
        lr_at = after_warmup(settings.lr, settings.warmup_steps, settings.decay, steps)
        with (log if self.ranks.is_main else Path(os.devnull)).open("a", encoding="utf-8") as lines:
            for done in optimise(
                self.model, self.objective, batches, self.optimiser, lr_at, settings.loop, self.compared, self.ranks
            ):
                self.step = done.step
                for name in COUNTERS:
                    self.counted[name] += getattr(done, name)
                lines.write(json.dumps(done.record(), sort_keys=True) + "\n")
                lines.flush()
                tick(done)
            if self.ranks.is_main:
                os.fsync(lines.fileno())

    def precompute_reference(self, on_progress: OnProgress = lambda *_: None) -> int:
        """Cache the reference statistics of all steps to come, and release the reference's own weights.

        Return how many tokens went through the model; 0 if all were cached. On a CPU a sequence's statistics depend on
        that sequence and the reference alone, to the bit: each goes through the model alone, or in rows of a fixed
        shape. On an accelerator the last bits may differ.
        """
        references, reference, loop = self.settings.references, self.compared, self.settings.loop
        if references is None or self.objective.needs_reference == "nothing" or reference.cached is not None:
            return 0
        layout: Layout = "fused" if loop.layout == "fused" else "padded"
        with _power_of_two_threads():
            store = references.of(computed_as(self.model, reference, layout))
        sequences: dict[tuple[tuple[int, ...], int], Sequence] = {}
        for step, s, new in reference_sequences(self._batch(k + 1) for k in range(len(self.schedule.steps))):
            if new:
                reference.spent[step] = reference.spent.get(step, 0) + len(s.ids)
            if step > self.step:
                sequences[s.ids, s.start] = s

        def needed(key: str) -> Needed:
            if self.objective.needs_reference == "distribution":
                return Needed(logps=False, states=True)
            return Needed(logps=True, states=key in references.state_keys)

        with as_reference(self.model, reference), _power_of_two_threads():
            model = _ReferenceModel(self.model, loop, layout)
            spent = store.fill(list(sequences.values()), needed, model, on_progress)
        reference.cached = store
        reference.release()
        return spent

    @property
    def spent(self) -> int:
        """Tokens that went through policy and reference so far."""
        return self.counted["processed_tokens"] + self.counted["reference_tokens"]

    def save(self, folder: Path, mark: BudgetStop) -> dict[str, Any]:
        """Write the checkpoint of `mark` and return its ledger line."""
        if not all(torch.isfinite(local(t)).all() for t in adapters.state(self.model).values()):
            what = f"{self.alias}, step {self.step}: the adapter has non-finite values"
            raise NotFiniteError(what, fix="lower optim.lr; the last checkpoint is kept")
        return checkpoints.write(folder, self.model, self.optimiser, self._ledger(mark), self.ranks)

    def restore(self, folder: Path, mark: BudgetStop, *, to_train: bool) -> dict[str, Any]:
        """Resume from `folder`, with the optimiser's state if `to_train`; return its ledger line."""
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
            **{name: getattr(mark, name) for name in MATCHED},
            **self.counted,
            "init_hash": self.init_hash,
            "reference_hash": self.reference_hash,
            "lr": self.settings.lr,
            "tuning_tokens": self.settings.tuning_tokens,
            "start_tokens": self._start_tokens(),
            "base_hash": self.model.hash,
        }

    def _start_tokens(self) -> int | None:
        """Return the source tokens that the start was trained on: 0 for the base, None if unknown."""
        if self.start is None:
            return 0
        line = self.start.ledger_line
        return int(line["source_tokens"]) + int(line.get("start_tokens") or 0) if line else None

    def _batch(self, step: int) -> Batch:
        return self.renderer.batch(step, self.schedule.steps[step - 1])


@dataclass(frozen=True)
class _ReferenceModel:
    """The model in its current state, which is the reference's."""

    model: Model
    settings: Optim
    layout: Layout

    def stats(self, sequences: Seq[Sequence], needed: Needed) -> Iterator[tuple[Sequence, ReferenceStats]]:
        for group in self._groups(sequences):
            if self.layout == "fused":
                hidden_TD = hidden_apart(self.model, group)
            else:
                batch = pack_batch([[s] for s in group], self.model.device, self.layout)
                hidden_TD = hidden_at_measured(self.model, batch)
            states = torch.split(hidden_TD, [s.measured for s in group])
            for s, hidden_MD in zip(group, states, strict=True):
                logp_M = self.logps(s, hidden_MD) if needed.logps else None
                yield s, ReferenceStats(logp_M, hidden_MD.cpu() if needed.states else None)

    def logps(self, sequence: Sequence, hidden_MD: Tensor) -> Tensor:
        device = self.model.device
        measured_M = torch.tensor(sequence.ids[sequence.start :], device=device)
        return token_logps(hidden_MD.to(device), measured_M, self.model.head).cpu()

    def _groups(self, sequences: Seq[Sequence]) -> list[list[Sequence]]:
        """Return the sequences that share a forward pass."""
        if self.layout == "fused":
            places, rows = place([len(s.ids) for s in sequences], APART)
            groups: list[list[Sequence]] = [[] for _ in range(rows)]
            for s, (row, _) in zip(sequences, places, strict=True):
                groups[row].append(s)
            return groups
        tokens = 1 if self.model.device.type == "cpu" else self.settings.micro_tokens
        return [[s for (s,) in group] for group in micro_batches([[s] for s in sequences], tokens, self.layout)]


@contextmanager
def _power_of_two_threads() -> Iterator[None]:
    """Use the largest power of two of threads that is available: see `hidden_apart`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 << (threads.bit_length() - 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def check_line(line: dict[str, Any], mark: BudgetStop, folder: Path) -> None:
    """Raise LeewayError, naming the column, if a checkpoint's ledger line does not match this study's data."""
    for name in MATCHED:
        _check_column(line, name, getattr(mark, name), folder)


def _check_column(line: dict[str, Any], name: str, ours: Any, folder: Path) -> None:
    if line.get(name) != ours:
        what = f"{folder}: ledger column {name} is {line.get(name)!r}, this study gives {ours!r}"
        raise LeewayError(what, fix="data, model or settings changed since; use another --out")


@dataclass(frozen=True)
class Trial:
    """One learning rate: its held-out accuracy, or None if it diverged (`failed` is the reason)."""

    lr: float
    accuracy: float | None
    trained: int  # tokens of policy and reference
    answered: int  # prompt and answer tokens of the grading
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


def choose_learning_rate(alias: str, trials: tuple[Trial, ...], *, items: int, budget: int) -> LearningRateChoice:
    """Return the most accurate learning rate; of equals the smallest, which drifts least."""
    scored = [t for t in trials if t.accuracy is not None]
    if not scored:
        what = f"optim.tune: {alias} diverged (non-finite loss) at every learning rate "
        what += f"({', '.join(f'{t.lr:g}' for t in trials)}; {trials[0].failed})"
        raise LeewayError(what, fix="give smaller ones in optim.tune.lrs")
    best = min(scored, key=lambda t: (-(t.accuracy or 0.0), t.lr))
    return LearningRateChoice(best.lr, items, budget, trials)


def write_choice(path: Path, choice: LearningRateChoice) -> None:
    write_json(path, with_checksum(choice.to_json()))


def read_choice(path: Path) -> LearningRateChoice:
    with readable(path):
        return TypeAdapter(LearningRateChoice).validate_python(verify_checksum(json.loads(path.read_text("utf-8"))))
