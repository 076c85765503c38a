"""What the ranks of tests/test_ranks.py do: functions of a module, since each rank is a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leeway.data.stream import AuxiliaryPool, schedule
from leeway.model import adapters
from leeway.model.fsdp import is_shard, whole
from leeway.model.load import load_model
from leeway.model.reference import freeze
from leeway.objectives import OBJECTIVES
from leeway.organism import world
from leeway.training.batch import Optim
from leeway.training.distributed import ALONE, Distributed
from leeway.training.loop import optimise
from leeway.training.trajectory import Settings, Trajectory

EXAMPLES = world.train_examples(64, seed=0)
COMPANIONS = AuxiliaryPool(tuple(EXAMPLES), tuple(world.general_examples(64, 0)), tuple(world.safety_examples(64, 0)))
MARKS = (2, 3)  # optimiser steps
BATCH = 5  # of 2 ranks one has more to do


@dataclass(frozen=True)
class Case:
    """An objective, what trains under it, in what numbers, and how the batch is cut."""

    objective: str
    kind: str = "lora"
    dtype: torch.dtype = torch.float64
    micro_tokens: int = 300  # a few micro-batches for each rank, and not as many for both
    dropout: float = 0.0
    held: bool = False  # against the adapter that it starts as, as a second stage is
    model: str = "organism"

    @property
    def name(self) -> str:
        return f"{self.objective}-{self.kind}"


class Recorder(torch.optim.SGD):
    """Keeps the gradient, whole, and moves nothing."""

    found: Tensor

    def step(self, closure: object = None) -> None:  # noqa: ARG002
        parameters = [p for group in self.param_groups for p in group["params"]]
        grads = [torch.zeros_like(whole(p)) if p.grad is None else whole(p.grad) for p in parameters]
        self.found = torch.cat([g.detach().flatten().double() for g in grads])


def trajectory(case: Case, ranks: Distributed) -> Trajectory:
    half = case.dtype == torch.bfloat16
    model = load_model(case.model, device="cpu", dtype="bfloat16" if half else "float32")
    model.lm.to(case.dtype)
    settings = Settings(
        adapter=adapters.AdapterSettings(4, 8, case.dropout, "all-linear", case.kind),  # type: ignore[arg-type]
        lr=1e-3,
        warmup_steps=1,
        weight_decay=0.01,
        loop=Optim(clip=0.5, micro_tokens=case.micro_tokens),
    )
    plan = schedule(EXAMPLES, lambda _: 1, [BATCH * k for k in MARKS], batch=BATCH, seed=0)
    return Trajectory("x", OBJECTIVES[case.objective](), 0, model, plan, settings, COMPANIONS, ranks=ranks)


def _shift(one: Trajectory, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapters.trainable(one.model):
            p.add_(0.02 * torch.randn(p.shape, generator=generator, dtype=p.dtype))


def gradient(case: Case, ranks: Distributed = ALONE) -> tuple[float, float, Tensor, bool]:
    """Loss, norm and clipped gradient of a step away from the start, and whether anything is sharded."""
    one = trajectory(case, ranks)
    if case.held:
        _shift(one, seed=2)
        one.compared.frozen = freeze(one.model)
    _shift(one, seed=1)
    recorder = Recorder(adapters.trainable(one.model), lr=0.0)
    ranks.shard(one.model, recorder, one.compared)
    loop = replace(one.settings.loop, clip=0.5)
    done = next(
        iter(
            optimise(
                one.model, one.objective, [one._batch(1)], recorder, lambda _: 0.0, loop, one.compared, ranks=ranks
            )
        )
    )
    shards = any(is_shard(p) for p in one.model.lm.parameters())
    return done.loss, done.grad_norm, recorder.found, shards


def trained(case: Case, folder: Path, ranks: Distributed = ALONE, resumed: Path | None = None) -> None:
    """Train to both stops and save at each; where `resumed` is given, go on from its first checkpoint."""
    one = trajectory(case, ranks)
    stops = list(one.schedule.stops)
    if resumed is not None:
        one.restore(resumed / "0", stops.pop(0), to_train=True)
    for k, mark in enumerate(stops, len(MARKS) - len(stops)):
        one.train_to(mark, folder.with_suffix(".jsonl"), lambda _: None)
        one.save(folder / str(k), mark)


def everything(
    ranks: Distributed, say: Callable[[Any], None], gradients: list[Case], runs: list[Case], folder: Path
) -> None:
    """The gradient of every case; and runs, uninterrupted and resumed."""
    torch.set_num_threads(1)
    for case in gradients:
        loss, norm, grad, shards = gradient(case, ranks)
        say((case, (loss, norm, grad.numpy(), shards)))
    for case in runs:
        trained(case, folder / f"{case.name}-whole", ranks)
        trained(case, folder / f"{case.name}-resumed", ranks, folder / f"{case.name}-whole")


def fails(ranks: Distributed, say: Callable[[Any], None]) -> None:
    from leeway.errors import LeewayError

    say("here")
    if ranks.rank == 1:
        raise LeewayError("one rank cannot go on", fix="mend it")
