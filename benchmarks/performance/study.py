"""What a study of six objectives and six budgets would take, from the measured parts and its exact token counts."""

from __future__ import annotations

from functools import cache
from statistics import median
from typing import TYPE_CHECKING

from benchmarks.performance.rounds import Bench, Cell, load
from benchmarks.performance.task import BATCH, NEW_TOKENS, OBJECTIVES, PEER_OF

if TYPE_CHECKING:
    from leeway.data.chat import Chat

BUDGETS = (25_000, 50_000, 100_000, 200_000, 400_000, 800_000)  # source tokens
PROMPTS = 256  # asked of every checkpoint


@cache
def tokens(folder: str, objective: str, peer: bool) -> tuple[int, ...]:
    """Tokens that a side processes up to each budget: all that it renders of the examples that the budget spans."""
    from benchmarks.performance.texts import examples
    from leeway.data.stream import schedule
    from leeway.model.load import load_chat
    from leeway.objectives import OBJECTIVES as CLASSES
    from leeway.training.batch import Renderer

    chat = load_chat(folder)
    cut = schedule(examples("strangers"), lambda e: _source(chat, e), BUDGETS, batch=BATCH, seed=0)
    made = CLASSES["sft" if peer and objective == "ip" else objective]()
    known = chat.with_control_tokens(made.control_tokens) if made.control_tokens and not peer else chat
    renderer = Renderer(made, known, 0)
    ends, total, found = {m.step for m in cut.stops}, 0, {}
    for k, slots in enumerate(cut.steps, 1):
        total += sum(renderer.processed(s) for s in slots)
        if k in ends:
            found[k] = total
    return tuple(found[m.step] for m in cut.stops)


def _source(chat: Chat, e: object) -> int:
    return len(chat.sequence(e.prompt, e.preferred).ids)  # type: ignore[attr-defined]


def told(bench: Bench, shape: str) -> str:
    """Minutes of the study in three ways, and the ratios; nothing where a part was not measured."""
    peer = [_rate(bench, Cell(shape, "train", PEER_OF.get(o, o)), "peer") for o in OBJECTIVES]
    ours = [_best(bench, Cell(shape, "train", o)) for o in OBJECTIVES]
    answers = Cell(shape, "generate", "answers")
    rates = (*peer, *ours, _rate(bench, answers, "peer"), _best(bench, answers))
    if not all(rates):
        return ""
    folder = str(bench.out / "models" / shape)
    theirs = [tokens(folder, o, True) for o in OBJECTIVES]
    own = [tokens(folder, o, False) for o in OBJECTIVES]
    new = len(OBJECTIVES) * len(BUDGETS) * PROMPTS * NEW_TOKENS
    asked, answered = new / rates[-2], new / rates[-1]
    setup = median(_setups(bench, shape, "peer") or [0.0])
    cells = sum(sum(t) / r for t, r in zip(theirs, peer, strict=True)) + setup * 36 + asked
    single = sum(t[-1] / r for t, r in zip(theirs, peer, strict=True)) + setup * 6 + asked
    leeway = sum(t[-1] / r for t, r in zip(own, ours, strict=True)) + median(_setups(bench, shape, "ours") or [0.0]) * 6
    leeway += answered
    return "\n".join(
        [
            f"| {shape}, study of 6 × 6, extrapolated from the rates above | minutes | ours is |",
            "|---|---|---|",
            f"| ours: 6 trajectories and 36 evaluations | {leeway / 60:.1f} | |",
            f"| peer: 36 cells and `generate` | {cells / 60:.1f} | **{cells / leeway:.1f}×** as fast |",
            f"| peer: a trajectory per objective and `generate` | {single / 60:.1f} | **{single / leeway:.1f}×** "
            "as fast |",
        ]
    )


def _rate(bench: Bench, cell: Cell, side: str) -> float:
    """Median tokens a second over the rounds, the reference included; of two workers, the sum. 0: not measured."""
    found = []
    for n in range(100):
        files = [bench.file(cell, side, n, w) for w in range(2 if side == "workers" else 1)]
        if all(f.is_file() for f in files):
            found.append(sum(load(f).rate for f in files))
    return median(found) if found else 0.0


def _best(bench: Bench, cell: Cell) -> float:
    """Ours as a study runs, two workers of one thread; as one process of two threads where that was not measured."""
    return _rate(bench, cell, "workers") or _rate(bench, cell, "ours")


def _setups(bench: Bench, shape: str, side: str) -> list[float]:
    files = (bench.file(Cell(shape, "train", o), side, 0) for o in OBJECTIVES)
    return [load(f).setup_seconds for f in files if f.is_file()]
