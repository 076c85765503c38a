"""Run a study: train and measure every checkpoint, write rows, ledger and report. Complete work is not repeated.

From Python: `Study.load(...).run(...)`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from pydantic import ValidationError

from leeway.data.ledger import check_matched
from leeway.data.safety_prompts import subset
from leeway.data.stream import AuxiliaryPool
from leeway.errors import LeewayError, all_faults
from leeway.integrations.trackers.process import Trackers
from leeway.integrations.trackers.tracker import TrackOptions, parse_track
from leeway.io import remove_partial
from leeway.model.load import load_chat, load_context, load_model
from leeway.model.reference import ReferenceCache
from leeway.plan.plan import Plan, model_shape, plan
from leeway.probe.spec import ProbeSpec
from leeway.report.results import Results
from leeway.study import sequential_eval
from leeway.study.build_evals import HelperModels, evals_of
from leeway.study.controls import RATE_ZERO
from leeway.study.executors.local import Executor, LocalExecutor, requires_single_worker, workers_for
from leeway.study.executors.watchdog import Watchdog
from leeway.study.jobs import Job, compliant_count, control_jobs, eval_targets, jobs_of, relative_cost, schedule_of
from leeway.study.load import load, parse
from leeway.study.manifest import check_unchanged, matching
from leeway.study.preflight import SPARE_DISK, on_cpu, prepare_checked, resource_faults, service_faults
from leeway.study.prepare import PairSampling, Prepared, notes_on_budgets, train_examples
from leeway.study.probing import Probing, data_text, of_data, probe_jobs, split_jobs
from leeway.study.progress import Reporter, Row, trajectory_name
from leeway.study.run_dir import MARK, RunDir
from leeway.study.runtime import compute_settings
from leeway.study.spec import Spec
from leeway.study.worker import Worker
from leeway.training import checkpoints
from leeway.training.distributed import check
from leeway.training.trajectory import read_choice
from leeway.yaml_config import dump, faults


@dataclass(frozen=True)
class Study:
    """A checked study file."""

    spec: Spec

    @classmethod
    def load(cls, path: str | Path, *overrides: str) -> Study:
        """Load a file or preset with `key=value` overrides; raises LeewayError with all faults at once."""
        return cls(load(str(path), overrides))

    @classmethod
    def from_dict(cls, study: Mapping[str, Any], *overrides: str) -> Study:
        """Check a study given as a mapping like a study file's; its paths are relative to the current directory."""
        return cls(parse(dump(dict(study)), "study", overrides))

    def plan(self, **settings: Any) -> Plan:
        """Estimate tokens, hours, memory and disk, as `leeway plan` does; `settings` are those of `plan.plan.plan`."""
        return plan(self.spec, **settings)

    def _repr_html_(self) -> str:
        """Show the study file in a notebook, every default written out."""
        return (
            f"<details open><summary>study {self.spec.name}</summary><pre>{escape(self.spec.to_yaml())}</pre></details>"
        )

    def run(
        self,
        out: str | Path,
        *,
        quiet: bool = False,
        workers: int | None = 1,
        executor: Literal["local", "ray"] = "local",
        track: TrackOptions = (),
    ) -> Results:
        """Run into `out`, resuming what is there. Several workers or `processes` need a `__main__` guard.

        `track` names trackers: `["tensorboard", {"mlflow": {"uri": "http://localhost:5000"}}]`.

        With `executor="ray"` the workers are those of a Ray cluster; `workers=None` is as many as it has room for.
        """
        command = f"Study.load({self.spec.name!r}).run({str(out)!r})"
        run(self.spec, Path(out), Reporter(quiet=quiet), command, workers, executor, track)
        return Results.load(Path(out))


