"""One piece of a study, trained or measured. All it leaves is on disk, so pieces may be carried out anywhere.

How a study's trajectories begin: with which settings, from what, and what their references have said already.

vLLM as a study uses it: one server for the checkpoints of a piece, in the memory that training has left.

Where a checkpoint's own answers are kept while a study runs, and under which identity.
"""

from __future__ import annotations

import gc
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from leeway.data.stream import Schedule
from leeway.errors import LeewayError, NotFiniteError
from leeway.evals.eval import Eval
from leeway.generation.backend import Backend
from leeway.generation.cache import AnswerStore, AnswerStoreBackend
from leeway.generation.transformers import TransformersBackend
from leeway.generation.vllm import VllmServer, VllmSettings
from leeway.hashing import digest
from leeway.io import expand
from leeway.model import adapters
from leeway.model.base_model import SharedBaseModel
from leeway.model.load import Model, load_model
from leeway.model.reference_cache import ReferenceCache
from leeway.objectives.objective import PLAIN
from leeway.plan import token_counts
from leeway.study import lr_sweep, progress, sequential_eval
from leeway.study.jobs import BASE, Checkpoint, EvalTarget, Job, eval_targets, schedule_of
from leeway.study.prepare import HeldOut, PairSampling, Prepared, prepare
from leeway.study.progress import Tell
from leeway.study.run_dir import RunDir
from leeway.study.runtime import compute_settings
from leeway.study.spec import ObjectiveSpec, Spec
from leeway.training import checkpoints
from leeway.training.batch import Optim
from leeway.training.checkpoints import WarmStart
from leeway.training.distributed import ALONE, Distributed, Say, run_distributed
from leeway.training.trajectory import Settings, Trajectory, check_line


@dataclass
class TrajectoryFactory:
    """`base` gives the model as it was loaded: a trajectory begins with that, and has it until the next one does."""

    prepared: Prepared
    store: RunDir
    base: Callable[[], Model]
    ranks: Distributed

    def trajectory(self, piece: Job) -> Trajectory:
        """A piece's own, at its learning rate."""
        lr, spent = self.prepared.spec.optim.lr_of(piece.alias), 0
        if lr is None:
            choice = lr_sweep.read(self.store.tuning(piece.alias))
            lr, spent = choice.lr, choice.tokens
        return self.along(piece, schedule_of(self.prepared, piece), self.settings(lr, spent))

    def along(self, piece: Job, schedule: Schedule, settings: Settings) -> Trajectory:
        """The same objective along other steps."""
        asked = self.prepared.spec.objective(piece.alias)
        return Trajectory(
            piece.alias,
            self.prepared.objectives[piece.alias],
            piece.seed,
            self.base(),
            schedule,
            replace(settings, references=self._kept_for(piece)),
            self.prepared.auxiliary_pool,
            self._start(asked, piece.seed),
            asked.reference,
            self.ranks,
        )

    def trial(self, alias: str, seed: int, schedule: Schedule, references: ReferenceCache | None) -> Trajectory:
        """A trajectory along other steps, from the base: to be timed."""
        settings = replace(self.settings(1e-5), references=references)
        objective, auxiliary_pool = self.prepared.objectives[alias], self.prepared.auxiliary_pool
        return Trajectory(alias, objective, seed, self.base(), schedule, settings, auxiliary_pool)

    def _start(self, asked: ObjectiveSpec, seed: int) -> WarmStart | None:
        """What a trajectory starts from where that is not the base model, by the hash of what is there."""
        if asked.start is None:
            return None
        if asked.start.adapter is not None:
            return WarmStart.of(expand(asked.start.adapter))
        assert asked.start.from_ is not None
        assert asked.start.budget is not None
        folder = self.store.checkpoint(asked.start.from_, seed, asked.start.budget)
        return WarmStart(folder, checkpoints.read_ledger(folder)["adapter_hash"])

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
    def _references(self) -> ReferenceCache:
        return ReferenceCache(self.store.references)

    @cached_property
    def _states(self) -> dict[token_counts.Who, frozenset[str]]:
        return token_counts.states_of(self.prepared)

    def _kept_for(self, piece: Job) -> ReferenceCache | None:
        """Where what this trajectory's reference says is kept; nowhere where it answers live."""
        if self.prepared.spec.reference == "live":
            return None
        who = token_counts.compared_with(self.prepared, piece.alias, piece.seed)
        return self._references.stating(self._states.get(who, ()))


