"""How a study's trajectories begin: with which settings, from what, and what their references have said already."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

from leeway.data.batches import Schedule
from leeway.model import adapters
from leeway.model.load import Model
from leeway.model.references import References
from leeway.paths import expand
from leeway.study import referred, tuning
from leeway.study.objective_spec import ObjectiveSpec
from leeway.study.pieces import Piece, schedule_of
from leeway.study.prepare import Prepared
from leeway.study.store import Store
from leeway.training import checkpoints
from leeway.training.batch import Optim
from leeway.training.checkpoints import Start
from leeway.training.ranks import Ranks
from leeway.training.trajectory import Settings, Trajectory


@dataclass
class Beginnings:
    """`base` gives the model as it was loaded: a trajectory begins with that, and has it until the next one does."""

    prepared: Prepared
    store: Store
    base: Callable[[], Model]
    ranks: Ranks

    def trajectory(self, piece: Piece) -> Trajectory:
        """A piece's own, at its learning rate."""
        lr, spent = self.prepared.spec.optim.lr_of(piece.alias), 0
        if lr is None:
            choice = tuning.read(self.store.tuning(piece.alias))
            lr, spent = choice.lr, choice.tokens
        return self.along(piece, schedule_of(self.prepared, piece), self.settings(lr, spent))

    def along(self, piece: Piece, schedule: Schedule, settings: Settings) -> Trajectory:
        """The same objective along other steps."""
        asked = self.prepared.spec.objective(piece.alias)
        return Trajectory(
            piece.alias,
            self.prepared.objectives[piece.alias],
            piece.seed,
            self.base(),
            schedule,
            replace(settings, references=self._kept_for(piece)),
            self.prepared.companions,
            self._start(asked, piece.seed),
            asked.reference,
            self.ranks,
        )

    def trial(self, alias: str, seed: int, schedule: Schedule, references: References | None) -> Trajectory:
        """A trajectory along other steps, from the base: to be timed."""
        settings = replace(self.settings(1e-5), references=references)
        objective, companions = self.prepared.objectives[alias], self.prepared.companions
        return Trajectory(alias, objective, seed, self.base(), schedule, settings, companions)

    def _start(self, asked: ObjectiveSpec, seed: int) -> Start | None:
        """What a trajectory starts from where that is not the base model, by the hash of what is there."""
        if asked.start is None:
            return None
        if asked.start.adapter is not None:
            return Start.of(expand(asked.start.adapter))
        assert asked.start.from_ is not None
        assert asked.start.budget is not None
        folder = self.store.checkpoint(asked.start.from_, seed, asked.start.budget)
        return Start(folder, checkpoints.read_ledger(folder)["adapter_hash"])

    @property
    def adapter(self) -> adapters.AdapterSettings:
        asked = self.prepared.spec.adapter
        return adapters.AdapterSettings(asked.r, asked.alpha, asked.dropout, asked.targets, asked.kind)

    def settings(self, lr: float, tuning_tokens: int = 0) -> Settings:
        optim = self.prepared.spec.optim
        return Settings(
            self.adapter,
            lr,
            optim.warmup_steps,
            optim.weight_decay,
            Optim(optim.clip, optim.micro_tokens),
            optim.schedule,
            tuning_tokens,
            layout=optim.layout,
        )

    @cached_property
    def _references(self) -> References:
        return References(self.store.references)

    @cached_property
    def _states(self) -> dict[referred.Who, frozenset[str]]:
        return referred.states_of(self.prepared)

    def _kept_for(self, piece: Piece) -> References | None:
        """Where what this trajectory's reference says is kept; nowhere where it answers live."""
        if self.prepared.spec.reference == "live":
            return None
        who = referred.compared_with(self.prepared, piece.alias, piece.seed)
        return self._references.stating(self._states.get(who, ()))