def run(
    spec: Spec,
    out: Path,
    reporter: Reporter,
    command: str,
    workers: int | None = None,
    executor: Literal["local", "ray"] = "local",
    track: TrackOptions = (),
) -> Path:
    """Run `spec` into `out`, resuming what is there; return the report's path."""
    configs = parse_track(track)
    requires_single_worker(spec, workers)  # refuse a bad number of workers before anything is written
    if executor == "local":
        check(spec.processes, spec.device)
    store = RunDir(out)
    with (
        store.claimed(spec.hash, spec.to_yaml()),
        Trackers(configs, out, reporter.log) as trackers,
        _executor(executor, workers, reporter) as chosen,
    ):
        if (free := shutil.disk_usage(out).free) < SPARE_DISK:
            what = f"{out}: no disk space ({free >> 20} MiB left, {SPARE_DISK >> 20} MiB needed)"
            raise LeewayError(what, fix="free some, or give another --out")
        store.cache.acquire(out)
        for line in spec.resolved_defaults:
            reporter.log(f"{spec.name}: auto: {line}")
        reporter.log(f"{spec.name}: reading the data")
        sampling = PairSampling(store.cache, True, _on_sampled(spec, reporter))
        complete = store.rows_path.is_file()  # what is left of a finished run needs no service, or fails as it did
        found = [] if complete else service_faults(spec, local=executor == "local")
        worker = Worker(prepare_checked(spec, sampling, found), store)
        _check_resources(worker, workers if executor == "local" else 1)
        for line in notes_on_budgets(worker.prepared):
            reporter.log(f"{spec.name}: note: {line}")
        manifest = store.read_manifest()
        if manifest:
            check_unchanged(worker.prepared, manifest, out)
        else:
            manifest = chosen.manifest(worker, command)
            store.write_manifest(manifest)
        return run_prepared(worker, manifest, chosen, reporter, trackers)


def _check_resources(worker: Worker, workers: int | None) -> None:
    """Raise LeewayError where the checkpoints to come do not fit on the disk, or the weights in memory."""
    spec, jobs = worker.prepared.spec, [job for job in jobs_of(worker.prepared) if job.kind == "train"]
    missing = sum(not worker.has_checkpoint((job.alias, job.seed, b)) for job in jobs for b in job.budgets)
    if not missing:
        return
    size, n = model_shape(spec, cpu=on_cpu(spec)), workers_for(spec, len(jobs), workers)
    if faults := resource_faults(spec, size, worker.store.folder, missing, n):
        raise all_faults("" if len(faults) == 1 else spec.name, faults)


def run_prepared(
    worker: Worker, manifest: dict[str, Any], executor: Executor, reporter: Reporter, trackers: Trackers
) -> Path:
    """Run all jobs that are not complete, write rows, ledger and report; return the report's path."""
    from leeway.report import build

    store, prepared, rule = worker.store, worker.prepared, matching(worker.prepared)
    jobs, controls = jobs_of(prepared), control_jobs(prepared)
    _count_work(worker, [*jobs, *controls], reporter)
    left = [job for job in [*jobs, *controls] if not worker.is_complete(job)]
    trackers.start(worker, jobs)
    reporter.workers = executor.workers(prepared, len(left)) if left else 1
    reporter.rows = [_row(worker, job) for job in [*jobs, *controls] if job.kind == "train"]
    with reporter if left else nullcontext():
        complete = (job for job in jobs if job not in left)
        lines = [line for job in complete for line in worker.ledger_lines(job, checkpoints.verified_ledger)]
        check_matched(lines, rule)
        for done, job in enumerate(executor.run_jobs(worker, left, reporter.on_event), 1):
            reporter.workers = min(reporter.workers, max(1, len(left) - done))
            lines += [] if job in controls else worker.ledger_lines(job)
            check_matched(lines, rule)
    remove_partial(store.folder)  # of a lost worker
    store.write_ledger(lines)
    store.join_learning([store.learning(j.alias, j.seed, *j.budgets) for j in jobs if j.kind == "learning"])
    rows = _write_rows(worker, jobs, manifest)
    for judged, n in store.stale_rescored().items():
        reporter.log(f"{judged}: {n:,} answers have changed since it scored them; run `leeway rescore` again")
    if prepared.spec.probe is not None:
        probe(worker, executor, reporter)
    store.finish()
    reporter.log(f"{rows:,} rows; drawing the report")
    page = build(store.folder, redacted_page=trackers.redacted_page)
    reporter.summarise(store.folder)
    return page