@contextmanager
def vllm_server(spec: Spec, asked: Seq[EvalTarget]) -> Iterator[VllmServer]:
    """A server of the study's base model, ended with the context; none is started where nobody is to be asked."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    settings = VllmSettings(spec.model, spec.revision, spec.dtype, spec.adapter.r, args=spec.evals.vllm_args)
    server = VllmServer(settings)
    if not asked:
        yield server
        return
    with server:
        yield server


SHARED = "LEEWAY_ANSWERS"  # a folder that several runs on this machine share
BATCHES = 4  # in a portion: what a kill loses at most


def cached_backend(backend: TransformersBackend, adapter_hash: str, own: Path) -> AnswerStoreBackend:
    """The same answers, asked only once: kept in the run's `own` folder, or in the one that runs share.

    The identity is of all that the bits depend on beside the requests: weights, adapter, what stands before a prompt,
    dtype, decoder, batch, device and its arithmetic, threads, versions.
    """
    model = backend.model
    made_by = digest(
        "transformers",
        model.hash,
        adapter_hash,
        backend.prefix,
        [backend.batch, backend.overlong, backend.fused],
        [str(model.head.weight_VD.dtype), str(model.device), torch.get_num_threads()],
        torch.backends.cpu.get_cpu_capability(),
        [version(p) for p in ("leeway", "torch", "transformers")],
    )
    return AnswerStoreBackend(backend, AnswerStore(folder(own)), made_by, BATCHES * backend.batch)


def folder(own: Path) -> Path:
    shared = os.environ.get(SHARED)
    return expand(shared).absolute() if shared else own


def forget(own: Path) -> None:
    """A finished run has all of its answers in its rows."""
    shutil.rmtree(own, ignore_errors=True)


def unwrap_for_eval(backend: Backend, e: Eval) -> Backend:
    """Return the uncached backend if the eval needs the model itself."""
    return backend.backend if e.needs_model and isinstance(backend, AnswerStoreBackend) else backend


Read = Callable[[Path], dict[str, Any]]


@dataclass
class Worker:
    """Carries pieces out; what is finished on disk is never done again.

    The base model is loaded once, when it is first needed, and lent to whatever is trained or measured with it. A step
    log grows in its place; where `own` is a folder of this worker's, it grows there, and is put into its place whole.
    """

    prepared: Prepared
    store: RunDir
    tell: Tell
    own: Path | None = None
    ranks: Distributed = ALONE
    _base: SharedBaseModel | None = field(default=None, repr=False)

    def carry_out(self, piece: Job) -> None:
        with compute_settings(self.prepared.spec):
            {"base": self._measure, "tune": self._tune, "train": self.train, "measure": self._measure}[piece.kind](
                piece
            )

    def base(self) -> Model:
        """The base model as it was loaded; what was lent before is taken back."""
        if self.ranks.size > 1:
            return self._load()  # a rank trains one trajectory, and ends
        if self._base is None:
            self._base = SharedBaseModel(self._load(), trained=self.prepared.spec.adapter.kind == "full")
        return self._base.checkout()

    def release(self) -> None:
        """Let go of the model: its memory is for others."""
        self._base = None

    def _load(self) -> Model:
        spec = self.prepared.spec
        dtype, device = self.ranks.loading(spec.weights, spec.device)
        return load_model(spec.model, revision=spec.revision, dtype=dtype, device=device)

    @cached_property
    def beginnings(self) -> TrajectoryFactory:
        return TrajectoryFactory(self.prepared, self.store, self.base, self.ranks)

    def part(self, who: EvalTarget, e: Eval) -> Path:
        return self.store.part(who.objective, who.seed, who.budget, e.key, who.condition.name)

    def pending(self, who: EvalTarget) -> list[Eval]:
        return [e for e in self.prepared.evals if not self.store.answered(self.part(who, e))]

    def there(self, checkpoint: Checkpoint) -> bool:
        return checkpoints.finished(self.store.checkpoint(*checkpoint))

    def unfinished(self, piece: Job) -> bool:
        if piece.kind == "tune":
            return not self.store.tuning(piece.alias).is_file()
        if piece.kind == "train":
            return not all(self.there((piece.alias, piece.seed, b)) for b in piece.budgets)
        return any(self.pending(who) for who in eval_targets(self.prepared, piece))

    def written(self, piece: Job) -> bool:
        """Whether all that a piece leaves can be seen, answered or not."""
        if piece.kind in ("tune", "train"):
            return not self.unfinished(piece)
        return all(
            self.part(who, e).is_file() for who in eval_targets(self.prepared, piece) for e in self.prepared.evals
        )

    def ledger(self, piece: Job, read: Read = checkpoints.read_ledger) -> list[dict[str, Any]]:
        """The ledger lines of a finished trajectory, held against what this study's data give."""
        lines = []
        for mark in schedule_of(self.prepared, piece).marks if piece.kind == "train" else ():
            folder = self._folder(piece, mark.budget)
            lines.append(read(folder))
            check_line(lines[-1], mark, folder)
        return lines

    def _folder(self, piece: Job, budget: int) -> Path:
        return self.store.checkpoint(piece.alias, piece.seed, budget)

    def _measure(self, piece: Job) -> None:
        """Ask every checkpoint of a piece what it was not asked yet."""
        asked = [who for who in eval_targets(self.prepared, piece) if self.pending(who)]
        if self.prepared.spec.evals.backend == "vllm":
            self._ask_server(asked)
            return
        for who in asked:
            model, adapter_hash = self._as_checkpoint(who)
            backend = TransformersBackend(
                model, who.condition.prefix, self.prepared.spec.evals.batch, overlong="failure"
            )
            with adapters.merged(model):
                self._ask(cached_backend(backend, adapter_hash, self.store.answers), who, adapter_hash)

    def _ask_server(self, asked: list[EvalTarget]) -> None:
        """One server for all of them, in the memory that the model had."""
        self.release()
        with vllm_server(self.prepared.spec, asked) as server:
            for who in asked:
                if who.objective == BASE:
                    self._ask(server.base(who.condition.prefix), who, "none")
                    continue
                folder = self.store.checkpoint(who.objective, who.seed, who.budget)
                with server.adapter(folder, who.condition.prefix) as backend:
                    self._ask(backend, who, checkpoints.verified_ledger(folder)["adapter_hash"])

    def _as_checkpoint(self, who: EvalTarget) -> tuple[Model, str]:
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

    def train(self, piece: Job) -> None:
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
            run_distributed(spec.processes, spec.device, _train, given, lambda e: self.tell(*e))
            return
        trajectory = self.beginnings.trajectory(piece)
        start = max((k for k in range(missing[0]) if checkpoints.resumable(folder[marks[k].budget])), default=-1)
        if start >= 0:
            trajectory.restore(folder[marks[start].budget], marks[start], to_train=True)
        log = self.store.steps(piece.log)
        if self.ranks.leads:
            log = self.store.log_of_steps(piece.log, trajectory.step, self.own)
        for k in range(start + 1, len(marks)):  # to the end, so that the log of its steps is whole
            tick = progress.of_steps(self.tell, trajectory, marks[k])
            trajectory.train_to(marks[k], log, tick, progress.of_asking(self.tell, trajectory))
            if self.ranks.leads:
                self.store.put_steps(log)
            if k in missing:
                trajectory.save(folder[marks[k].budget], marks[k])
            for earlier in range(k):
                checkpoints.forget_optimiser(folder[marks[earlier].budget])

    def _tune(self, piece: Job) -> None:
        """Train with every rate of the sweep, and keep the one that answers the held-out examples best."""
        tune, held_out = self.prepared.spec.optim.tune, self.prepared.tuning
        assert held_out is not None
        trials = tuple(self._trial(piece, lr, held_out) for lr in tune.lrs)
        choice = lr_sweep.choose(piece.alias, trials, items=tune.items, budget=tune.budget)
        lr_sweep.write(self.store.tuning(piece.alias), choice)

    def _trial(self, piece: Job, lr: float, held_out: HeldOut) -> lr_sweep.Trial:
        """One rate of the sweep; one that leaves the numbers has no accuracy, and its tokens count all the same."""
        schedule = held_out.schedules[piece.alias]
        trajectory = self.beginnings.along(piece, schedule, self.beginnings.settings(lr))
        log = self.store.log_of_steps(f"tune-{piece.alias}-{lr:g}", 0, self.own)
        try:
            tick = progress.of_steps(self.tell, trajectory, schedule.marks[0])
            trajectory.train_to(schedule.marks[0], log, tick, progress.of_asking(self.tell, trajectory))
        except NotFiniteError as error:
            return lr_sweep.Trial(lr, None, trajectory.spent, 0, error.what)
        finally:
            self.store.put_steps(log)
        prefix, test = trajectory.objective.conditions[0].prefix, held_out.test
        backend = TransformersBackend(trajectory.model, prefix, self.prepared.spec.evals.batch)
        with adapters.merged(trajectory.model):
            rows = test.run(backend, progress.of_answers(self.tell, f"{piece.alias}, rate {lr:g}", test))
        identity = {"objective": piece.alias, "seed": piece.seed, "budget": schedule.marks[0].budget}
        rows_path = self.store.tuning(piece.alias).with_name(f"{piece.alias}-{lr:g}.parquet")
        self.store.write_part(rows_path, {**identity, "adapter_hash": ""}, rows)
        asked = sum(len(backend.chat.prompt_ids([{"role": "user", "content": r.prompt}])) for r in rows)
        answered = asked + sum(r.new_tokens for r in rows)
        return lr_sweep.Trial(lr, sum(r.score for r in rows) / len(rows), trajectory.spent, answered)

    def _ask(self, backend: Backend, who: EvalTarget, adapter_hash: str) -> None:
        identity = {
            "objective": who.objective,
            "seed": who.seed,
            "budget": who.budget,
            "adapter_hash": adapter_hash,
        }
        stopping = (
            {} if who.objective == BASE else sequential_eval.sequential_axes(self.prepared.spec, self.prepared.evals)
        )
        pending = self.pending(who)
        for e in (e for e in pending if e.name not in stopping):
            rows = e.run(unwrap_for_eval(backend, e), progress.of_answers(self.tell, progress.said(who), e))
            self.store.write_part(self.part(who, e), identity, rows)
        for axis in dict.fromkeys(e.name for e in pending if e.name in stopping):
            base = replace(who, objective=BASE, seed=0, budget=0)
            of_base = [self.part(base, e) for e in stopping[axis]]
            asked = sequential_eval.SequentialEvaluator.of(
                self.prepared.spec, axis, stopping[axis], self.store, of_base
            )
            found = asked.ask(backend, lambda e: progress.of_answers(self.tell, progress.said(who), e))
            for e in (e for e in pending if e.name == axis):
                self.store.write_part(self.part(who, e), identity, found[e.key])


def _train(ranks: Distributed, say: Say, raw_spec: dict[str, Any], folder: Path, piece: Job, own: Path | None) -> None:
    """What each rank of a trajectory does."""
    spec, store = Spec.model_validate(raw_spec), RunDir(folder)
    kept = store.kept if own is None else store.kept_on(platform.node())
    prepared = prepare(spec, PairSampling(store.pairs, kept=kept))
    with compute_settings(spec):
        Worker(prepared, store, lambda *event: say(event), own, ranks).train(piece)
