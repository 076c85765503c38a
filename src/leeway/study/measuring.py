"""A plan's hours and memory from what was measured on this machine: exact counts times rates, piece by piece."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from leeway.study.bill import GIB, as_time
from leeway.study.pieces import Piece, whos
from leeway.study.prepare import Prepared
from leeway.study.referred import new_tokens
from leeway.study.timing import Timing
from leeway.study.trajectories import TrajectoryPlan


@dataclass(frozen=True)
class Measured:
    """Hours of work, of all workers together, and from the first command to the last page; memory of all processes."""

    workers: int
    training_hours: float
    reference_hours: float
    answering_hours: float
    setup_hours: float
    hours: float
    memory_gib: float
    untimed: tuple[str, ...]

    def lines(self) -> Iterator[str]:
        several = f" with {self.workers} workers" if self.workers > 1 else ""
        parts = {
            "training": self.training_hours,
            "references": self.reference_hours,
            "answering": self.answering_hours,
            "loading and saving": self.setup_hours,
        }
        told = ", ".join(f"{what} {as_time(hours)}" for what, hours in parts.items())
        together = ", over all workers" if several else ""
        yield f"measured on this machine{several}: {as_time(self.hours)} ({told}{together})"
        yield f"  memory ~{self.memory_gib:.1f} GiB at their peaks"
        if self.untimed:
            yield f"  not timed: {', '.join(self.untimed)}"


def priced_by(
    prepared: Prepared, pieces: Seq[Piece], trajectories: Seq[TrajectoryPlan], timing: Timing, workers: int
) -> Measured:
    """`trajectories` are those of `pieces`, but for the base. What an earlier run has done is not taken off."""
    asked = new_tokens(prepared) if prepared.spec.reference == "cached" else {}
    plans = dict(zip([p for p in pieces if p.kind != "base"], trajectories, strict=True))
    each = sum(timing.answering.values())
    per_answer = each / max(1, sum(len(e) for e in prepared.evals if e.key in timing.answering))
    training = {p: t.runs * t.processed_tokens * timing.training[p.alias] for p, t in plans.items()}
    reference = {p: asked.get(p, 0) * timing.reference for p in pieces}
    answering = {p: len(whos(prepared, p)) * each for p in pieces if p.kind != "tune"}
    answering |= {p: t.runs * prepared.spec.optim.tune.items * per_answer for p, t in plans.items() if p.kind == "tune"}
    setup = {p: _loads(prepared, p) * timing.load + len(p.budgets) * timing.checkpoint for p in pieces}
    seconds = {p: training.get(p, 0.0) + reference[p] + answering[p] + setup[p] for p in pieces}
    begin = timing.start + timing.load + (timing.start if workers > 1 else 0.0)
    leading = 1 if workers > 1 else 0  # the process that hands out, with its own copy of the model
    return Measured(
        workers=workers,
        training_hours=sum(training.values()) / 3600,
        reference_hours=sum(reference.values()) / 3600,
        answering_hours=sum(answering.values()) / 3600,
        setup_hours=sum(setup.values()) / 3600,
        hours=(begin + makespan(pieces, seconds, workers)) / 3600,
        memory_gib=(workers * timing.peak + leading * timing.standing) / GIB,
        untimed=(*(e.key for e in prepared.evals if e.key not in timing.answering), "drawing the report", "judges"),
    )


def _loads(prepared: Prepared, piece: Piece) -> int:
    """How often a piece loads the model: the base once more for each condition that adds tokens to it."""
    if piece.kind == "tune":
        return len(prepared.spec.optim.tune.lrs)
    control = {c for o in prepared.objectives.values() if o.control_tokens for c in o.conditions if c.prefix}
    return 1 + (sum(w.condition in control for w in whos(prepared, piece)) if piece.kind == "base" else 0)


def makespan(pieces: Seq[Piece], seconds: dict[Piece, float], workers: int) -> float:
    """When the last piece ends, if each worker takes the first piece that waits for none: as they are handed out."""
    free, ends, left = [0.0] * workers, dict[Piece, float](), list(pieces)
    while left:
        k = free.index(min(free))
        ready = [p for p in left if all(ends.get(b, free[k] + 1) <= free[k] for b in p.after if b in pieces)]
        if ready:
            free[k] += seconds[ready[0]]
            ends[ready[0]] = free[k]
            left.remove(ready[0])
        else:
            free[k] = min(end for end in ends.values() if end > free[k])
    return max(free)