def probe(worker: Worker, executor: Executor, reporter: Reporter) -> None:
    """Probe the checkpoints that are not probed yet, and write the probe's tables and its section of the manifest."""
    store, jobs = worker.store, probe_jobs(worker.prepared)
    if gone := [c for job in jobs for c in job.needs if not worker.has_checkpoint(c)]:
        what = f"probe: the checkpoint of {gone[0][0]} s{gone[0][1]} at {gone[0][2]:,} tokens is not in {store.folder}"
        raise LeewayError(what, fix="run the study into that folder again, or name other objectives and budgets")
    spec = worker.prepared.spec.probe
    if spec and executor.workers(worker.prepared, len(parts := split_jobs(jobs, spec.measures))) > 1:
        jobs = parts
    left = [job for job in jobs if not worker.is_complete(job)]
    reporter.clock.left["score"] += len(left)
    reporter.workers, reporter.rows = executor.workers(worker.prepared, len(left)) if left else 1, []
    with reporter if left else nullcontext():
        for _ in executor.run_jobs(worker, left, reporter.on_event):
            pass
    facts = worker.probing.collect()
    store.write_manifest({**store.read_manifest(), "probe": facts, "file_hashes": store.file_hashes()})


def probe_finished(folder: Path, options: Mapping[str, Any], reporter: Reporter, workers: int | None = 1) -> Path:
    """Probe the checkpoints of a finished study, resuming an earlier probe; rebuild the report and return its path."""
    from leeway.report import build

    store, spec = RunDir(folder), load(str(folder / "study.yaml"))
    spec = with_probe(spec, options)
    store_evals = evals_of(spec, {}, HelperModels(store.cache, spec.device))
    objectives = {o.alias: o.build() for o in spec.objectives}
    chat, context = load_chat(spec.model, spec.revision), load_context(spec.model, spec.revision)
    prepared = Prepared(spec, chat, context, objectives, AuxiliaryPool(), {}, None, tuple(store_evals), 0, (), None, {})
    with store.reopened():
        store.cache.acquire(folder)
        probe(Worker(prepared, store), LocalExecutor(workers, Watchdog(reporter.log)), reporter)
        store.cache.release(folder)
        return build(folder)


def probe_data(study: str, options: Mapping[str, Any]) -> str:
    """Return, as text, how far a study's training answers lie along each persona vector, before any training."""
    spec = with_probe(load(study), options)
    chat, context = load_chat(spec.model, spec.revision), load_context(spec.model, spec.revision)
    prepared = Prepared(spec, chat, context, {}, AuxiliaryPool(), {}, None, (), 0, (), None, {})
    examples = subset(train_examples(spec)[0], spec.probe.prompts if spec.probe else None, "probe data")
    with compute_settings(spec):
        base = load_model(spec.model, revision=spec.revision, dtype=spec.weight_dtype, device=spec.device)
        table = of_data(Probing(prepared, RunDir(Path())), base, examples)
    return data_text(table, len(examples))


def with_probe(spec: Spec, options: Mapping[str, Any], *, audited: bool = False) -> Spec:
    """Return the study with the probe's options in place of those of its file. Raises LeewayError."""
    given = spec.probe.model_dump(exclude_defaults=True) if spec.probe else {}
    try:
        own = ProbeSpec.model_validate({**given, **options})
    except ValidationError as error:
        raise all_faults("probe", faults(error, ProbeSpec)) from error
    if audited and (own.objectives or own.budgets):
        raise LeewayError("probe: an audit has one checkpoint", fix="leave --objective and --budget out")
    if not audited and (found := [*own.absent(tuple(o.alias for o in spec.objectives), spec.budgets)]):
        raise all_faults("probe", found)
    return spec.model_copy(update={"probe": own})


def _row(worker: Worker, job: Job) -> Row:
    """Return a trajectory's progress row, with the steps of an earlier run."""
    stops = schedule_of(worker.prepared, job).stops
    done = [s.step for s in stops if worker.has_checkpoint((job.alias, job.seed, s.budget))]
    return Row(trajectory_name(job.alias, job.seed), stops[-1].step, stops[-1].budget, max(done, default=0))


