"""Plan a study before anything is trained: trajectories, tokens, hours, memory, dollars, disk."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from html import escape
from pathlib import Path

import torch

from leeway.errors import LeewayError
from leeway.io import wrap_words
from leeway.model.forward import FUSED_ADAPTERS
from leeway.model.fused.decoder import why_not
from leeway.plan import cost_model, hardware
from leeway.plan.benchmark import Measured, Timing, measured_hours, run_benchmark
from leeway.plan.cost_model import CostEstimate, EvalCost, Prices, Shape, estimate_cost, eval_costs
from leeway.plan.hardware import Machine, PlannedModel, planned_model
from leeway.plan.probe_cost import ProbeCost, probe_cost
from leeway.plan.token_counts import ReferenceWork, TrajectoryPlan, learning_tokens, reference_work, trajectory
from leeway.study.jobs import Job, control_jobs, eval_targets, jobs_of
from leeway.study.preflight import resource_faults, service_faults
from leeway.study.prepare import Prepared, chat_for, notes_on_budgets, prepare, target_layers
from leeway.study.spec import Spec

NO_PRICES = Prices()


@dataclass(frozen=True)
class Plan:
    """Estimates for a whole study; token counts are exact if `counts_exactly`."""

    name: str
    parameters: int
    trajectories: tuple[TrajectoryPlan, ...]
    checkpoints: int
    evaluated: int
    answers_each: int
    evals: tuple[EvalCost, ...]
    left_out: int
    resolved_defaults: tuple[str, ...]
    missing: tuple[str, ...]
    warnings: tuple[str, ...]
    counts_exactly: bool
    notes: tuple[str, ...]
    references: ReferenceWork
    cost: CostEstimate
    measured: Measured | None
    estimated_hours: float
    estimated_memory_gib: float
    estimated_disk_gib: float

    def to_json(self) -> dict[str, object]:
        return asdict(self)

    def to_text(self, width: int | None = None) -> str:
        """Return the plan as lines; with `width`, sentences are wrapped to it between words."""
        heads, *rows = self._rows()
        widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
        table = ["  ".join(f"{c:{'<' if n == 0 else '>'}{widths[n]}}" for n, c in enumerate(r)) for r in (heads, *rows)]
        before, after = self._lines()
        wrapped = [[part for line in lines for part in wrap_words(line, width)] for lines in (before, after)]
        return "\n".join([*wrapped[0], *table, *wrapped[1]])

    def _repr_html_(self) -> str:
        """Show the plan in a notebook."""
        heads, *rows = self._rows()
        before, after = ("".join(f"<div>{escape(line)}</div>" for line in lines) for lines in self._lines())
        head = "".join(f"<th>{escape(h)}</th>" for h in heads)
        body = "".join(f"<tr>{''.join(f'<td>{escape(c)}</td>' for c in row)}</tr>" for row in rows)
        return f"{before}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{after}"

    def _rows(self) -> list[list[str]]:
        """Return the table of trajectories, its heads first."""
        about = "" if self.counts_exactly else "~"
        rows = [["objective", "seed", "to budget", "steps", "source", "targets", "processed", "reference"]]
        for t in self.trajectories:
            name = f"{t.objective}{f' ({t.purpose})' if t.purpose else ''}"
            counts = (t.steps, t.source_tokens, t.target_tokens, t.processed_tokens, t.reference_tokens)
            rows.append([name, str(t.seed), f"{t.budgets[-1]:,}", *(about + f"{n:,}" for n in counts)])
        return rows

    def _lines(self) -> tuple[list[str], list[str]]:
        """Return the lines before and after the table."""
        about = "" if self.counts_exactly else "~"
        references, shared = self.references, []
        if references.sequences:  # less than the column's sum: sequences are shared across trajectories
            passes = f"{about}{references.tokens:,} tokens in {about}{references.sequences:,} sequences"
            shared = [f"reference passes: {passes}, once each; cached on disk ({_size(references.bytes)})"]
        before = [
            f"{self.name}: {sum(t.runs for t in self.trajectories)} training runs, {self.checkpoints} checkpoints, "
            f"{self.evaluated} evaluations of {self.answers_each:,} answers; {self.parameters:,} parameters",
            *(f"missing: {m}" for m in self.missing),
            *(f"warning: a run would stop: {w}" for w in self.warnings),
            *(f"auto: {line}" for line in self.resolved_defaults),
        ]
        after = [
            *shared,
            *(_eval_line(e, about) for e in self.evals),
            *self.notes,
            f"left out as too long: {self.left_out}",
            *([*self.measured.lines(), *self.cost.other_lines()] if self.measured else self.cost.lines()),
        ]
        return before, after


def _size(n: float) -> str:
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.2f} MiB"


def plan(
    spec: Spec,
    machine: Machine | None = None,
    prices: Prices = NO_PRICES,
    *,
    measure: bool = False,
    workers: int | None = None,
) -> Plan:
    """Plan `spec` on `machine` (default: this CPU) from data, tokenizer and config, without weights or a GPU.

    `measure` loads the weights and times some steps and responses on this machine in `workers` processes.
    """
    from leeway.study.executors.local import workers_for

    model = planned_model(spec)
    prepared = prepare(spec, model=model)
    size, jobs = _shape(spec, model, cpu=machine is None), jobs_of(prepared)
    processes = 1 if machine else workers_for(spec, len(jobs), workers)
    on = machine or _this_cpu(spec, size, processes)
    work = _work(prepared, jobs, size, on)
    cost = _cost(prepared, size, on, prices, work, processes)
    if work.probing is not None:
        cost = replace(cost, hours=cost.hours + work.probing.seconds / 3600 / processes)
    measured = None
    if measure:
        timing = run_benchmark(spec, processes)
        measured = measured_hours(prepared, work.jobs, work.trained, timing, processes)
    checkpoints, evaluated = work.checkpoints, work.evaluated
    return Plan(
        name=spec.name,
        parameters=size.total,
        trajectories=work.trajectories,
        checkpoints=checkpoints,
        evaluated=evaluated,
        answers_each=work.answers,
        evals=work.evals,
        left_out=len(prepared.left_out),
        resolved_defaults=spec.resolved_defaults,
        missing=model.missing,
        warnings=() if machine else _warnings(spec, size, checkpoints, processes, exact=not model.missing),
        counts_exactly=model.counts_exactly,
        notes=_all_notes(prepared, work),
        references=work.references,
        cost=cost,
        measured=measured,
        estimated_hours=measured.hours if measured else cost.hours,
        estimated_memory_gib=measured.memory_gib if measured else cost.memory_gib,
        estimated_disk_gib=cost.disk_gib,
    )


@dataclass(frozen=True)
class _Work:
    """What a study has to do: `jobs` with its controls, what they train, read and answer."""

    jobs: list[Job]
    trajectories: tuple[TrajectoryPlan, ...]
    arms: tuple[TrajectoryPlan, ...]  # of controls
    checkpoints: int
    evaluated: int  # checkpoints under a condition, each of which gives `answers`
    answers: int
    evals: tuple[EvalCost, ...]
    unpriced: tuple[str, ...]
    references: ReferenceWork
    checked: tuple[int, int]  # tokens of the learning check: processed, of targets
    sweep_tokens: int
    probing: ProbeCost | None

    @property
    def trained(self) -> tuple[TrajectoryPlan, ...]:
        return (*self.trajectories, *self.arms)


def _work(prepared: Prepared, jobs: list[Job], size: Shape, on: Machine) -> _Work:
    controls = control_jobs(prepared)
    evals, unpriced = eval_costs(prepared)
    by_checkpoint = [learning_tokens(prepared, p) for p in jobs]
    return _Work(
        jobs=[*jobs, *controls],
        trajectories=tuple(trajectory(prepared, p) for p in jobs if p.kind in ("tune", "train")),
        arms=tuple(trajectory(prepared, p) for p in controls if p.kind == "train"),
        checkpoints=sum(len(p.budgets) for p in jobs if p.kind == "train"),
        evaluated=sum(len(eval_targets(prepared, p)) for p in jobs),
        answers=sum(len(e) for e in prepared.evals),
        evals=evals,
        unpriced=unpriced,
        references=reference_work(prepared, size.hidden, size.bytes),
        checked=(sum(n for n, _ in by_checkpoint), sum(n for _, n in by_checkpoint)),
        sweep_tokens=_sweep_tokens(prepared),
        probing=probe_cost(prepared, size, on),
    )


def _cost(prepared: Prepared, size: Shape, on: Machine, prices: Prices, work: _Work, processes: int) -> CostEstimate:
    """Return what the work costs on a machine; with several processes, hours as they share the jobs."""
    targets = [t for p in work.jobs for t in eval_targets(prepared, p)]
    training = [_training_seconds(prepared, size, on, t) for t in work.trained]
    references = cost_model.forward_seconds(size, on, work.references.tokens, work.references.measured)
    rows = work.evaluated * work.answers
    cost = estimate_cost(
        prepared,
        size,
        on,
        prices,
        training=sum(t.runs * seconds for t, seconds in zip(work.trained, training, strict=True))
        + references
        + cost_model.forward_seconds(size, on, *work.checked),
        sweeps=work.sweep_tokens * 2.0 * (size.body + size.head) / on.decoding,
        evals=work.evals,
        evaluated=Counter(e.key for t in targets for e in prepared.evals_of(t.condition, t.objective)),
        disk=work.checkpoints * size.trained * cost_model.FLOAT32 + rows * cost_model.ROW_BYTES,
        references=work.references.bytes,
    )
    if processes == 1:
        return cost
    by_name = {t.objective: s / t.processed_tokens for t, s in zip(work.trained, training, strict=True)}
    answering = {e.name: cost_model.eval_seconds(size, e, on, prepared.spec.evals.batch) for e in work.evals}
    timing = Timing(by_name, references / max(1, work.references.tokens), answering)
    hours = measured_hours(prepared, work.jobs, work.trained, timing, processes).hours + cost.pairs_hours
    return replace(cost, workers=processes, hours=hours)


def _all_notes(prepared: Prepared, work: _Work) -> tuple[str, ...]:
    return (
        *_undrawn(prepared),
        *work.unpriced,
        *_notes(prepared.spec, work.trajectories, work.sweep_tokens),
        *notes_on_budgets(prepared),
        _learning(prepared, work.checked),
        *_controls(prepared, work.arms),
        *([str(work.probing)] if work.probing else []),
        *claimed(prepared.spec),
    )


def _training_seconds(prepared: Prepared, size: Shape, on: Machine, t: TrajectoryPlan) -> float:
    """Return the seconds of one run of a trajectory, with its reference if that is live."""
    seconds = cost_model.training_seconds(
        size,
        on,
        t.distinct_tokens if size.fused else t.processed_tokens,
        t.target_tokens,
        steps=t.steps,
        dropout=prepared.spec.adapter.dropout,
        divergence=prepared.objective(t.objective).needs_reference == "distribution",
    )
    if prepared.spec.reference == "live" and t.reference_tokens:
        seconds += cost_model.forward_seconds(size, on, t.reference_tokens, t.target_tokens)
    return seconds


def memory_of_a_worker(prepared: Prepared) -> int:
    """Return the estimated bytes of main memory of a CPU worker, for scheduling."""
    size = model_shape(prepared.spec, cpu=True)
    return int(cost_model.RUNTIME + cost_model.memory_needed(prepared, size).peak)


def _warnings(spec: Spec, size: Shape, checkpoints: int, workers: int, *, exact: bool) -> tuple[str, ...]:
    """Return what would stop a run on this machine before the first step."""
    resources = resource_faults(spec, size, Path("runs") / spec.name, checkpoints, workers) if exact else []
    return (*service_faults(spec, hub=False), *resources)


def _learning(prepared: Prepared, checked: tuple[int, int]) -> str:
    items = prepared.learning
    held_out = f"{len(items.task)} held-out examples and {len(items.general)} general prompts at each checkpoint"
    return f"learning check: {items.missing or f'{held_out}, {checked[0]:,} tokens in all'}"


def _controls(prepared: Prepared, arms: tuple[TrajectoryPlan, ...]) -> Iterator[str]:
    """Yield what the arms of controls cost, and which controls cannot be run."""
    if arms:
        names = ", ".join(dict.fromkeys(t.objective for t in arms))
        again = "; the base is measured again" * bool(prepared.controls.again)
        yield f"controls: {names}: {sum(t.processed_tokens for t in arms):,} tokens of training{again}"
    yield from (f"control {name} is not run: {why}" for name, why in prepared.controls.not_run.items())


def machine_and_prices(
    gpu: str | None, mfu: float | None, mbu: float | None, hour: float | None, judge: str | None
) -> tuple[Machine | None, Prices]:
    """Return the machine and prices of the command line's options. Raises LeewayError for impossible values."""
    for option, value in (("--mfu", mfu), ("--mbu", mbu), ("--price", hour)):
        if gpu is None and value is not None:
            raise LeewayError(f"{option} needs a GPU", fix="add --gpu NAME")
    if hour is not None and not math.isfinite(hour):
        raise LeewayError(f"--price {hour:g} is not finite", fix="give dollars per hour, such as 2.5")
    machine = None
    if gpu is not None:
        machine = hardware.on_gpu(gpu, hardware.MFU if mfu is None else mfu, hardware.MBU if mbu is None else mbu)
    return machine, Prices(hour, None if judge is None else _judge_price(judge))


