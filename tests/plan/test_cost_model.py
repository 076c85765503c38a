"""Cost formulas by hand on round numbers, published model shapes, a stand-in tokenizer."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from leeway.errors import LeewayError
from leeway.model import adapters
from leeway.model.load import decoder, load_model
from leeway.plan import cost_model, hardware, plan
from leeway.plan.cost_model import EvalCost, Shape
from leeway.plan.hardware import KNOWN, Machine, meta_model
from leeway.study.load import load

SHAPE = Shape(
    total=1200,
    trained=10,
    body=1000,
    head=100,
    layers=2,
    hidden=8,
    inner=16,
    queries=8,
    keys=4,
    adapted=50,
    full=False,
    bytes=2,
    heads=2,
)


GPU = Machine("m", flops=1e6, head=1e6, decoding=1e6, bandwidth=1e3, passes=math.inf, memory=1.0, assumed="")
CPU = Machine("c", flops=4e6, head=2e6, decoding=1e6, bandwidth=1e4, passes=1e5, memory=None, assumed="")


def test_training_seconds_by_hand() -> None:
    # 7 tokens, 3 of them targets: forward 2 and back 2 a frozen weight, 6 an adapter's; the head at targets alone
    policy = 7 * (4 * 1000 + 6 * 10) + 3 * 4 * 100
    assert cost_model.training_seconds(SHAPE, GPU, 7, 3) == pytest.approx(policy / 1e6)
    assert cost_model.forward_seconds(SHAPE, GPU, 7, 3) == pytest.approx((7 * 2 * 1000 + 3 * 2 * 100) / 1e6)
    full = replace(SHAPE, full=True, trained=1200)
    assert cost_model.training_seconds(full, GPU, 7, 3) == pytest.approx((7 * 6 * 1000 + 3 * 6 * 100) / 1e6)
    kl = cost_model.training_seconds(SHAPE, GPU, 7, 3, divergence=True)
    assert kl == pytest.approx((policy + 3 * 4 * 100) / 1e6)


def test_a_cpu_adds_passes_and_steps_and_has_a_rate_of_its_own_for_the_head() -> None:
    kept = cost_model.pass_bytes(SHAPE, 0.0) * cost_model.PASSES / 1e5
    body, head = 7 * (4 * 1000 + 6 * 10) / 4e6, 3 * 4 * 100 / 2e6
    assert cost_model.training_seconds(SHAPE, CPU, 7, 3) == pytest.approx(body + head + 7 * kept)
    more = cost_model.training_seconds(SHAPE, CPU, 7, 3, steps=5) - cost_model.training_seconds(SHAPE, CPU, 7, 3)
    assert more == pytest.approx(5 * 2 * cost_model.STEP)


@pytest.mark.parametrize("machine", [GPU, CPU])
def test_seconds_scale_with_tokens(machine: Machine) -> None:
    one, two = (cost_model.training_seconds(SHAPE, machine, 7 * k, 3 * k, steps=k) for k in (1, 2))
    assert two == pytest.approx(2 * one)
    one, two = (
        cost_model.eval_seconds(SHAPE, EvalCost("x", 4 * k, 40 * k, 6, 12.0 * k), machine, batch=4) for k in (1, 2)
    )
    assert two == pytest.approx(2 * one)


def test_answering_takes_the_slower_of_reading_weights_and_computing() -> None:
    e = EvalCost("x", answers=5, prompt_tokens=50, max_new_tokens=4, answer_tokens=10.0)
    prompts = (50 * 2 * 1000 + 5 * 2 * 100) / 1e6
    kv = 2 * 2 * 4 * 2  # keys and values, layers, heads' width, bytes
    step = (1200 * 2 + 2 * (50 / 5 + 4 / 2) * kv) / 1e3
    assert cost_model.eval_seconds(SHAPE, e, GPU, batch=2) == pytest.approx(prompts + 3 * 4 * step)
    fast_memory = replace(GPU, bandwidth=1e12)
    assert cost_model.eval_seconds(SHAPE, e, fast_memory, batch=2) == pytest.approx(
        prompts + 3 * 4 * 2 * 2 * 1100 / 1e6
    )
    reading = cost_model.forward_seconds(SHAPE, CPU, 50, 5)
    each = 2 * 1000 / 1e6 + 2 * 100 / 2e6 + 2 * 8 * cost_model.DECODED / 1e5
    tokens = 10 * (each + (50 / 5 + 4 / 2) * kv / 1e4)  # finished rows leave a CPU's batch
    assert cost_model.eval_seconds(SHAPE, e, CPU, batch=2) == pytest.approx(reading + tokens)
    choices = EvalCost("p", answers=5, prompt_tokens=50, max_new_tokens=0, answer_tokens=0.0)
    assert cost_model.eval_seconds(SHAPE, choices, GPU, batch=2) == pytest.approx(prompts)


def test_memory_by_hand() -> None:
    found = cost_model.memory(SHAPE, micro_tokens=10, dropout=0.05, batch=3, context=20)
    assert found.weights == 2400
    assert found.adapter == 10 * (4 + 4 + 8)  # weight, gradient, two moments
    layer = 16 * 8 + 2 * 2 * (8 + 4) + 2 * 3 * 16
    assert found.activations == 10 * (2 * layer + 50 * 5)
    assert found.cache == 3 * 20 * 32
    assert found.peak == 2400 + 160 + max(found.activations, found.cache)
    fused = cost_model.memory(replace(SHAPE, fused=True), 10, 0.05, batch=3, context=20, length=5)
    least = 2 * 2 * (8 + 4) + 2 * 2 * (8 + 16)  # norms and SwiGLU are computed again
    assert fused.activations == cost_model.HELD * 10 * 2 * (least + 2 * 2 * 5)  # and what each head attends to
    assert fused.peak == 2400 + 160 + fused.activations + fused.cache  # a CPU's process keeps what it frees


def test_activations_are_near_what_autograd_keeps() -> None:
    """The formula against the bytes that a backward pass waits for on a real model, in float32 on a CPU."""
    spec = load("objective-matters", ("model=organism", "task=organism"))
    shape = replace(plan._shape(spec, hardware.planned_model(spec), cpu=True), fused=False)
    model = load_model("organism", device="cpu")
    adapters.attach(model, spec.adapter, seed=0)
    weights = {p.untyped_storage().data_ptr() for p in model.lm.parameters()}
    kept: dict[int, int] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in weights:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    model.lm.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        inner = model.lm.get_base_model()
        hidden = decoder(inner)(input_ids=torch.arange(64)[None] % 50, use_cache=False).last_hidden_state
    assert hidden.requires_grad
    found = cost_model.memory(shape, 64, spec.adapter.dropout, 1, 1).activations
    assert sum(kept.values()) == pytest.approx(found, rel=0.25)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248),
        ("google/gemma-2-2b-it", 2_614_341_888),
        ("google/gemma-2-9b-it", 9_241_705_984),
        ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
        ("Qwen/Qwen3-4B", 4_022_468_096),
    ],
)
def test_published_shapes_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    lm = meta_model(KNOWN[name].config())
    assert sum(p.numel() for p in lm.parameters()) == parameters


def test_the_shape_of_llama_by_hand() -> None:
    lm = meta_model(KNOWN["meta-llama/Llama-3.1-8B-Instruct"].config())
    spec = load("objective-matters")
    shape = cost_model.shape(lm, plan.target_layers(spec, lm), 16, full=False, width=2)
    ins = 4096 * 6 + 14336
    outs = 4096 + 1024 + 1024 + 4096 + 14336 + 14336 + 4096
    assert shape.trained == 16 * 32 * (ins + outs) == 41_943_040
    assert shape.adapted == 32 * ins
    assert shape.head == 128256 * 4096
    assert shape.body == 8_030_261_248 - 2 * shape.head
    assert shape.kv_bytes == 131_072


def test_a_gpu_by_name_at_the_assumed_utilisation() -> None:
    found = hardware.on_gpu("h100", 0.5, 0.25)
    assert (found.flops, found.bandwidth, found.memory) == (989.4e12 / 2, 3350e9 / 4, 80e9)
    assert found.flops == found.head == found.decoding
    assert "50% (--mfu)" in found.assumed
    assert hardware.gpu("rtx 4090").name == "RTX-4090"
    with pytest.raises(LeewayError, match="--gpu H1000: not known"):
        hardware.gpu("H1000")
    with pytest.raises(LeewayError, match="--mfu 2 is not in"):
        hardware.on_gpu("L4", 2.0)
    assert all(g.source and g.memory_gb > 0 and math.isfinite(g.tflops) for g in hardware.GPUS.values())


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ((None, 0.3, None, None, None), "--mfu needs a GPU"),
        ((None, None, None, 2.0, None), "--price needs a GPU"),
        (("L4", None, None, None, "cheap"), "--judge-price 'cheap' is not a price"),
        (("L4", None, None, None, "1/2/3"), "is not a price"),
    ],
)
def test_impossible_prices(given: tuple[object, ...], part: str) -> None:
    with pytest.raises(LeewayError, match=part):
        plan.machine_and_prices(*given)  # type: ignore[arg-type]


def test_a_judges_price_for_reading_and_writing() -> None:
    assert plan.machine_and_prices("L4", None, None, 1.0, "0.15/0.6")[1] == plan.Prices(1.0, (0.15, 0.6))
    assert plan.machine_and_prices("L4", None, None, None, "2")[1] == plan.Prices(None, (2.0, 2.0))


SMALL = ("model=organism", "task=organism", "budgets=[500]", "objectives=[sft]", "claims=null")


def test_dollars_are_hours_times_the_price_and_are_not_printed_without_one() -> None:
    spec = load("objective-matters", SMALL)
    machine, prices = plan.machine_and_prices("A10G", None, None, 2.0, None)
    planned = plan.plan(spec, machine, prices)
    assert planned.cost.dollars == pytest.approx(2.0 * planned.estimated_hours)
    assert planned.cost.fits is True
    text = plan.plan(spec, machine).to_text()
    assert "GPU rental: no price given (--price)" in text
    assert "estimated by formulas on A10G, not measured" in text
    assert "$" not in text


def test_a_cpu_is_timed_in_the_dtype_and_shape_of_the_study(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 products twice as fast as float32: hours fall, the rate is printed, and only `--measure` is better."""
    seen: list[tuple[object, ...]] = []

    def timed(hidden: int, inner: int, dtype: torch.dtype, batch: int, *, workers: int, threads: int) -> Machine:
        seen.append((hidden, inner, dtype, batch, workers, threads))
        rate = 2e9 if dtype == torch.bfloat16 else 1e9
        return Machine("this CPU", rate, 1e9, rate, 1e10, 1e10, None, f"{rate:.0e} FLOP/s")

    monkeypatch.setattr(hardware, "this_cpu", timed)
    slow, fast = (plan.plan(load("demo", (f"dtype={d}", "objectives=[sft]"))) for d in ("float32", "bfloat16"))
    assert [s[:3] for s in seen] == [(128, 352, torch.float32), (128, 352, torch.bfloat16)]
    assert fast.estimated_hours < slow.estimated_hours
    assert "assumed: 2e+09 FLOP/s" in fast.to_text()
    assert "not measured" in fast.to_text()


