"""`python -m benchmarks.growth [--out FILE]`: how time and memory grow with a study, as a table.

Times are CPU seconds of one thread, medians of three, so that other work on the machine does not enter them; memory is
what a process of its own held at most beyond what it held when its model stood there (Linux alone tells that).
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from leeway.data.chat import Sequence
from leeway.model import adapters
from leeway.model.load import Model
from leeway.model.packaged import quiet_loaders
from leeway.model.reference import ReferenceCache
from leeway.model.token_stats import Head
from leeway.objectives import kl, sft
from leeway.study.load import load
from leeway.study.prepare import prepare
from leeway.study.run_dir import RunDir
from leeway.study.worker import Worker
from leeway.training.batch import Batch, Optim
from leeway.training.loop import Step, optimise
from leeway.training.trajectory import Trajectory

TIMES = 3
DEMO = 64_000  # source tokens of the demo's trajectories of the organism: fewer than any real study's
LAST = 16_000  # of a shorter one
EXAMPLES = 150  # that the second seed meets too, in another order
MIB = 2**20


@dataclass(frozen=True)
class Line:
    what: str
    value: str
    asked: str = ""


def study(kind: str, budgets: str, seed: int = 0, limit: int | None = None) -> Worker:
    settings = [f"objectives=[{kind}]", f"budgets={budgets}", f"seeds=[{seed}]", "evals={persona: {source: organism}}"]
    settings += [f"task={{name: organism, limit: {limit}}}"] if limit else []
    return Worker(prepare(load("demo", tuple(settings))), RunDir(Path(tempfile.mkdtemp())), lambda *_: None)


def trajectory(work: Worker, kept: Path | None = None) -> Trajectory:
    (at,) = work.prepared.schedules
    return work.trial(*at, work.prepared.schedules[at], None if kept is None else ReferenceCache(kept))


def train(t: Trajectory, tick: Callable[[Step], None] = lambda _: None) -> float:
    """CPU seconds of the whole trajectory with its checkpoints."""
    with tempfile.TemporaryDirectory() as out:
        began = time.process_time()
        for mark in t.schedule.stops:
            t.train_to(mark, Path(out) / "steps", tick)
            t.save(Path(out) / str(mark.budget), mark)
        return time.process_time() - began


def budgets() -> Iterator[Line]:
    """Twice as many checkpoints of the same run, and the pace of its two halves."""
    few, many = (study("sft", str([DEMO // d for d in ds])) for ds in ((4, 1), (8, 4, 2, 1)))
    train(trajectory(few))
    spent: dict[str, list[float]] = {"few": [], "many": [], "halves": []}
    for _ in range(TIMES):
        spent["few"].append(train(trajectory(few)))
        pace: list[float] = []
        spent["many"].append(train(trajectory(many), _pacer(pace)))
        half = len(pace) // 2
        spent["halves"].append(sum(pace[half:]) / (len(pace) - half) / (sum(pace[:half]) / half))
    added = median(spent["many"]) / median(spent["few"]) - 1
    spread = (max(spent["few"]) - min(spent["few"])) / median(spent["few"])
    told = f"{added:+.1%} ({median(spent['few']):.1f} s with 2; these differ by {spread:.1%} among themselves)"
    yield Line(f"4 budgets to {DEMO:,} tokens in place of 2, training time", told, "< +3%")
    yield Line("seconds a token, second half of a trajectory to the first", f"{median(spent['halves']):.2f}", "1")


def _pacer(pace: list[float]) -> Callable[[Step], None]:
    """Keeps CPU seconds a token of every step."""
    at = time.process_time()

    def tick(done: Step) -> None:
        nonlocal at
        now = time.process_time()
        pace.append((now - at) / done.processed_tokens)
        at = now

    return tick


def reuse() -> Iterator[Line]:
    """What a second seed, another weight and another objective ask the reference anew."""
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder)
        for what, kind, seed in (
            ("DPO, first", "dpo", 0),
            ("DPO, a second seed over the same examples", "dpo", 1),
            ("IPO", "ipo", 0),
            ("KL, first", "kl", 0),
            ("KL, another weight", "{kl: {weight: 1}}", 0),
            ("KL, a second seed", "kl", 1),
        ):
            t = trajectory(study(kind, f"[{LAST}]", seed, EXAMPLES), kept)
            began = time.process_time()
            tokens = t.precompute_reference()
            seconds, size = time.process_time() - began, ReferenceCache(kept).size()[2]
            needed = sum(t.compared.spent.values())
            told = f"{tokens:,} of {needed:,}, {seconds:.2f} s; {size / MIB:.2f} MiB on disk"
            yield Line(f"reference tokens computed: {what}", told, "" if "first" in what else "0")


def length() -> Iterator[Line]:
    short, long = (alone(_held_by_study, n) for n in (LAST // 4, LAST))
    told = f"{long / short:.2f} ({short:.0f} and {long:.0f} MiB beyond the model)"
    yield Line(f"peak memory, KL to {LAST:,} tokens to one to {LAST // 4:,}", told, "1")


def vocabulary() -> Iterator[Line]:
    for dtype in ("float32", "bfloat16"):
        for kind in ("sft", "kl"):
            small, large = (alone(_held_by_vocabulary, v, dtype, kind) for v in (8_000, 128_000))
            told = f"{large / small:.2f} ({small:.0f} and {large:.0f} MiB beyond the model)"
            yield Line(f"peak memory, vocabulary 128k to 8k, {kind.upper()}, {dtype}", told, "< 1.3")


def alone(what: Callable[..., float], *given: object) -> float:
    """In a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(what, given)


