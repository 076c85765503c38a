"""Run the jobs of a study. Every result is on disk, so jobs can run in any process and resume after a kill."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from leeway.cache import RecordStore
from leeway.data.stream import Schedule
from leeway.errors import LeewayError, NotFiniteError
from leeway.evals.eval import Eval
from leeway.generation.backend import Backend
from leeway.generation.cache import BatchCachedBackend
from leeway.generation.transformers import TransformersBackend
from leeway.generation.vllm import VllmServer, VllmSettings
from leeway.hashing import digest
from leeway.io import expand, write_json
from leeway.model import adapters
from leeway.model.adapters import is_low_rank
from leeway.model.forward import layout_of
from leeway.model.load import Model, SharedBaseModel, bits, load_model
from leeway.model.reference import ReferenceCache
from leeway.objectives.objective import PLAIN
from leeway.plan import token_counts
from leeway.probe.pair import ModelPair
from leeway.study import progress, sequential_eval
from leeway.study.controls import BASE_AGAIN
from leeway.study.jobs import BASE, Checkpoint, EvalTarget, Job, eval_targets, schedule_of
from leeway.study.objective_spec import ObjectiveSpec
from leeway.study.prepare import HeldOut, PairSampling, Prepared, prepare
from leeway.study.probing import Probing
from leeway.study.progress import OnProgress
from leeway.study.run_dir import MARK, RunDir
from leeway.study.runtime import compute_settings
from leeway.study.spec import Spec
from leeway.training import checkpoints, learning
from leeway.training.batch import Optim
from leeway.training.checkpoints import WarmStart
from leeway.training.distributed import ALONE, Distributed, Send, run_distributed
from leeway.training.trajectory import (
    Settings,
    Trajectory,
    Trial,
    check_line,
    choose_learning_rate,
    read_choice,
    write_choice,
)

ReadLedger = Callable[[Path], dict[str, Any]]
BATCHES = 4  # generation batches per cached batch of requests: the most that a kill loses


@dataclass
class Worker:
    """Runs jobs, one after another, and skips what is complete on disk.

    The base model is loaded once, at the first job that needs it. With a `scratch` folder, step logs grow there and
    are published whole; without one they grow in place.
    """

    prepared: Prepared
    store: RunDir
    on_progress: OnProgress = lambda *_: None
    scratch: Path | None = None
    ranks: Distributed = ALONE
    _base: SharedBaseModel | None = field(default=None, repr=False)
    _learning: dict[tuple[tuple[str, ...], str], learning.BaseStats] = field(default_factory=dict, repr=False)

    def run_job(self, job: Job) -> None:
        own = {"tune": self._tune, "train": self.train, "learning": self._check_learning, "check": self._check}
        own["probe"] = self._probe
        run = own.get(job.kind, self._measure)
        with compute_settings(self.prepared.spec):
            run(job)

    def is_complete(self, job: Job) -> bool:
        """Return whether a job has no work left; retryable failed answers count as work left."""
        if job.kind == "tune":
            return self.store.tuning(job.alias).is_file()
        if job.kind == "check":
            return self.store.check(job.alias).is_file()
        if job.kind == "train":
            return all(self.has_checkpoint((job.alias, job.seed, b)) for b in job.budgets)
        if job.kind == "learning":
            return self.store.has_learning(self._learning_path(job), self.prepared.learning.hash)
        if job.kind == "probe":
            return self.probing.is_complete(job)
        return not any(self.pending(target) for target in eval_targets(self.prepared, job))

    def has_results(self, job: Job) -> bool:
        """Return whether all files of a job are on disk, with failed answers or without."""
        if job.kind in ("tune", "train", "learning", "check", "probe"):
            return self.is_complete(job)
        targets = eval_targets(self.prepared, job)
        return all(self.part(t, e).is_file() for t in targets for e in self.prepared.evals_of(t.condition, t.objective))

    def has_checkpoint(self, checkpoint: Checkpoint) -> bool:
        return checkpoints.is_complete(self.store.checkpoint(*checkpoint))

    def part(self, target: EvalTarget, e: Eval) -> Path:
        return self.store.part(target.objective, target.seed, target.budget, e.key, target.condition.name)

    def pending(self, target: EvalTarget) -> list[Eval]:
        evals = self.prepared.evals_of(target.condition, target.objective)
        return [e for e in evals if not self.store.is_complete(self.part(target, e))]

    def ledger_lines(self, job: Job, read: ReadLedger = checkpoints.read_ledger) -> list[dict[str, Any]]:
        """Return the ledger lines of a complete trajectory; raises LeewayError if one contradicts the schedule."""
        lines = []
        for stop in schedule_of(self.prepared, job).stops if job.kind == "train" else ():
            folder = self.store.checkpoint(job.alias, job.seed, stop.budget)
            lines.append(read(folder))
            check_line(lines[-1], stop, folder)
        return lines

    def base(self) -> Model:
        """Return the base model with its original weights; this invalidates the previous checkout."""
        if self.ranks.size > 1:
            return self._load()  # a rank trains one trajectory, and ends
        if self._base is None:
            self._base = SharedBaseModel(self._load(), trained=self.prepared.spec.adapter.kind == "full")
        return self._base.checkout()

    def _load(self) -> Model:
        spec = self.prepared.spec
        dtype, device = self.ranks.loading(spec.weight_dtype, spec.device)
        return load_model(spec.model, revision=spec.revision, dtype=dtype, device=device)

    def release(self) -> None:
        """Free the base model's memory."""
        self._base = None

    def train(self, job: Job) -> None:
        """Resume from the last usable checkpoint and write every missing one.

        Under `processes` this is one of the ranks, or the process that starts them.
        """
        stops = schedule_of(self.prepared, job).stops
        folder = {m.budget: self.store.checkpoint(job.alias, job.seed, m.budget) for m in stops}
        missing = [k for k, m in enumerate(stops) if not checkpoints.is_complete(folder[m.budget])]
        if not missing:
            return
        spec = self.prepared.spec
        if spec.processes > self.ranks.size:
            self.release()  # the ranks need its memory
            arguments = (spec.model_dump(mode="json", by_alias=True), self.store.folder, job, self.scratch)
            run_distributed(spec.processes, spec.device, _train_rank, arguments, lambda e: self.on_progress(*e))
            return
        trajectory = self.trajectory(job)
        resumable = [k for k in range(missing[0]) if (folder[stops[k].budget] / checkpoints.OPTIMISER).is_file()]
        start = max(resumable, default=-1)
        if start >= 0:
            trajectory.restore(folder[stops[start].budget], stops[start], to_train=True)
        log = self.store.steps(job.log_name)
        if self.ranks.is_main:
            log = self.store.truncate_steps(job.log_name, trajectory.step, self.scratch)
        for k in range(start + 1, len(stops)):  # to the end, so that the step log is complete
            trajectory.train_to(stops[k], log, *progress.of_training(self.on_progress, trajectory, stops[k]))
            if self.ranks.is_main:
                self.store.publish_steps(log)
            if k in missing:
                trajectory.save(folder[stops[k].budget], stops[k])
            for earlier in range(k):
                (folder[stops[earlier].budget] / checkpoints.OPTIMISER).unlink(missing_ok=True)

    def _tune(self, job: Job) -> None:
        """Train with every learning rate of the sweep and keep the best on the held-out examples."""
        tune, held_out = self.prepared.spec.optim.tune, self.prepared.tuning
        assert held_out is not None
        trials = tuple(self._trial(job, lr, held_out) for lr in tune.lrs)
        choice = choose_learning_rate(job.alias, trials, items=tune.items, budget=tune.budget)
        write_choice(self.store.tuning(job.alias), choice)

    def _trial(self, job: Job, lr: float, held_out: HeldOut) -> Trial:
        """Train and grade one learning rate; a diverged one has no accuracy, but its tokens count."""
        schedule = held_out.schedules[job.alias]
        trajectory, stop = self._along(job, schedule, lr), schedule.stops[0]
        log = self.store.truncate_steps(f"tune-{job.alias}-{lr:g}", 0, self.scratch)
        try:
            trajectory.train_to(stop, log, *progress.of_training(self.on_progress, trajectory, stop))
        except NotFiniteError as error:
            return Trial(lr, None, trajectory.spent, 0, error.what)
        finally:
            self.store.publish_steps(log)
        prefix, test = trajectory.objective.conditions[0].prefix, held_out.test
        backend = TransformersBackend(trajectory.model, prefix, self.prepared.spec.evals.batch)
        with adapters.merged(trajectory.model):
            rows = test.run(backend, progress.on_answers(self.on_progress, f"{job.alias}, rate {lr:g}", test))
        identity = {"objective": job.alias, "seed": job.seed, "budget": stop.budget, "adapter_hash": ""}
        rows_path = self.store.tuning(job.alias).with_name(f"{job.alias}-{lr:g}.parquet")
        self.store.write_part(rows_path, identity, rows)
        prompt_tokens = sum(len(backend.chat.prompt_ids([{"role": "user", "content": r.prompt}])) for r in rows)
        eval_tokens = prompt_tokens + sum(r.new_tokens for r in rows)
        return Trial(lr, sum(r.score for r in rows) / len(rows), trajectory.spent, eval_tokens)

    def _learning_path(self, job: Job) -> Path:
        return self.store.learning(job.alias, job.seed, *job.budgets)

    def _check_learning(self, job: Job) -> None:
        """Measure what a checkpoint learned, under all its objective's conditions, and write it as one file."""
        items, objective = self.prepared.learning, self.prepared.objectives[job.alias]
        stats = {c: self._base_stats(objective.control_tokens, c.prefix) for c in objective.conditions}
        target = EvalTarget(job.alias, job.seed, job.budgets[0], objective.conditions[0])
        model, adapter_hash = self._load_checkpoint(target)
        assert self._base is not None
        change = adapters.relative_change(model, self._base.originals)
        identity = {"objective": job.alias, "seed": job.seed, "budget": target.budget, "adapter_hash": adapter_hash}
        records: list[dict[str, Any]] = []
        for condition, base in stats.items():
            found = learning.measure(model, base, items, condition.prefix, self._forward(model))
            records += [{**identity, "condition": condition.name, "weight_change": change, **line} for line in found]
            name = progress.describe(replace(target, condition=condition))
            self.on_progress("score", len(items), progress.EvalProgress(name, "learning check", len(items), len(items)))
        self.store.write_learning(self._learning_path(job), records, items.hash)

    def _base_stats(self, control_tokens: tuple[str, ...], prefix: str) -> learning.BaseStats:
        """Return the base's statistics on the learning check's items; computed once per worker."""
        key = (control_tokens, prefix)
        if key not in self._learning:
            model, whole = self.base(), self.prepared.spec.adapter.kind == "full"
            if control_tokens:
                adapters.attach(model, self.adapter, seed=0, control_tokens=control_tokens)
            settings = self._forward(model)
            self._learning[key] = learning.base_stats(model, self.prepared.learning, prefix, settings, whole=whole)
        return self._learning[key]

    def _forward(self, model: Model) -> Optim:
        optim, kind = self.prepared.spec.optim, self.prepared.spec.adapter.kind
        return Optim(optim.clip, optim.micro_tokens, layout=layout_of(optim.layout, model, kind))

    def _check(self, job: Job) -> None:
        """Compare the weights of the arm at rate 0, as they are evaluated, with the base's, bit for bit."""
        (budget,) = job.budgets
        before = _layer_bits(self.base())
        model, adapter_hash = self._load_checkpoint(EvalTarget(job.alias, job.seed, budget, PLAIN))
        line = checkpoints.verified_ledger(self.store.checkpoint(job.alias, job.seed, budget))
        trained = adapters.init_hash(model)
        with adapters.merged(model):
            after = _layer_bits(model)
        facts = {"steps": line["step"], "source_tokens": line["source_tokens"], "adapter_hash": adapter_hash}
        facts |= {"weights": len(before), "changed": sum(a != b for a, b in zip(before, after, strict=True))}
        write_json(self.store.check(job.alias), facts | {"adapter_changed": trained != line["init_hash"]})

    @cached_property
    def probing(self) -> Probing:
        return Probing(self.prepared, self.store)

    def _probe(self, job: Job) -> None:
        """Compute the base's directions, or probe a checkpoint under its objective's first condition."""
        name = "the base's directions" if job.alias == BASE else f"{job.alias} s{job.seed} at {job.budgets[0]:,} tokens"
        name += f" ({', '.join(job.measures)})" if job.measures else ""
        self.on_progress("score", 0.0, f"probing {name}")
        if self.prepared.external:
            base, checkpoint = (self.prepared.external[a] for a in (BASE, job.alias))
            with base.load() as own, checkpoint.load() as tuned:
                if job.alias == BASE:
                    self.probing.run_base(own)
                else:
                    self.probing.run_checkpoint(job, ModelPair.of(tuned, None if is_low_rank(tuned) else own), "")
        elif job.alias == BASE:
            self.probing.run_base(self.base())
        else:
            condition = self.prepared.objective(job.alias).conditions[0]
            model, _ = self._load_checkpoint(EvalTarget(job.alias, job.seed, job.budgets[0], condition))
            whole = None if is_low_rank(model) else self._load()  # whole weights: the base is a second model
            self.probing.run_checkpoint(job, ModelPair.of(model, whole), condition.prefix)
        self.on_progress("score", 1.0, f"probed {name}")

    def _measure(self, job: Job) -> None:
        spec = self.prepared.spec
        targets = [target for target in eval_targets(self.prepared, job) if self.pending(target)]
        with ExitStack() as stack:
            server: VllmServer | None = None
            if spec.evals.backend.vllm and targets and not self.prepared.external:
                self.release()  # the server needs its memory
                notify = partial(self.on_progress, "generate", 0.0)
                server = stack.enter_context(vllm_server(spec, notify))
                self.store.record_server(server.facts)
            for target in targets:
                with self._open(target, server) as (backend, adapter_hash):
                    self._evaluate(backend, target, adapter_hash)

    @contextmanager
    def _open(self, target: EvalTarget, server: VllmServer | None) -> Iterator[tuple[Backend, str]]:
        """Yield a target's (backend, adapter hash)."""
        prefix = target.condition.prefix
        if self.prepared.external:
            external = self.prepared.external[target.objective]
            with external.open(self.store) as backend:
                yield backend, external.adapter_hash
        elif server is None:
            model, adapter_hash = self._load_checkpoint(target)
            evals = self.prepared.spec.evals
            local = TransformersBackend(model, prefix, evals.batch, "failure", evals.thinking)
            with adapters.merged(model):
                yield cached_backend(local, adapter_hash, self.store.cache.records("answers")), adapter_hash
        elif target.objective in (BASE, BASE_AGAIN):
            yield server.base(prefix), "none"
        else:
            folder = self.store.checkpoint(target.objective, target.seed, target.budget)
            with server.adapter(folder, prefix) as backend:
                yield backend, _ledger(folder, server.base_hash)["adapter_hash"]

    def _load_checkpoint(self, target: EvalTarget) -> tuple[Model, str]:
        """Return (model, adapter hash) of a target; the base under a control token gets that token's embedding.

        Raises LeewayError if the checkpoint was trained on another base.
        """
        model = self.base()
        settings = self.adapter
        if target.objective in (BASE, BASE_AGAIN):
            known, prefix = (o.control_tokens for o in self.prepared.objectives.values()), target.condition.prefix
            if tokens := next((own for own in known if any(t in prefix for t in own)), ()):
                adapters.attach(model, settings, seed=0, control_tokens=tokens)
            return model, "none"
        folder = self.store.checkpoint(target.objective, target.seed, target.budget)
        line = _ledger(folder, model.hash)
        control_tokens = self.prepared.objective(target.objective).control_tokens
        adapters.attach(model, settings, seed=target.seed, control_tokens=control_tokens)
        adapters.restore(model, folder)
        model.lm.eval()
        return model, line["adapter_hash"]

    def _evaluate(self, backend: Backend, target: EvalTarget, adapter_hash: str) -> None:
        identity = {name: getattr(target, name) for name in ("objective", "seed", "budget")}
        identity["adapter_hash"] = adapter_hash
        spec, evals = self.prepared.spec, self.prepared.evals
        fixed = target.objective == BASE or target.objective.startswith(MARK)
        stopping = {} if fixed else sequential_eval.sequential_axes(spec, evals)
        pending, name = self.pending(target), progress.describe(target)
        for e in (e for e in pending if e.name not in stopping):
            own = backend.backend if e.needs_model and isinstance(backend, BatchCachedBackend) else backend
            rows = e.run(own, progress.on_answers(self.on_progress, name, e))
            self.store.write_part(self.part(target, e), identity, rows)
        for axis in dict.fromkeys(e.name for e in pending if e.name in stopping):
            base = replace(target, objective=BASE, seed=0, budget=0)
            base_parts = [self.store.read_part(self.part(base, e)).to_pandas() for e in stopping[axis]]
            base_rows = pd.concat(base_parts, ignore_index=True)
            on_answers = partial(progress.on_answers, self.on_progress, name)
            rows_of = sequential_eval.run_in_looks(spec, stopping[axis], base_rows, backend, on_answers)
            for e in (e for e in pending if e.name == axis):
                self.store.write_part(self.part(target, e), identity, rows_of[e.key])

    def trajectory(self, job: Job) -> Trajectory:
        """Return a job's trajectory at its learning rate."""
        arm = self.prepared.controls.arms.get(job.alias)
        lr, spent = arm.lr if arm else self.prepared.spec.optim.lr_of(job.alias), 0
        if lr is None:
            choice = read_choice(self.store.tuning((arm.rate_of if arm else None) or job.alias))
            lr, spent = choice.lr, choice.tokens
        return self._along(job, schedule_of(self.prepared, job), lr, spent)

    def _along(self, job: Job, schedule: Schedule, lr: float, tuning_tokens: int = 0) -> Trajectory:
        """Return a job's trajectory along another schedule."""
        arm = job.alias in self.prepared.controls.arms
        spec = ObjectiveSpec(alias=job.alias, kind="sft") if arm else self.prepared.spec.objective(job.alias)
        return Trajectory(
            job.alias,
            self.prepared.objective(job.alias),
            job.seed,
            self.base(),
            schedule,
            self._settings(lr, tuning_tokens, self._reference_cache(job)),
            self.prepared.auxiliary_pool,
            self._warm_start(spec, job.seed),
            spec.reference,
            self.ranks,
        )

    def trial(self, alias: str, seed: int, schedule: Schedule, references: ReferenceCache | None) -> Trajectory:
        """Return a trajectory from the base along another schedule, to be timed."""
        objective, settings = self.prepared.objectives[alias], self._settings(1e-5, references=references)
        return Trajectory(alias, objective, seed, self.base(), schedule, settings, self.prepared.auxiliary_pool)

    def _warm_start(self, spec: ObjectiveSpec, seed: int) -> WarmStart | None:
        """Return the adapter that a trajectory starts from, if not the base."""
        if spec.start is None:
            return None
        if spec.start.adapter is not None:
            return WarmStart.of(expand(spec.start.adapter))
        assert spec.start.from_ and spec.start.budget  # noqa: PT018
        folder = self.store.checkpoint(spec.start.from_, seed, spec.start.budget)
        return WarmStart(folder, checkpoints.read_ledger(folder)["adapter_hash"])

    @property
    def adapter(self) -> adapters.AdapterSettings:
        return adapters.AdapterSettings(**self.prepared.spec.adapter.model_dump())

    def _settings(self, lr: float, tuning_tokens: int = 0, references: ReferenceCache | None = None) -> Settings:
        optim = self.prepared.spec.optim
        loop, decay = Optim(optim.clip, optim.micro_tokens), (optim.warmup_steps, optim.weight_decay)
        return Settings(self.adapter, lr, *decay, loop, optim.schedule, tuning_tokens, references, optim.layout)

    @cached_property
    def _references(self) -> ReferenceCache:
        return ReferenceCache(self.store.cache.references)

    @cached_property
    def _states(self) -> dict[token_counts.ReferenceId, frozenset[str]]:
        return token_counts.states_of(self.prepared)

    def _reference_cache(self, job: Job) -> ReferenceCache | None:
        """Return the cache of a trajectory's precomputed reference; none for a live reference."""
        if self.prepared.spec.reference == "live" or job.alias in self.prepared.controls.arms:
            return None
        reference = token_counts.reference_id(self.prepared, job.alias, job.seed)
        return self._references.with_states(self._states.get(reference, ()))