def test_workers_share_the_hours_and_add_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "this_cpu", lambda *_, **__: CPU)
    spec = load("demo", ("objectives=[sft, orpo]",))
    one, two = (plan.plan(spec, workers=n) for n in (1, 2))
    assert one.cost.training_hours == two.cost.training_hours
    assert one.estimated_hours / 2 <= two.estimated_hours < one.estimated_hours
    assert two.estimated_memory_gib > 2 * one.estimated_memory_gib
    assert "on c with 2 workers" in two.to_text()
    sft, orpo = (next(t for t in one.trajectories if t.objective == name) for name in ("sft", "orpo"))
    assert sft.distinct_tokens == sft.processed_tokens
    assert sft.processed_tokens < orpo.distinct_tokens < orpo.processed_tokens  # a pair's beginning once


def test_the_rates_of_this_cpu_are_positive_and_named() -> None:
    threads = torch.get_num_threads()
    found = hardware.this_cpu(32, 64, torch.bfloat16, 8, workers=2)
    assert min(found.flops, found.head, found.decoding, found.bandwidth, found.passes) > 0
    assert found.is_cpu
    assert "GFLOP/s in bfloat16" in found.assumed
    assert "--measure" in found.assumed
    assert torch.get_num_threads() == threads


def test_too_little_memory_is_reported_with_advice() -> None:
    spec = load("objective-matters", (*SMALL, "optim.micro_tokens=16777216"))
    planned = plan.plan(spec, hardware.on_gpu("A10G"))
    assert planned.cost.fits is False
    assert "DOES NOT FIT; lower optim.micro_tokens" in planned.to_text()