def _judge_price(text: str) -> tuple[float, float]:
    """Parse `0.15/0.60`, or one number for both."""
    try:
        parts = [float(part) for part in text.split("/")]
    except ValueError:
        parts = []
    if len(parts) not in (1, 2) or not all(0 <= p < math.inf for p in parts):
        what = f"--judge-price {text!r} is not a price"
        raise LeewayError(what, fix="give dollars per million tokens, such as 0.15/0.6")
    return parts[0], parts[-1]


def _eval_line(e: EvalCost, about: str) -> str:
    line = f"{e.name}: {e.answers:,} answers a checkpoint, {about}{e.prompt_tokens:,} tokens of prompts"
    line += f", up to {e.max_new_tokens} tokens each" if e.max_new_tokens else ", one forward pass each"
    return line + (f"; {e.judge_calls:,} calls of {e.judge}" if e.judge_calls else "")


def _shape(spec: Spec, model: PlannedModel, *, cpu: bool) -> Shape:
    """Return the model's sizes with the dtype and layout it would have there."""
    lm = hardware.meta_model(model.config)
    full = spec.adapter.kind == "full"
    wide = 4 if spec.weight_dtype == "float32" or (spec.weight_dtype == "auto" and cpu) else 2
    supported = cpu and spec.adapter.kind in FUSED_ADAPTERS and not why_not(lm)
    return cost_model.shape(
        lm,
        [] if full else target_layers(spec, lm),
        spec.adapter.r,
        full=full,
        width=wide,
        fused=supported and spec.optim.layout in ("auto", "fused"),
    )