def _train_rank(
    ranks: Distributed, report: Send, raw_spec: dict[str, Any], folder: Path, job: Job, scratch: Path | None
) -> None:
    spec, store = Spec.model_validate(raw_spec), RunDir(folder)
    prepared = prepare(spec, PairSampling(store.cache))
    with compute_settings(spec):
        Worker(prepared, store, lambda *event: report(event), scratch, ranks).train(job)


def _layer_bits(model: Model) -> tuple[int, ...]:
    """Return a checksum of every weight of the base model in its current state, adapters' own tensors left out."""
    parameters = adapters.unwrapped(model.lm).named_parameters()
    return bits(p for name, p in parameters if "lora_" not in name and "trainable_tokens" not in name)


def vllm_server(spec: Spec, notify: Callable[[str], None]) -> VllmServer:
    """Return a server of the study's base model, or a connection to the one at `endpoint`."""
    own = spec.evals.backend.vllm
    assert own is not None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    model = (spec.model, spec.revision, spec.dtype, spec.adapter.r)
    settings = VllmSettings(*model, own.endpoint, args=own.args, thinking=spec.evals.thinking)
    return VllmServer(settings, notify)


def _ledger(folder: Path, base_hash: str) -> dict[str, Any]:
    """Return a checkpoint's ledger line. Raises LeewayError if it was trained on another base."""
    line = checkpoints.verified_ledger(folder)
    if line["base_hash"] != base_hash:
        what = f"{folder}: ledger column base_hash is {line['base_hash']!r} there and {base_hash!r} in this study"
        raise LeewayError(what, fix="the model has changed since: start in another --out")
    return line


def cached_backend(backend: TransformersBackend, adapter_hash: str, cache: RecordStore) -> BatchCachedBackend:
    """Return `backend` with its answers cached.

    The key covers all that the bits depend on besides the requests: weights, adapter, prefix, dtype, decoder, batch
    size, device and its arithmetic, threads, versions.
    """
    model = backend.model
    identity_hash = digest(
        "transformers",
        model.hash,
        adapter_hash,
        backend.prefix,
        [backend.batch, backend.overlong, backend.fused],
        [str(model.head.weight_VD.dtype), str(model.device), torch.get_num_threads()],
        torch.backends.cpu.get_cpu_capability(),
        [version(p) for p in ("leeway", "torch", "transformers")],
    )
    return BatchCachedBackend(backend, cache, identity_hash, BATCHES * backend.batch)
