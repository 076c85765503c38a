"""A plan's hours and memory from what was measured on this machine: exact counts times rates, piece by piece."""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from leeway.study.bill import GIB, as_time
from leeway.study.pieces import Checkpoint, Piece, whos
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
    """`trajectories` are those of the `pieces` that train. What an earlier run has done is not taken off."""
    asked = new_tokens(prepared) if prepared.spec.reference == "cached" else {}
    plans = dict(zip([p for p in pieces if p.kind in ("tune", "train")], trajectories, strict=True))
    each = sum(timing.answering.values())
    per_answer = each / max(1, sum(len(e) for e in prepared.evals if e.key in timing.answering))
    training = {p: t.runs * t.processed_tokens * timing.training[p.alias] for p, t in plans.items()}
    reference = {p: asked.get(p, 0) * timing.reference for p in pieces}
    answering = {p: len(whos(prepared, p)) * each for p in pieces if p.kind != "tune"}
    answering |= {p: t.runs * prepared.spec.optim.tune.items * per_answer for p, t in plans.items() if p.kind == "tune"}
    setup = {p: _lent(prepared, p) * timing.lend + _saved(p) * timing.checkpoint for p in pieces}
    seconds = {p: training.get(p, 0.0) + reference[p] + answering[p] + setup[p] for p in pieces}
    leading = 1 if workers > 1 else 0  # the process that hands out, which has had the model too
    begin = (1 + leading) * (timing.start + timing.load)
    return Measured(
        workers=workers,
        training_hours=sum(training.values()) / 3600,
        reference_hours=sum(reference.values()) / 3600,
        answering_hours=sum(answering.values()) / 3600,
        setup_hours=(sum(setup.values()) + (workers + leading) * timing.load) / 3600,
        hours=(begin + makespan(pieces, seconds, workers)) / 3600,
        memory_gib=(workers * timing.peak + leading * timing.standing) / GIB,
        untimed=(*(e.key for e in prepared.evals if e.key not in timing.answering), "drawing the report", "judges"),
    )


def _lent(prepared: Prepared, piece: Piece) -> int:
    """How often a piece takes the model as it was loaded."""
    if piece.kind == "tune":
        return len(prepared.spec.optim.tune.lrs)
    return 1 if piece.kind == "train" else len(whos(prepared, piece))


def _saved(piece: Piece) -> int:
    return len(piece.budgets) if piece.kind == "train" else 0


def makespan(pieces: Seq[Piece], seconds: dict[Piece, float], workers: int) -> float:
    """When the last piece ends, if each worker takes the first piece that waits for none: as they are handed out.

    A trajectory's checkpoints come as its source tokens do, all at one speed.
    """
    free, ends, left = [0.0] * workers, dict[Piece, float](), list(pieces)
    there = {(p.alias, p.seed, b): math.inf for p in pieces if p.kind == "train" for b in p.budgets}
    while left:
        k = free.index(min(free))
        now = free[k]
        piece = next((p for p in left if _since(p, ends, there, pieces) <= now), None)
        if piece is None:
            free[k] = min(t for t in (*ends.values(), *there.values()) if t > now)
            continue
        free[k] = ends[piece] = now + seconds[piece]
        if piece.kind == "train":
            there |= {(piece.alias, piece.seed, b): now + seconds[piece] * b / piece.budgets[-1] for b in piece.budgets}
        left.remove(piece)
    return max(free)


def _since(piece: Piece, ends: dict[Piece, float], there: dict[Checkpoint, float], pieces: Seq[Piece]) -> float:
    """From when on a piece waits for nothing; never, as long as what it waits for is not begun."""
    before = [ends.get(p, math.inf) for p in piece.after if p in pieces]
    return max([0.0, *before, *(there[c] for c in piece.needs if c in there)])
