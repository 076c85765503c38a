"""One piece of a study, trained or measured. All it leaves is on disk, so pieces may be carried out anywhere."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from leeway.errors import LeewayError, NotFiniteError
from leeway.evals.eval import Eval
from leeway.generation.backend import Backend
from leeway.generation.transformers import TransformersBackend
from leeway.model import adapters
from leeway.model.base import Base
from leeway.model.load import Model, load_model
from leeway.objectives.objective import PLAIN
from leeway.study import keeping, looks, telling, tuning
from leeway.study.beginnings import Beginnings
from leeway.study.computing import computing
from leeway.study.drawing import Drawing
from leeway.study.launch import Say, in_ranks
from leeway.study.pieces import BASE, Checkpoint, Piece, Who, schedule_of, whos
from leeway.study.prepare import HeldOut, Prepared, prepare
from leeway.study.serving import serving
from leeway.study.spec import Spec
from leeway.study.store import Store
from leeway.study.telling import Tell
from leeway.training import checkpoints
from leeway.training.ranks import ALONE, Ranks
from leeway.training.trajectory import check_line

Read = Callable[[Path], dict[str, Any]]


@dataclass
class Work:
    """Carries pieces out; what is finished on disk is never done again.

    The base model is loaded once, when it is first needed, and lent to whatever is trained or measured with it. A step
    log grows in its place; where `own` is a folder of this worker's, it grows there, and is put into its place whole.
    """

    prepared: Prepared
    store: Store
    tell: Tell
    own: Path | None = None
    ranks: Ranks = ALONE
    _base: Base | None = field(default=None, repr=False)

    def carry_out(self, piece: Piece) -> None:
        with computing(self.prepared.spec):
            {"base": self._measure, "tune": self._tune, "train": self.train, "measure": self._measure}[piece.kind](
                piece
            )

    def base(self) -> Model:
        """The base model as it was loaded; what was lent before is taken back."""
        if self.ranks.size > 1:
            return self._load()  # a rank trains one trajectory, and ends
        if self._base is None:
            self._base = Base(self._load(), trained=self.prepared.spec.adapter.kind == "full")
        return self._base.lend()

    def release(self) -> None:
        """Let go of the model: its memory is for others."""
        self._base = None

    def _load(self) -> Model:
        spec = self.prepared.spec
        dtype, device = self.ranks.loading(spec.weights, spec.device)
        return load_model(spec.model, revision=spec.revision, dtype=dtype, device=device)

    @cached_property
    def beginnings(self) -> Beginnings:
        return Beginnings(self.prepared, self.store, self.base, self.ranks)

    def part(self, who: Who, e: Eval) -> Path:
        return self.store.part(who.objective, who.seed, who.budget, e.key, who.condition.name)

    def pending(self, who: Who) -> list[Eval]:
        return [e for e in self.prepared.evals if not self.store.answered(self.part(who, e))]

    def there(self, checkpoint: Checkpoint) -> bool:
        return checkpoints.finished(self.store.checkpoint(*checkpoint))

    def unfinished(self, piece: Piece) -> bool:
        if piece.kind == "tune":
            return not self.store.tuning(piece.alias).is_file()
        if piece.kind == "train":
            return not all(self.there((piece.alias, piece.seed, b)) for b in piece.budgets)
        return any(self.pending(who) for who in whos(self.prepared, piece))

    def written(self, piece: Piece) -> bool:
        """Whether all that a piece leaves can be seen, answered or not."""
        if piece.kind in ("tune", "train"):
            return not self.unfinished(piece)
        return all(self.part(who, e).is_file() for who in whos(self.prepared, piece) for e in self.prepared.evals)

    def ledger(self, piece: Piece, read: Read = checkpoints.read_ledger) -> list[dict[str, Any]]:
        """The ledger lines of a finished trajectory, held against what this study's data give."""
        lines = []
        for mark in schedule_of(self.prepared, piece).marks if piece.kind == "train" else ():
            folder = self._folder(piece, mark.budget)
            lines.append(read(folder))
            check_line(lines[-1], mark, folder)
        return lines

    def _folder(self, piece: Piece, budget: int) -> Path:
        return self.store.checkpoint(piece.alias, piece.seed, budget)

    def _measure(self, piece: Piece) -> None:
        """Ask every checkpoint of a piece what it was not asked yet."""
        asked = [who for who in whos(self.prepared, piece) if self.pending(who)]
        if self.prepared.spec.evals.backend == "vllm":
            self._ask_server(asked)
            return
        for who in asked:
            model, adapter_hash = self._as_checkpoint(who)
            backend = TransformersBackend(
                model, who.condition.prefix, self.prepared.spec.evals.batch, overlong="failure"
            )
            with adapters.merged(model):
                self._ask(keeping.kept(backend, adapter_hash, self.store.answers), who, adapter_hash)

    def _ask_server(self, asked: list[Who]) -> None:
        """One server for all of them, in the memory that the model had."""
        self.release()
        with serving(self.prepared.spec, asked) as server:
            for who in asked:
                if who.objective == BASE:
                    self._ask(server.base(who.condition.prefix), who, "none")
                    continue
                folder = self.store.checkpoint(who.objective, who.seed, who.budget)
                with server.adapter(folder, who.condition.prefix) as backend:
                    self._ask(backend, who, checkpoints.verified_ledger(folder)["adapter_hash"])

    def _as_checkpoint(self, who: Who) -> tuple[Model, str]:
        """The model as a checkpoint left it, and the hash of its adapter; the base under a control token has the token.

        Raises LeewayError where the checkpoint was trained on another base.
        """
        model = self.base()
        if who.objective == BASE:
            control = {c: o.control_tokens for o in self.prepared.objectives.values() for c in o.conditions}
            if who.condition != PLAIN and control.get(who.condition):
                adapters.attach(model, self.beginnings.adapter, seed=0, control_tokens=control[who.condition])
            return model, "none"
        folder = self.store.checkpoint(who.objective, who.seed, who.budget)
        line = checkpoints.verified_ledger(folder)
        if line["base_hash"] != model.hash:
            raise LeewayError(
                f"{folder}: ledger column base_hash is {line['base_hash']!r} there and {model.hash!r} in this study",
                fix="the model has changed since: start in another --out",
            )
        control_tokens = self.prepared.objectives[who.objective].control_tokens
        adapters.attach(model, self.beginnings.adapter, seed=who.seed, control_tokens=control_tokens)
        adapters.restore(model, folder)
        model.lm.eval()
        return model, line["adapter_hash"]

    def train(self, piece: Piece) -> None:
        """Go on from the last checkpoint that can be resumed, and leave one at every budget that lacks it.

        Under `processes` this is one of the ranks, or who starts them and has nothing in memory afterwards.
        """
        marks = schedule_of(self.prepared, piece).marks
        folder = {m.budget: self._folder(piece, m.budget) for m in marks}
        missing = [k for k, m in enumerate(marks) if not checkpoints.finished(folder[m.budget])]
        if not missing:
            return
        spec = self.prepared.spec
        if spec.processes > self.ranks.size:
            self.release()  # its memory is the ranks'
            plain = spec.model_dump(mode="json", by_alias=True)
            given = (plain, self.store.folder, piece, self.own)
            in_ranks(spec.processes, spec.device, _train, given, lambda e: self.tell(*e))
            return
        trajectory = self.beginnings.trajectory(piece)
        start = max((k for k in range(missing[0]) if checkpoints.resumable(folder[marks[k].budget])), default=-1)
        if start >= 0:
            trajectory.restore(folder[marks[start].budget], marks[start], to_train=True)
        log = self.store.steps(piece.log)
        if self.ranks.leads:
            log = self.store.log_of_steps(piece.log, trajectory.step, self.own)
        for k in range(start + 1, len(marks)):  # to the end, so that the log of its steps is whole
            tick = telling.of_steps(self.tell, trajectory, marks[k])
            trajectory.train_to(marks[k], log, tick, telling.of_asking(self.tell, trajectory))
            if self.ranks.leads:
                self.store.put_steps(log)
            if k in missing:
                trajectory.save(folder[marks[k].budget], marks[k])
            for earlier in range(k):
                checkpoints.forget_optimiser(folder[marks[earlier].budget])

    def _tune(self, piece: Piece) -> None:
        """Train with every rate of the sweep, and keep the one that answers the held-out examples best."""
        tune, held_out = self.prepared.spec.optim.tune, self.prepared.tuning
        assert held_out is not None
        trials = tuple(self._trial(piece, lr, held_out) for lr in tune.lrs)
        choice = tuning.choose(piece.alias, trials, items=tune.items, budget=tune.budget)
        tuning.write(self.store.tuning(piece.alias), choice)

    def _trial(self, piece: Piece, lr: float, held_out: HeldOut) -> tuning.Trial:
        """One rate of the sweep; one that leaves the numbers has no accuracy, and its tokens count all the same."""
        schedule = held_out.schedules[piece.alias]
        trajectory = self.beginnings.along(piece, schedule, self.beginnings.settings(lr))
        log = self.store.log_of_steps(f"tune-{piece.alias}-{lr:g}", 0, self.own)
        try:
            tick = telling.of_steps(self.tell, trajectory, schedule.marks[0])
            trajectory.train_to(schedule.marks[0], log, tick, telling.of_asking(self.tell, trajectory))
        except NotFiniteError as error:
            return tuning.Trial(lr, None, trajectory.spent, 0, error.what)
        finally:
            self.store.put_steps(log)
        prefix, test = trajectory.objective.conditions[0].prefix, held_out.test
        backend = TransformersBackend(trajectory.model, prefix, self.prepared.spec.evals.batch)
        with adapters.merged(trajectory.model):
            rows = test.run(backend, telling.of_answers(self.tell, f"{piece.alias}, rate {lr:g}", test))
        identity = {"objective": piece.alias, "seed": piece.seed, "budget": schedule.marks[0].budget}
        rows_path = self.store.tuning(piece.alias).with_name(f"{piece.alias}-{lr:g}.parquet")
        self.store.write_part(rows_path, {**identity, "adapter_hash": ""}, rows)
        asked = sum(len(backend.chat.prompt_ids([{"role": "user", "content": r.prompt}])) for r in rows)
        answered = asked + sum(r.new_tokens for r in rows)
        return tuning.Trial(lr, sum(r.score for r in rows) / len(rows), trajectory.spent, answered)

    def _ask(self, backend: Backend, who: Who, adapter_hash: str) -> None:
        identity = {
            "objective": who.objective,
            "seed": who.seed,
            "budget": who.budget,
            "adapter_hash": adapter_hash,
        }
        stopping = {} if who.objective == BASE else looks.sequential_axes(self.prepared.spec, self.prepared.evals)
        pending = self.pending(who)
        for e in (e for e in pending if e.name not in stopping):
            rows = e.run(keeping.asked_of(backend, e), telling.of_answers(self.tell, telling.said(who), e))
            self.store.write_part(self.part(who, e), identity, rows)
        for axis in dict.fromkeys(e.name for e in pending if e.name in stopping):
            base = replace(who, objective=BASE, seed=0, budget=0)
            of_base = [self.part(base, e) for e in stopping[axis]]
            asked = looks.Looks.of(self.prepared.spec, axis, stopping[axis], self.store, of_base)
            found = asked.ask(backend, lambda e: telling.of_answers(self.tell, telling.said(who), e))
            for e in (e for e in pending if e.name == axis):
                self.store.write_part(self.part(who, e), identity, found[e.key])


def _train(ranks: Ranks, say: Say, raw_spec: dict[str, Any], folder: Path, piece: Piece, own: Path | None) -> None:
    """What each rank of a trajectory does."""
    spec, store = Spec.model_validate(raw_spec), Store(folder)
    kept = store.kept if own is None else store.kept_on(platform.node())
    prepared = prepare(spec, Drawing(store.pairs, kept=kept))
    with computing(spec):
        Work(prepared, store, lambda *event: say(event), own, ranks).train(piece)