def test_a_missing_tokenizer_gets_a_marked_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object) -> None:
        raise LeewayError("model: cannot be loaded")

    monkeypatch.setattr(hardware, "load_chat", absent)
    spec = load("objective-matters", (*SMALL[1:], "evals={capability: [organism]}", "pairs={from: dataset}"))
    planned = plan.plan(spec, hardware.on_gpu("H100"))
    assert not planned.counts_exactly
    assert planned.parameters == 8_030_261_248
    text = planned.to_text()
    assert "missing: tokenizer: not available. Tokens (~)" in text
    rows = [row for row in text.splitlines() if row.startswith("sft ")]
    assert [row.count("~") for row in rows] == [5] * 3  # steps and four counts, for each of three seeds
    with pytest.raises(LeewayError, match="cannot be loaded"):
        hardware.planned_model(load("demo", ("model=some/other",)))


def test_the_estimate_prints_judge_calls() -> None:
    made = cost_model.CostEstimate(
        machine="X",
        assumed="a",
        workers=1,
        hours=1.5,
        training_hours=1.0,
        answering_hours=0.5,
        pairs_hours=0.0,
        memory=cost_model.Memory(1.0, 1.0, 1.0, 1.0),
        fits=True,
        advice="",
        adapters_gib=1.0,
        references_gib=0.5,
        hub_gib=2.0,
        disk_gib=3.0,
        judge_calls=1000,
        judge_tokens_in=2e6,
        judge_tokens_out=1e6,
        dollars=3.0,
        judge_dollars=1.5,
    )
    text = "\n".join(made.lines())
    assert "~1.5 h (training ~1.0 h, generation ~30.0 min)" in text
    assert "1,000 calls, ~2.0 million tokens read and ~1.0 million written: ~$1.50" in text
    assert "GPU rental: ~$3.00" in text
