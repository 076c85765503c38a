"""The benchmarks run: a tiny shape through both sides' training and generation, the table, and the GPU script."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.performance import ours, table
from benchmarks.performance.peers import generating, training
from benchmarks.performance.peers.order import grouped
from benchmarks.performance.rounds import Bench, Cell
from benchmarks.performance.shapes import SHAPES, written
from benchmarks.performance.task import BATCH, Found, Task, Tuned
from leeway.data.types import Example

pytest.importorskip("trl")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    written(SHAPES["tiny"], folder, [f"{k} and {k + 1} are {2 * k + 1}" for k in range(50)])
    return folder


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    training.imports()


def examples() -> list[Example]:
    return [Example(f"t/{k}", f"{k} and {k + 1}?", f"They are {2 * k + 1}", f"No: {k}") for k in range(2 * BATCH)]


@pytest.mark.parametrize("objective", ["sft", "kl", "dpo", "orpo"])
def test_both_sides_count_the_same_tokens(models: Path, objective: str) -> None:
    """One step after one of warm-up; what the peer was given has as many tokens as what we rendered."""
    shared = {"what": "train", "shape": "tiny", "models": str(models), "objective": objective}
    found = [
        side.train(Task(side=name, **shared, steps=1, warmup=1), examples())  # type: ignore[arg-type]
        for name, side in (("ours", ours), ("peer", training))
    ]
    assert found[0].tokens == found[1].tokens > 0
    assert all(f.rate > 0 for f in found)


def test_both_sides_answer_alike_from_float32(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "DTYPE", "float32")
    monkeypatch.setattr(generating, "DTYPE", torch.float32)
    shared = {"what": "generate", "shape": "tiny", "models": str(models), "new_tokens": 6}
    asked = ["1 and 2?", "and 40", "30 and 31 are?"]
    mine = ours.generate(Task(side="ours", **shared), asked)  # type: ignore[arg-type]
    theirs = generating.generate(Task(side="peer", **shared, tuned=Tuned(batch=2)), asked)  # type: ignore[arg-type]
    assert mine.tokens == theirs.tokens
    assert mine.texts == [t.strip() for t in theirs.texts]


def test_grouping_keeps_every_row_and_puts_near_lengths_together() -> None:
    lengths = [3, 9, 4, 8, 2, 7, 1, 6]
    order = grouped(lengths, 2)
    assert sorted(order) == list(range(8))
    assert sorted((lengths[a], lengths[b]) for a, b in zip(order[::2], order[1::2], strict=True)) == [
        (2, 1),
        (4, 3),
        (7, 6),
        (9, 8),
    ]


def test_a_ratio_is_of_the_rounds_that_both_sides_have(tmp_path: Path) -> None:
    """Rates 30 and 20 against 10 and 10: ratios 3 and 2, whose median is 2.5; a third round has no peer."""
    bench, cell = Bench(tmp_path, print), Cell("S", "train", "sft")
    for side, tokens in (("ours", (30, 20, 99)), ("peer", (10, 10))):
        for n, count in enumerate(tokens):
            keep(bench.file(cell, side, n), Found(count, 1.0, peak_mb=100.0))
    (found,) = table.row(bench, "SFT", cell, lambda f: f.rate, "tok/s")
    assert found.ratios == (3.0, 2.0)
    assert "**2.50×** | 2.00–3.00, rounds: 2" in str(found)


def keep(file: Path, found: Found) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"task": {}, **asdict(found)}), "utf-8")


def test_the_gpu_script_runs_on_a_cpu() -> None:
    rate, lines = gpu.measured(gpu.SMOKE, torch.device("cpu"), 0.0)
    assert rate > 0
    assert [(line.side, line.objective) for line in lines][: len(gpu.ASKED)] == [("ours", o) for o in gpu.ASKED]
    assert all(line.steps >= gpu.FEWEST and line.tokens_per_s > 0 for line in lines)
    assert lines[0].utilisation
