"""One piece of a study: the base model, or one trajectory. All it leaves is on disk, so pieces may run anywhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from leeway.data.batches import Mark
from leeway.evals.eval import Eval
from leeway.evals.persona import Persona
from leeway.generation.transformers import TransformersBackend
from leeway.model import adapters
from leeway.model.load import Model, load_model
from leeway.objectives import Objective
from leeway.objectives.objective import PLAIN, Condition
from leeway.study.prepare import Prepared
from leeway.study.store import Store
from leeway.training import checkpoints
from leeway.training.loop import Optim, Step
from leeway.training.trajectory import Settings, Trajectory

BASE = "base"
Kind = Literal["train", "generate", "choose"]
Tell = Callable[[Kind, float, str], None]


@dataclass(frozen=True)
class Who:
    """A checkpoint under one test-time condition: whose rows these are."""

    objective: str
    seed: int
    budget: int
    condition: Condition


@dataclass(frozen=True)
class Piece:
    """What one worker does at a time: the base model (no alias), or the trajectory of an alias and a seed."""

    alias: str
    seed: int


@dataclass
class Work:
    """Carries pieces out; what is finished on disk is never done again."""

    prepared: Prepared
    store: Store
    tell: Tell
    _base: Model | None = field(default=None, repr=False)

    def carry_out(self, piece: Piece) -> None:
        spec = self.prepared.spec
        threads = torch.get_num_threads()
        torch.set_num_threads(spec.threads)
        on_cpu = spec.device == "cpu" or not torch.cuda.is_available()
        torch.use_deterministic_algorithms(True, warn_only=not on_cpu)
        try:
            if piece.alias == BASE:
                self._measure_base()
            else:
                self._carry_trajectory(piece.alias, self.prepared.objectives[piece.alias], piece.seed)
        finally:
            torch.use_deterministic_algorithms(False)
            torch.set_num_threads(threads)

    def base(self) -> Model:
        if self._base is None:
            self._base = self._load()
        return self._base

    def part(self, who: Who, e: Eval) -> Path:
        return self.store.part(who.objective, who.seed, who.budget, e.key, who.condition.name)

    def pending(self, who: Who) -> list[Eval]:
        return [e for e in self.prepared.evals if not self.part(who, e).is_file()]

    def whos(self, piece: Piece) -> list[Who]:
        """Every checkpoint of a piece under its conditions; the base under all that some objective is tested under."""
        if piece.alias == BASE:
            return [Who(BASE, 0, 0, condition) for condition in self.prepared.base_conditions]
        conditions = self.prepared.conditions(piece.alias)
        return [Who(piece.alias, piece.seed, b, c) for b in self.prepared.spec.budgets for c in conditions]

    def _measure_base(self) -> None:
        control = {c: o.control_tokens for o in self.prepared.objectives.values() for c in o.conditions if c != PLAIN}
        for who in self.whos(Piece(BASE, 0)):
            if not self.pending(who):
                continue
            model = self.base()
            if control.get(who.condition):
                model = self._load()
                adapters.attach(model, self._settings().adapter, seed=0, control_tokens=control[who.condition])
            self._measure(model, who, adapter_hash="none")

    def _carry_trajectory(self, alias: str, objective: Objective, seed: int) -> None:
        """Train to every budget that has no checkpoint yet, then measure what is not measured yet."""
        trajectory = self._train_missing(alias, objective, seed)
        marks = {m.budget: m for m in self.prepared.schedules[alias, seed].marks}
        for who in self.whos(Piece(alias, seed)):
            folder, mark = self.store.checkpoint(alias, seed, who.budget), marks[who.budget]
            if self.pending(who):
                trajectory = trajectory or self._trajectory(alias, objective, seed)
                line = trajectory.restore(folder, mark, to_train=False)
                self._measure(trajectory.model, who, line["adapter_hash"])

    def _train_missing(self, alias: str, objective: Objective, seed: int) -> Trajectory | None:
        """Go on from the last checkpoint that can be resumed, and leave one at every budget that lacks it."""
        marks = self.prepared.schedules[alias, seed].marks
        folder = {m.budget: self.store.checkpoint(alias, seed, m.budget) for m in marks}
        missing = [k for k, m in enumerate(marks) if not checkpoints.finished(folder[m.budget])]
        if not missing:
            return None
        trajectory = self._trajectory(alias, objective, seed)
        start = max((k for k in range(missing[0]) if checkpoints.resumable(folder[marks[k].budget])), default=-1)
        if start >= 0:
            trajectory.restore(folder[marks[start].budget], marks[start], to_train=True)
        self.store.trim_steps(alias, seed, trajectory.step)
        for k in range(start + 1, len(marks)):  # to the end, so that the log of its steps is whole
            trajectory.train_to(marks[k], self.store.steps(alias, seed), self._step_teller(trajectory, marks[k]))
            if k in missing:
                trajectory.save(folder[marks[k].budget], marks[k])
            for earlier in range(k):
                checkpoints.forget_optimiser(folder[marks[earlier].budget])
        return trajectory

    def _measure(self, model: Model, who: Who, adapter_hash: str) -> None:
        """Every eval that this checkpoint still lacks, the adapter merged for as long as it takes."""
        backend = TransformersBackend(model, who.condition.prefix, self.prepared.spec.evals.batch)
        identity = {
            "objective": who.objective,
            "seed": who.seed,
            "budget": who.budget,
            "adapter_hash": adapter_hash,
        }
        with adapters.merged(model):
            for e in self.pending(who):
                rows = e.run(backend, self._answer_teller(who, e))
                self.store.write_part(self.part(who, e), identity, rows)

    def _step_teller(self, trajectory: Trajectory, mark: Mark) -> Callable[[Step], None]:
        def tell(done: Step) -> None:
            self.tell(
                "train",
                done.processed_tokens + done.reference_tokens / 2,
                f"{trajectory.alias} s{trajectory.seed} step {done.step}/{mark.step} to {mark.budget:,} tokens "
                f"| loss {done.loss:.4f} | {done.processed_tokens / done.seconds:,.0f} tok/s",
            )

        return tell

    def _answer_teller(self, who: Who, e: Eval) -> Callable[[int], None]:
        at = BASE if who.objective == BASE else f"{who.objective} s{who.seed} at {who.budget:,} tokens"
        under = "" if who.condition == PLAIN else f" under {who.condition.name}"
        answered = 0

        def tell(n: int) -> None:
            nonlocal answered
            answered += n
            self.tell(kind_of(e), n, f"{at}{under} | {e.key} {answered}/{len(e)}")

        return tell

    def _load(self) -> Model:
        spec = self.prepared.spec
        return load_model(spec.model, revision=spec.revision, dtype=spec.dtype, device=spec.device)

    def _trajectory(self, alias: str, objective: Objective, seed: int) -> Trajectory:
        schedule, companions = self.prepared.schedules[alias, seed], self.prepared.companions
        return Trajectory(alias, objective, seed, self._load(), schedule, self._settings(alias), companions)

    def _settings(self, alias: str = BASE) -> Settings:
        adapter, optim = self.prepared.spec.adapter, self.prepared.spec.optim
        return Settings(
            adapters.LoraSettings(adapter.r, adapter.alpha, adapter.dropout, adapter.targets),
            0.0 if alias == BASE else optim.lr_of(alias) or 0.0,
            optim.warmup_steps,
            optim.weight_decay,
            Optim(optim.clip, optim.micro_tokens),
        )


def kind_of(e: Eval) -> Kind:
    return "choose" if isinstance(e, Persona) else "generate"
