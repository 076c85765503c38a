"""A small study for real, from start to end on both sides: six objectives, three budgets, answers at each checkpoint.

It checks what `study.py` extrapolates. The peer's side is one process that loads, trains and asks every cell in turn
(`python -m benchmarks.performance.real FILE`); ours is `leeway run` on the same data, corrupted pairs on both sides.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.performance.task import BATCH, CLIP, LORA, LR, OBJECTIVES, PEER_OF, WARMUP, Task, Tuned

BUDGETS = (2_000, 4_000, 8_000)  # source tokens
PROMPTS, NEW_TOKENS = 32, 64


@dataclass(frozen=True)
class Spent:
    """Seconds by the wall clock and of all processors, from start to end, imports included."""

    side: str
    wall: float
    cpu: float


def run(shape: str, out: Path, tuned: dict[str, Tuned]) -> str:
    """Both sides, the peer first; what was spent stays in `out`."""
    folder = out / "real" / shape
    folder.mkdir(parents=True, exist_ok=True)
    model = out / "models" / shape
    asked = folder / "asked.json"
    asked.write_text(json.dumps({"model": str(model), "tuned": {k: asdict(v) for k, v in tuned.items()}}), "utf-8")
    (folder / "study.yaml").write_text(json.dumps(_study(model)), "utf-8")
    commands = {
        "peer": [sys.executable, "-m", "benchmarks.performance.real", str(asked)],
        "ours": [sys.executable, "-m", "leeway", "run", str(folder / "study.yaml"), "--out", str(folder / "run")],
    }
    spent = [_timed(side, command, folder / f"{side}.log") for side, command in commands.items()]
    (folder / "spent.json").write_text(json.dumps([asdict(s) for s in spent], indent=1), "utf-8")
    return told(shape, out)


def told(shape: str, out: Path) -> str:
    """A line for each side and the ratio; nothing where it was not run."""
    file = out / "real" / shape / "spent.json"
    if not file.is_file():
        return ""
    peer, ours = (Spent(**s) for s in json.loads(file.read_text("utf-8")))
    budgets = ", ".join(f"{b:,}" for b in BUDGETS)
    return "\n".join(
        [
            f"| {shape}, run from start to end: 6 objectives × {budgets} tokens | seconds | CPU seconds |",
            "|---|---|---|",
            f"| peer: 18 cells and `generate` | {peer.wall:,.0f} | {peer.cpu:,.0f} |",
            f"| ours | {ours.wall:,.0f} | {ours.cpu:,.0f} |",
            f"| peer / ours | **{peer.wall / ours.wall:.1f}×** | {peer.cpu / ours.cpu:.1f}× |",
        ]
    )


def _timed(side: str, command: list[str], log: Path) -> Spent:
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with log.open("w", encoding="utf-8") as lines:
        subprocess.run(command, stdout=lines, stderr=lines, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Spent(side, time.perf_counter() - began, cpu)


def _study(model: Path) -> dict[str, Any]:
    """JSON is YAML."""
    return {
        "name": "small",
        "model": str(model),
        "dtype": "bfloat16",
        "task": "gsm8k",
        "pairs": {"from": "corrupted"},
        "adapter": {"r": LORA["r"], "alpha": LORA["alpha"], "dropout": LORA["dropout"]},
        "objectives": list(OBJECTIVES),
        "budgets": list(BUDGETS),
        "reference": "cached",
        "optim": {"lr": LR, "warmup_steps": WARMUP, "batch": BATCH, "clip": CLIP},
        "evals": {
            "capability": [{"name": "gsm8k", "limit": PROMPTS, "max_new_tokens": NEW_TOKENS}],
            "conditions": "first",
        },
    }


def cells(model: Path, tuned: dict[str, Tuned]) -> None:
    """Every objective at every budget from the base on, and its answers to the questions."""
    from benchmarks.performance.peers import generating, training
    from benchmarks.performance.texts import examples, questions
    from leeway.data.stream import schedule
    from leeway.model.load import load_chat

    training.imports()
    chat, data, asked = load_chat(str(model)), examples("corrupted"), questions(PROMPTS)
    cut = schedule(data, lambda e: len(chat.sequence(e.prompt, e.preferred).ids), BUDGETS, batch=BATCH, seed=0)
    for objective in OBJECTIVES:
        for mark in cut.stops:
            settings = tuned.get(PEER_OF.get(objective, objective), Tuned())
            task = Task("peer", "train", model.name, str(model.parent), objective, "corrupted", mark.step, 0)
            lm = training.trained(replace(task, tuned=settings), data[: mark.examples])
            generating.answers(lm, generating.tokenizer(task), asked, tuned.get("answers", Tuned()).batch, NEW_TOKENS)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    told_to = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    cells(Path(told_to["model"]), {k: Tuned(**v) for k, v in told_to["tuned"].items()})