def _write_rows(worker: Worker, jobs: list[Job], manifest: dict[str, Any]) -> int:
    """Write all parts as one table and the results' facts into the manifest; return the number of rows."""
    store, prepared = worker.store, worker.prepared
    parts = {
        worker.part(target, e): target.condition.name
        for job in jobs
        for target in eval_targets(prepared, job)
        for e in prepared.evals_of(target.condition)
    }
    rows = store.write_rows(list(parts))
    conditions = store.conditions(parts)
    controls = control_facts(worker)
    facts: dict[str, Any] = {"conditions": conditions, "file_hashes": store.file_hashes(), **controls}
    if prepared.spec.evals.stop == "decided":
        facts |= sequential_eval.summary(prepared.spec, prepared.evals, pd.read_parquet(store.rows_path), conditions)
    if not prepared.external:
        facts["tuning"] = {j.alias: read_choice(store.tuning(j.alias)).to_json() for j in jobs if j.kind == "tune"}
        facts["learning"] = _learning_facts(prepared)
        facts["first_conditions"] = {alias: o.conditions[0].name for alias, o in prepared.objectives.items()}
        if store.cache.references.is_dir():
            sequences, tokens, size = ReferenceCache(store.cache.references).size()
            facts["references"] = {"sequences": sequences, "tokens": tokens, "bytes": size}
    if server := store.read_server():
        facts["vllm"] = server
    store.write_manifest({**manifest, **facts})
    return rows


def _learning_facts(prepared: Prepared) -> dict[str, Any]:
    """Return what the learning check was measured on, or why it was not."""
    items = prepared.learning
    if items.missing:
        return {"missing": items.missing}
    paired = [alias for alias, o in prepared.objectives.items() if o.needs_pairs]
    pairs = sum(e.dispreferred is not None for e in items.task)
    counts = {"task": len(items.task), "pairs": pairs, "general": len(items.general)}
    return {**counts, "items_hash": items.hash, "trained_on_pairs": paired}


def control_facts(worker: Worker) -> dict[str, Any]:
    """Write the rows of the controls as one table; return the manifest's section about them, empty without any."""
    store, prepared = worker.store, worker.prepared
    jobs, controls = control_jobs(prepared), prepared.controls
    if not (prepared.spec.controls.aa or prepared.spec.controls.dose):
        return {}
    targets = [target for job in jobs for target in eval_targets(prepared, job)]
    parts = [worker.part(t, e) for t in targets for e in prepared.evals_of(t.condition, t.objective)]
    if parts:
        store.write_rows(parts, store.controls_path)
    facts: dict[str, Any] = {"not_run": dict(controls.not_run), "zero": controls.zero, "origin": controls.origin}
    checks = [job.alias for job in jobs if job.kind == "check"]
    facts |= {alias.strip(MARK): json.loads(store.check(alias).read_text("utf-8")) for alias in checks}
    facts["arms"] = [
        line | {"share": controls.arms[job.alias].share, "compliant": compliant_count(prepared, job)}
        for job in jobs
        if job.kind == "train" and job.alias != RATE_ZERO
        for line in worker.ledger_lines(job)
    ]
    return {"controls": facts}


def _count_work(worker: Worker, jobs: list[Job], reporter: Reporter) -> None:
    tune, objectives, left = worker.prepared.spec.optim.tune, worker.prepared.objectives, reporter.clock.left
    for job in jobs:
        for target in eval_targets(worker.prepared, job):
            for e in worker.pending(target):
                left[e.work] += len(e)
        if job.kind == "train":
            stops = schedule_of(worker.prepared, job).stops
            done = [s for s in stops if worker.has_checkpoint((job.alias, job.seed, s.budget))]
            tokens = stops[-1].source_tokens - (done[-1].source_tokens if done else 0)
            left["train"] += tokens * relative_cost(worker.prepared.objective(job.alias))
        elif job.kind == "learning" and not worker.is_complete(job):
            left["score"] += len(worker.prepared.learning) * len(objectives[job.alias].conditions)
        elif job.kind == "tune" and not worker.is_complete(job):
            left["train"] += len(tune.lrs) * tune.budget * relative_cost(objectives[job.alias])
            left["generate"] += len(tune.lrs) * tune.items


def _executor(
    name: Literal["local", "ray"], workers: int | None, reporter: Reporter
) -> AbstractContextManager[Executor]:
    if name == "local":
        return nullcontext(LocalExecutor(workers, Watchdog(reporter.log)))
    from leeway.study.executors.ray import RayExecutor

    return RayExecutor(workers, reporter.log)


def _on_sampled(spec: Spec, reporter: Reporter) -> Callable[[int], None]:
    """Return a callback that logs every thousand answers sampled from the base model."""
    sampled = 0

    def report(n: int) -> None:
        nonlocal sampled
        before, sampled = sampled, sampled + n
        if sampled // 1000 > before // 1000 or before == 0:
            reporter.log(f"{spec.name}: {sampled:,} answers sampled from the base model for {spec.pairs.from_}")

    return report
