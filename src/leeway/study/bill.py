"""A plan's bottom line: hours, memory, dollars and disk on one machine, each estimated from stated assumptions."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path

from leeway.model.load import resolve
from leeway.study import costs
from leeway.study.answering import MEAN_ANSWER, longest
from leeway.study.costs import EvalCost, Memory, Shape
from leeway.study.gpus import Machine
from leeway.study.prepare import Prepared

GIB = 2**30
RUNTIME = 0.6 * GIB  # of a process before any model: libraries, allocator
PUBLISHED = 2  # bytes of a weight in the hub's files


@dataclass(frozen=True)
class Bill:
    """Hours of one machine used alone, bytes as GiB; dollars are none where no price was given."""

    machine: str
    assumed: str
    training_hours: float
    answering_hours: float
    pairs_hours: float
    memory: Memory
    fits: bool | None
    advice: str
    adapters_gib: float
    references_gib: float
    hub_gib: float
    disk_gib: float
    judge_calls: int
    judge_tokens_in: float
    judge_tokens_out: float
    dollars: float | None
    judge_dollars: float | None

    @property
    def hours(self) -> float:
        return self.training_hours + self.answering_hours + self.pairs_hours

    @property
    def memory_gib(self) -> float:
        return (RUNTIME + self.memory.peak) / GIB

    def lines(self) -> Iterator[str]:
        """By formulas alone."""
        yield from self._estimated()
        yield from self.other_lines()

    def _estimated(self) -> Iterator[str]:
        pairs = f", drawing pairs {as_time(self.pairs_hours)} at most" if self.pairs_hours else ""
        yield (
            f"estimated by formulas on {self.machine}, not measured: {as_time(self.hours)} (training "
            f"{as_time(self.training_hours)}, answering {as_time(self.answering_hours)}{pairs})"
        )
        yield (
            f"  assumed: {self.assumed}; an answer takes {MEAN_ANSWER:.0%} of max_new_tokens; judges are not waited for"
        )
        m = self.memory
        fit = {None: "", True: ": fits", False: f": DOES NOT FIT; {self.advice}"}[self.fits]
        yield (
            f"  memory ~{self.memory_gib:.1f} GiB{fit} (weights {m.weights / GIB:.1f}, adapter and optimiser "
            f"{m.adapter / GIB:.1f}, then activations {m.activations / GIB:.1f} or keys and values {m.cache / GIB:.1f})"
        )

    def other_lines(self) -> Iterator[str]:
        """Disk, judges and hire, which are not timed."""
        hub = f", the hub's files {self.hub_gib:.1f}" if self.hub_gib else ""
        kept = f", references {self.references_gib:.2f}" if self.references_gib else ""
        yield f"  disk ~{self.disk_gib:.2f} GiB (checkpoints {self.adapters_gib:.2f}{kept}{hub})"
        if self.judge_calls:
            read, written = self.judge_tokens_in / 1e6, self.judge_tokens_out / 1e6
            yield (
                f"  judges: up to {self.judge_calls:,} calls, ~{read:.1f} million tokens read and "
                f"~{written:.1f} million written{_dollars(self.judge_dollars, '--judge-price')}"
            )
        if self.fits is not None:
            yield f"  hire{_dollars(self.dollars, '--price')}"


def as_time(hours: float) -> str:
    return f"~{hours:.1f} h" if hours >= 1 else f"~{hours * 60:.1f} min"


def _dollars(amount: float | None, option: str) -> str:
    return f": no price given ({option})" if amount is None else f": ~${amount:,.2f}"


def bill(
    prepared: Prepared,
    size: Shape,
    machine: Machine,
    *,
    training: float,
    sweeps: float,
    evals: Seq[EvalCost],
    evaluated: int,
    pairs: EvalCost | None,
    disk: float,
    references: float,
    hour: float | None,
    judge: tuple[float, float] | None,
) -> Bill:
    """`training` and `sweeps` in FLOPs; `disk`, of all but references and hub files, and `references` in bytes."""
    spec = prepared.spec
    batch = spec.evals.batch
    asked = evaluated * sum(costs.eval_seconds(size, e, machine, batch) for e in evals)
    needed = costs.memory(size, spec.optim.micro_tokens, spec.adapter.dropout, batch, longest(prepared))
    drawn = costs.eval_seconds(size, pairs, machine, batch) if pairs else 0.0
    calls = evaluated * sum(e.judge_calls for e in evals)
    read = evaluated * sum(e.judge_tokens_in for e in evals)
    written = evaluated * sum(e.judge_tokens_out for e in evals)
    hub = 0.0 if Path(resolve(spec.model)).is_dir() else size.total * PUBLISHED / GIB
    hours = [seconds / 3600 for seconds in (training / machine.flops, asked + sweeps / machine.flops, drawn)]
    adapters = disk / GIB
    return Bill(
        machine=machine.name,
        assumed=machine.assumed,
        training_hours=hours[0],
        answering_hours=hours[1],
        pairs_hours=hours[2],
        memory=needed,
        fits=None if machine.memory is None else RUNTIME + needed.peak <= machine.memory,
        advice=_advice(needed),
        adapters_gib=adapters,
        references_gib=references / GIB,
        hub_gib=hub,
        disk_gib=adapters + references / GIB + hub,
        judge_calls=calls,
        judge_tokens_in=read,
        judge_tokens_out=written,
        dollars=None if hour is None else hour * sum(hours),
        judge_dollars=None if judge is None else (judge[0] * read + judge[1] * written) / 1e6,
    )


def _advice(needed: Memory) -> str:
    return "lower optim.micro_tokens" if needed.activations > needed.cache else "lower evals.batch"
