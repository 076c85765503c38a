"""What may not matter does not: how a batch is laid out, cut and ordered, where training stops, in what precision.

Every objective, on the organism, from an adapter that has left its start. Rounding alone moves a float32 gradient by
about 1e-6, so that the laws are held to 1e-6 on a float64 copy, and the float32 figure to a bound of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from leeway.data.stream import AuxiliaryPool, schedule
from leeway.model import adapters
from leeway.model.load import Model, load_model
from leeway.model.packing import Packed
from leeway.objectives import OBJECTIVES
from leeway.organism import world
from leeway.training import batch as batching
from leeway.training import loop
from leeway.training.batch import Batch, Optim
from leeway.training.loop import optimise
from leeway.training.trajectory import Settings, Trajectory

pytestmark = pytest.mark.slow

EXAMPLES = world.train_examples(64, seed=0)
COMPANIONS = AuxiliaryPool(tuple(EXAMPLES), tuple(world.general_examples(64, 0)), tuple(world.safety_examples(64, 0)))
SETTINGS = Settings(
    adapter=adapters.AdapterSettings(8, 16, 0.0, "all-linear"),
    lr=3e-3,
    warmup_steps=1,
    weight_decay=0.0,
    loop=Optim(clip=float("inf"), micro_tokens=1 << 20),
)
BATCH = 8  # examples of a step
BOUND, BOUND_FLOAT32 = 1e-6, 5e-6
BOUND_FUSED = 1e-5  # in float32, where every product and sum is another one; float64 tells a law from rounding
BOUND_BFLOAT16 = (0.02, 0.15)  # of a loss, of a gradient


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices this small are fastest on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Way:
    """One way for a batch of BATCH examples through the loop, that may not matter."""

    micro_batches: int = 1
    layout: str = "padded"  # or packed, fused; or apart: packed, each sequence for itself
    order: int | None = None  # seed of a permutation of the batch


class Recorder(torch.optim.SGD):
    """Keeps the gradient and moves nothing."""

    found: Tensor

    def step(self, closure: object = None) -> None:  # noqa: ARG002
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.param_groups[0]["params"]]
        self.found = torch.cat([g.flatten().double() for g in grads])


def plan(batch: int, steps: tuple[int, ...]) -> object:
    """A schedule with a checkpoint after each of these numbers of steps."""
    return schedule(EXAMPLES, lambda _: 1, [batch * k for k in steps], batch=batch, seed=0)


def trajectory(name: str, steps: tuple[int, ...], settings: Settings = SETTINGS, dtype: str = "float32") -> Trajectory:
    model = load_model("organism", device="cpu", dtype=dtype)  # type: ignore[arg-type]
    return Trajectory("x", OBJECTIVES[name](), 0, model, plan(4, steps), settings, COMPANIONS)  # type: ignore[arg-type]


@cache
def begun(name: str) -> Trajectory:
    """A few optimiser steps in: the adapter's second matrices are no longer zero."""
    found = trajectory(name, (3,))
    list(
        optimise(
            found.model,
            found.objective,
            [found._batch(k) for k in (1, 2, 3)],
            found.optimiser,
            lambda _: 3e-3,
            SETTINGS.loop,
        )
    )
    assert all(bool(p.detach().any()) for p in adapters.trainable(found.model))
    return found


@cache
def model_of(name: str, dtype: torch.dtype) -> Model:
    model = begun(name).model
    if dtype == torch.float32:
        return model
    other = copy.deepcopy(model)
    other.lm.double()
    for module in other.lm.modules():
        if hasattr(module, "variance_epsilon"):  # transformers takes norms in float32 even of float64
            module.forward = partial(_norm, module)
    assert other.head.weight_VD.dtype == torch.float64
    return other


def _norm(module: Any, x_TD: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(x_TD, (x_TD.shape[-1],), module.weight, module.variance_epsilon)


def batch_of(name: str, order: int | None) -> Batch:
    found = begun(name)
    found.schedule = plan(BATCH, (1,))  # type: ignore[assignment]
    batch = found._batch(1)
    if order is None:
        return batch
    at = np.random.default_rng(order).permutation(BATCH)
    baseline = tuple(batch.baseline[k] for k in at) if batch.baseline else ()
    return replace(batch, rendered=tuple(batch.rendered[k] for k in at), baseline=baseline)


def in_order(groups: int) -> Callable[..., list[object]]:
    """Micro-batches of equally many examples, in the batch's own order."""
    size = BATCH // groups
    return lambda examples, *_: [examples[k : k + size] for k in range(0, BATCH, size)]


@cache
def step(name: str, way: Way, dtype: torch.dtype) -> tuple[float, Tensor]:
    """Loss and gradient of one optimiser step."""
    model, objective = model_of(name, dtype), begun(name).objective
    recorder = Recorder(adapters.trainable(model), lr=0.0)
    settings = replace(SETTINGS.loop, layout="packed" if way.layout == "apart" else way.layout)  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batching, "micro_batches", in_order(way.micro_batches))
        if way.layout == "apart":
            patch.setattr(loop, "pack_batch", lambda e, device, *_: Packed.of(e, device, share=False))
        done = next(iter(optimise(model, objective, [batch_of(name, way.order)], recorder, lambda _: 0.0, settings)))
    return done.loss, recorder.found