def model_shape(spec: Spec, *, cpu: bool) -> Shape:
    """Return the sizes of the study's model, from its config."""
    return _shape(spec, planned_model(spec), cpu=cpu)


def _this_cpu(spec: Spec, size: Shape, workers: int) -> Machine:
    dtype = torch.float32 if size.bytes == 4 else torch.bfloat16
    shape = (size.hidden, size.inner, dtype, spec.evals.batch)
    return hardware.this_cpu(*shape, workers=workers, threads=spec.threads)


def _undrawn(prepared: Prepared) -> Iterator[str]:
    if prepared.pairs is None:
        pairs = prepared.spec.pairs
        yield (
            f"pairs {pairs.from_}: drawn when the study runs, up to {pairs.samples * prepared.examples:,} answers; "
            "until then a rejected answer is counted as long as the preferred one, and no example is left out"
        )


def _sweep_tokens(prepared: Prepared) -> int:
    """Return the most tokens that answering the held-out questions of the learning-rate sweeps can take."""
    if prepared.tuning is None:
        return 0
    test, total = prepared.tuning.test, 0
    for o in prepared.objectives.values():
        chat = chat_for(prepared.chat, o).with_prefix(o.conditions[0].prefix)
        total += sum(len(chat.prompt_ids(p.conversation)) for p in test.prompts()) + len(test) * test.max_new_tokens
    return total * len(prepared.spec.optim.tune.lrs)


