"""Interleaved rounds: the peer, ours, ours as two workers, and again, so that the machine's noise meets all alike."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from benchmarks.performance.task import NEW_TOKENS as USUAL_NEW_TOKENS
from benchmarks.performance.task import OBJECTIVES, PEER_OF, Found, Task, Tuned

STEPS = {"S": 12, "M": 6, "V": 3, "SmolLM2": 3, "tiny": 2}  # timed, of 16 examples
WARMUP = {"SmolLM2": 1}  # 2 elsewhere
NEW_TOKENS = {"SmolLM2": 64}  # of a generated answer
SIDES = ("peer", "ours", "workers")  # workers: two processes of one thread at once
TIMEOUT_S = 1800


@dataclass(frozen=True)
class Cell:
    """One thing that is measured on every side."""

    shape: str
    what: str
    objective: str
    pairs: str = "strangers"

    def name(self, side: str) -> str:
        return f"{self.shape}-{self.what}-{self.objective}-{self.pairs}-{side}"

    @property
    def peer(self) -> Cell:
        """What it is held against: plain fine-tuning where the peer has no such objective."""
        return replace(self, objective=PEER_OF.get(self.objective, self.objective))


def cells(shape: str, only: Seq[str]) -> list[Cell]:
    """Every objective, DPO on the other pairs too, and generation: all, or those that `only` names."""
    every = [Cell(shape, "train", o) for o in OBJECTIVES]
    every += [Cell(shape, "train", "dpo", "corrupted"), Cell(shape, "generate", "answers")]
    names = {c: c.objective if c.pairs == "strangers" else f"{c.objective}-{c.pairs}" for c in every}
    return [c for c in every if not only or names[c] in only]


@dataclass
class Bench:
    """Where results are kept; what is there is not measured again."""

    out: Path
    tell: Callable[[str], None]
    threads: int = 2
    clock: Literal["wall", "cpu"] = "wall"
    steps: int | None = None

    def file(self, cell: Cell, side: str, n: int, worker: int = 0) -> Path:
        return self.out / "results" / cell.name(side) / f"{n}{'ab'[worker] if side == 'workers' else ''}.json"

    def run(self, asked: Seq[Cell], rounds: int) -> None:
        for n in range(rounds):
            for side, cell in _in_turn(asked):
                if side == "workers" and self.clock == "cpu":
                    continue  # what two workers reach together is a matter of the wall clock
                files = [self.file(cell, side, n, w) for w in range(2 if side == "workers" else 1)]
                if not all(f.is_file() for f in files):
                    self.measure([(self.task(cell, side), f) for f in files])
                    self.tell(f"round {n + 1}: {cell.name(side)}: {sum(load(f).rate for f in files):,.0f} tok/s")

    def task(self, cell: Cell, side: str) -> Task:
        return Task(
            side="peer" if side == "peer" else "ours",
            what=cell.what,  # type: ignore[arg-type]
            shape=cell.shape,
            models=str(self.out / "models"),
            objective=cell.objective,
            pairs=cell.pairs,  # type: ignore[arg-type]
            steps=self.steps or STEPS[cell.shape],
            warmup=WARMUP.get(cell.shape, 2),
            new_tokens=NEW_TOKENS.get(cell.shape, USUAL_NEW_TOKENS),
            threads=1 if side == "workers" else self.threads,
            clock=self.clock,
            tuned=self.tuned(cell),
        )

    def measure(self, at_once: Seq[tuple[Task, Path]]) -> None:
        """Each task in a process of its own, all at the same time; raises where one fails."""
        running = []
        for task, file in at_once:
            file.parent.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, "-m", "benchmarks.performance.measure", task.to_json(), str(file)]
            log = file.with_suffix(".log").open("w", encoding="utf-8")
            running.append(subprocess.Popen(command, stdout=log, stderr=log))
        for process, (task, file) in zip(running, at_once, strict=True):
            if process.wait(TIMEOUT_S):
                raise RuntimeError(f"{task.to_json()} failed: see {file.with_suffix('.log')}")

    def tuned(self, cell: Cell) -> Tuned:
        """What --tune found for the peer on this shape; its defaults where it was not tuned."""
        return tuned_of(cell.shape).get(cell.peer.objective, Tuned())


def _in_turn(asked: Seq[Cell]) -> Iterator[tuple[str, Cell]]:
    """(side, cell): a peer's cell once, right before the first of ours that is held against it."""
    met: set[Cell] = set()
    for cell in asked:
        if cell.peer not in met:
            met.add(cell.peer)
            yield "peer", cell.peer
        yield "ours", cell
        yield "workers", cell


TUNED = Path(__file__).parent / "tuned.json"


def tunings() -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = json.loads(TUNED.read_text("utf-8")) if TUNED.is_file() else {}
    return found


def tuned_of(shape: str) -> dict[str, Tuned]:
    """By objective, and `answers`."""
    named = ((key.split("-", 1), found) for key, found in tunings().items())
    return {name: Tuned(**found) for (of, name), found in named if of == shape}  # type: ignore[arg-type]


def tune(bench: Bench, asked: Seq[Cell]) -> None:
    """The peer's fastest batch size, then precision, attention and head around it, kept beside this file."""
    for cell in dict.fromkeys(c.peer for c in asked if c.pairs == "strangers"):
        best, rate = Tuned(), 0.0
        for trial in _trials(cell):
            tuned = replace(best, **trial)
            name = "-".join(f"{k}-{v}" for k, v in asdict(tuned).items())
            file = bench.out / "tuning" / cell.name("peer") / f"{name}.json"
            if not file.is_file():
                bench.measure([(replace(bench.task(cell, "peer"), tuned=tuned, steps=4, warmup=1), file)])
            found = load(file).rate
            bench.tell(f"{cell.name('peer')} {name}: {found:,.0f} tok/s")
            best, rate = (tuned, found) if found > rate else (best, rate)
        known = {**tunings(), f"{cell.shape}-{cell.objective}": asdict(best)}
        TUNED.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", "utf-8")


def _trials(cell: Cell) -> list[dict[str, object]]:
    if cell.what == "generate":
        return [{"batch": b} for b in (32, 64, 128, 256)] + [{"attention": "eager"}]
    heads: list[dict[str, object]] = [{"plain_head": True}] if cell.objective == "sft" else []
    sizes: list[dict[str, object]] = [{"batch": b} for b in (4, 8, 16)]
    return [*sizes, {"autocast": False}, {"attention": "eager"}, *heads]


def load(file: Path) -> Found:
    raw = json.loads(file.read_text("utf-8"))
    raw.pop("task")
    return Found(**raw)