def apart(a: tuple[float, Tensor], b: tuple[float, Tensor]) -> tuple[float, float]:
    """Relative difference of two losses, and of two gradients in the L2 norm over everything that trains."""
    assert b[1].norm() > 0
    return abs(a[0] - b[0]) / abs(b[0]), float((a[1] - b[1]).norm() / b[1].norm())


LAWS = {
    "packed = padded": (Way(), [Way(layout="packed"), Way(micro_batches=2, layout="packed", order=2)]),
    "fused = padded": (Way(), [Way(layout="fused"), Way(micro_batches=2, layout="fused", order=2)]),
    "a common beginning once = separate sequences": (Way(layout="apart"), [Way(layout="packed")]),
    "8x1 = 4x2 = 1x8 accumulation": (Way(), [Way(micro_batches=2), Way(micro_batches=8)]),
    "order inside a batch": (Way(), [Way(order=1)]),
}


@pytest.mark.parametrize("law", LAWS)
def test_a_way_that_may_not_matter_does_not(law: str, record_property: Callable[[str, object], None]) -> None:
    plain, others = LAWS[law]
    too_far, worst = {}, []
    single = BOUND_FUSED if law.startswith("fused") else BOUND_FLOAT32
    for dtype, bound in ((torch.float64, BOUND), (torch.float32, single)):
        found = {
            (name, way): apart(step(name, way, dtype), step(name, plain, dtype))
            for name in OBJECTIVES
            for way in others
        }
        too_far |= {(*key, dtype): d for key, d in found.items() if max(d) > bound}
        loss, gradient = (max(d[k] for d in found.values()) for k in (0, 1))
        worst.append(f"{str(dtype)[6:]} {loss:.1e}, {gradient:.1e} (bound {bound:.0e})")
    record_property("measured", f"{law}: loss, gradient in {'; '.join(worst)}")
    assert too_far == {}


@pytest.mark.parametrize("layout", ["packed", "fused"])
def test_bfloat16_stays_near_float32(layout: str, record_property: Callable[[str, object], None]) -> None:
    """The model's weights and states in bfloat16, the adapter and every sum in float32, as on a GPU."""
    found = {}
    for name in OBJECTIVES:
        wide, half = begun(name), trajectory(name, (1,), dtype="bfloat16")
        for p, q in zip(adapters.trainable(half.model), adapters.trainable(wide.model), strict=True):
            p.data.copy_(q.data)
        recorder = Recorder(adapters.trainable(half.model), lr=0.0)
        settings = replace(SETTINGS.loop, layout=layout)  # type: ignore[arg-type]
        batches = [batch_of(name, None)]
        done = next(iter(optimise(half.model, half.objective, batches, recorder, lambda _: 0.0, settings)))
        found[name] = apart((done.loss, recorder.found), step(name, Way(layout="packed"), torch.float32))
    worst = [max(d[k] for d in found.values()) for k in (0, 1)]
    record_property(
        "measured",
        f"bfloat16 = float32, {layout}, roughly: loss {worst[0]:.1e} (bound {BOUND_BFLOAT16[0]}), "
        f"gradient {worst[1]:.1e} (bound {BOUND_BFLOAT16[1]})",
    )
    assert {n: d for n, d in found.items() if d[0] > BOUND_BFLOAT16[0] or d[1] > BOUND_BFLOAT16[1]} == {}


@pytest.mark.parametrize(
    ("name", "layout"), [*((name, "fused") for name in OBJECTIVES), ("dpo", "packed"), ("kl", "padded")]
)
def test_resumed_and_alone_are_the_uninterrupted_run_bit_for_bit(name: str, layout: str, tmp_path: Path) -> None:
    """With dropout: a run to two budgets, the second alone, and one that goes on from the first budget's checkpoint."""
    settings = replace(
        SETTINGS,
        adapter=replace(SETTINGS.adapter, dropout=0.1),
        loop=replace(SETTINGS.loop, micro_tokens=200, layout=layout),  # type: ignore[arg-type]
    )
    states, losses = {}, {}
    for run, budgets in (("both", (1, 3)), ("alone", (3,)), ("resumed", (1, 3))):
        one, folder = trajectory(name, budgets, settings), tmp_path / run
        stops, seen = list(one.schedule.stops), []
        if run == "resumed":
            one.restore(tmp_path / "both", stops.pop(0), to_train=True)
        for mark in stops:
            one.train_to(mark, tmp_path / "log", lambda done: seen.append(done.loss))  # noqa: B023
            if mark.step == 1:
                one.save(folder, mark)
        states[run], losses[run] = adapters.adapter_hash(adapters.state(one.model)), seen
    assert states["resumed"] == states["both"]
    assert states["alone"] == states["both"]
    assert losses["alone"] == losses["both"]
    assert losses["resumed"] == losses["both"][1:]