def claimed(spec: Spec) -> Iterator[str]:
    """Yield the study's claims and their hash."""
    if spec.claims is not None:
        set_ = f"{spec.claims.name}, version {spec.claims.version}"
        yield f"claims: {len(spec.claims.claims)} ({set_}), hash {spec.claims.hash}: publish it before the run"


def _notes(spec: Spec, trajectories: tuple[TrajectoryPlan, ...], sweep_tokens: int) -> Iterator[str]:
    """Yield what settings cost compared with their defaults."""
    if spec.evals.stop == "decided":
        yield "stop decided: answers, hours and calls of judges are upper bounds; evals stop early"
    if spec.evals.triggers:
        yield "triggers: answers, hours and calls of judges are upper bounds; they run jailbreak and persona only"
    runs = [t for t in trajectories if not t.purpose]
    if spec.optim.schedule != "constant":
        whole = sum(t.processed_tokens for t in runs)
        one = sum(t.processed_tokens for t in runs if t.budgets[-1] == spec.budgets[-1])
        yield (
            f"schedule {spec.optim.schedule}: every budget is a run of its own, {whole:,} tokens processed in place "
            f"of {one:,} ({whole / one:.2f} times a constant rate's)"
        )
    short: dict[int, list[str]] = {}
    for t in runs if spec.optim.schedule != "constant" else ():
        if t.seed == spec.seeds[0] and t.steps <= spec.optim.warmup_steps:
            short.setdefault(t.budgets[-1], []).append(t.objective)
    for budget, names in sorted(short.items()):
        yield f"{', '.join(names)}: the run to {budget:,} tokens ends inside the warm-up, its rate never decays"
    swept = sum(t.runs * (t.processed_tokens + t.reference_tokens) for t in trajectories if t.purpose)
    if swept:
        yield f"lr tuned: {swept:,} tokens of training by the sweeps, and up to {sweep_tokens:,} of answers, on top"