def _held_by_study(last: int) -> float:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as kept:
        t = trajectory(study("kl", f"[{last}]"), Path(kept))
        before = _standing()
        train(t)
        return _peak() - before


def _held_by_vocabulary(size: int, dtype: str, kind: str) -> float:
    """One optimiser step of eight examples of 256 tokens in one micro-batch."""
    from transformers import LlamaConfig, LlamaForCausalLM

    quiet_loaders()
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=size, hidden_size=256, intermediate_size=688, num_hidden_layers=6, num_attention_heads=4
    )
    lm: Any = LlamaForCausalLM(config).to(getattr(torch, dtype)).eval().requires_grad_(False)
    chat: Any = None  # nothing is rendered
    model = Model(lm, chat, Head(lm.lm_head.weight), "random", "random", 4096, ())
    adapters.attach(model, adapters.AdapterSettings(16, 32, 0.05, "all-linear"), seed=0)
    ids = np.random.default_rng(0).integers(0, size, (8, 256)).tolist()
    examples = tuple((Sequence(tuple(row), 128),) for row in ids)
    optimiser = torch.optim.AdamW(adapters.trainable(model), lr=1e-4)
    objective: Any = kl.Kl() if kind == "kl" else sft.Sft()
    before = _standing()
    batch = Batch(1, 0, tuple("abcdefgh"), examples)
    list(optimise(model, objective, [batch], optimiser, lambda _: 1e-4, Optim(1.0, 2048)))
    return _peak() - before


def _standing() -> float:
    """MiB that this process holds now; its peak begins again here."""
    Path("/proc/self/clear_refs").write_text("5", "ascii")
    return _status("VmRSS")


def _peak() -> float:
    return _status("VmHWM")


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def table(lines: list[Line]) -> str:
    rows = [f"| {line.what} | {line.value} | {line.asked} |" for line in lines]
    return "\n".join(["| | measured | asked |", "|---|---|---|", *rows]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__)
    parser.add_argument("--out", type=Path, help="where the table goes too")
    told = parser.parse_args()
    torch.set_num_threads(1)
    lines = [line for part in (budgets, reuse, length, vocabulary) for line in part()]
    print(table(lines))
    if told.out:
        told.out.write_text(table(lines), "utf-8")


if __name__ == "__main__":
    main()
