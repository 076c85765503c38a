"""The results as a Markdown table: ours against the peer's, round by round."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks.performance import real, study
from benchmarks.performance.rounds import Bench, Cell, load
from benchmarks.performance.task import OBJECTIVES, Found

HEADER = "| {shape} | ours | peer | ours / peer | spread | utilisation, ours / peer |\n|---|---|---|---|---|---|"
Measure = Callable[[Found], float]


def rate(found: Found) -> float:
    """Tokens a second, the reference included."""
    return found.rate


@dataclass(frozen=True)
class Row:
    """One line: both sides' medians in `unit`, their ratio in every round, and their model FLOP utilisations."""

    label: str
    ours: float
    peer: float
    ratios: tuple[float, ...]
    unit: str
    utilisation: tuple[float, float] | None = None

    def __str__(self) -> str:
        spread = f"{min(self.ratios):.2f}–{max(self.ratios):.2f}, rounds: {len(self.ratios)}"
        values = f"{self.ours:,.0f} {self.unit} | {self.peer:,.0f} {self.unit}"
        used = "" if self.utilisation is None else " / ".join(f"{x:.0%}" for x in self.utilisation)
        ratio = f"**{median(self.ratios):.2f}×** | {spread}"
        return f"| {self.label} | {values} | {ratio} | {used} |"


def report(out: Path, shapes: tuple[str, ...] = ("S", "M")) -> str:
    """Every shape that was measured, its parts and the study they add up to."""
    bench = Bench(out, lambda _: None)
    parts = []
    for shape in shapes:
        rows = [*training(bench, shape), *memory(bench, shape), *generation(bench, shape)]
        if rows:
            parts.append("\n".join([HEADER.format(shape=shape), *map(str, rows)]))
            parts.append(how(bench, shape))
            parts.append(agreement(bench, shape))
            parts.append(study.told(bench, shape))
        parts.append(real.told(shape, out))
    return "\n\n".join(p for p in parts if p) + "\n"


def how(bench: Bench, shape: str) -> str:
    """By which clock, on how many threads and over how many steps; how busy others kept the machine."""
    found = [json.loads(f.read_text("utf-8")) for f in sorted((bench.out / "results").glob(f"{shape}-*/*.json"))]
    clocks = sorted({r["task"]["clock"] for r in found})
    threads, steps = ({r["task"][key] for r in found} for key in ("threads", "steps"))
    busy = sorted(r["busy"] for r in found)
    counts = " and ".join("–".join(str(n) for n in sorted({min(x), max(x)})) for x in (threads, steps))
    return (
        f"{shape}: {' and '.join(clocks)} clock; threads and timed steps: {counts}; other processes kept "
        f"{busy[0]:.1f}–{busy[-1]:.1f} cores busy."
    )


def training(bench: Bench, shape: str) -> list[Row]:
    rows = []
    for o in OBJECTIVES:
        rows += row(bench, f"{o.upper()}", Cell(shape, "train", o), rate, "tok/s")
        if o == "dpo":
            excluded = "DPO, reference excluded"
            rows += row(bench, excluded, Cell(shape, "train", o), lambda f: f.tokens / f.seconds, "tok/s")
            corrupted = Cell(shape, "train", o, "corrupted")
            rows += row(bench, "DPO, corrupted pairs", corrupted, rate, "tok/s")
        rows += workers(bench, f"{o.upper()}, ours as 2 workers × 1 thread", Cell(shape, "train", o))
    return rows


def memory(bench: Bench, shape: str) -> list[Row]:
    rows = []
    for o in ("sft", "dpo", "orpo"):
        cell = Cell(shape, "train", o)
        rows += row(bench, f"{o.upper()}, peak memory", cell, lambda f: f.peak_mb, "MB")
        rows += row(bench, f"{o.upper()}, peak beyond imports and data", cell, lambda f: f.beyond_mb, "MB")
    return rows


def generation(bench: Bench, shape: str) -> list[Row]:
    cell = Cell(shape, "generate", "answers")
    return [
        *row(bench, "generation", cell, rate, "new tok/s"),
        *workers(bench, "generation, ours as 2 workers × 1 thread", cell),
    ]


def row(bench: Bench, label: str, cell: Cell, of: Measure, unit: str) -> list[Row]:
    """The line of one cell, or none where it was not measured on both sides."""
    found = rounds(bench, cell, "ours"), rounds(bench, cell.peer, "peer")
    both = sorted(found[0].keys() & found[1].keys())
    if not both:
        return []
    ours, peer = ([of(side[n]) for n in both] for side in found)
    ratios = tuple(a / b for a, b in zip(ours, peer, strict=True))
    measured = all(side[n].matrix_rate for side in found for n in both)
    used = [median(side[n].utilisation for n in both) for side in found] if of is rate and measured else None
    return [Row(label, median(ours), median(peer), ratios, unit, (used[0], used[1]) if used else None)]


def workers(bench: Bench, label: str, cell: Cell) -> list[Row]:
    """Two workers' tokens a second, added up, against the peer on all cores."""
    a, b = (rounds(bench, cell, "workers", w) for w in (0, 1))
    peer = rounds(bench, cell.peer, "peer")
    both = sorted(a.keys() & b.keys() & peer.keys())
    if not both:
        return []
    ours = {n: a[n].rate + b[n].rate for n in both}
    ratios = tuple(ours[n] / peer[n].rate for n in both)
    return [Row(label, median(ours.values()), median(peer[n].rate for n in both), ratios, "tok/s", None)]


def rounds(bench: Bench, cell: Cell, side: str, worker: int = 0) -> dict[int, Found]:
    files = ((n, bench.file(cell, side, n, worker)) for n in range(100))
    return {n: load(f) for n, f in files if f.is_file()}


def agreement(bench: Bench, shape: str) -> str:
    """How many answers begin with the same 16 tokens on both sides."""
    cell = Cell(shape, "generate", "answers")
    ours, peer = rounds(bench, cell, "ours").get(0), rounds(bench, cell, "peer").get(0)
    if ours is None or peer is None:
        return ""
    same = sum(a.startswith(b.strip().rstrip("�")) for a, b in zip(ours.texts, peer.texts, strict=True))
    return f"{shape}: {same} of {len(peer.texts)} generated answers begin with the same 16 tokens on both sides."
