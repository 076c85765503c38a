"""Both sides of a comparison are the models they stand for, and parts of the update are exactly those weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from probe_contexts import adapted, tiny_context
from torch import Tensor

from leeway.model import adapters
from leeway.model.load import Model, load_model
from leeway.probe import adapter_layers, patching
from leeway.probe.context import ProbeContext
from leeway.probe.pair import LAYER_SITES, ModelPair, delta, switched
from leeway.probe.refusal_logit import refusal_logits

KINDS: tuple[adapters.Kind, ...] = get_args(adapters.Kind)
Record = Callable[[str, object], None]
PART = {"attn": ("self_attn", "input_layernorm"), "mlp": ("mlp", "post_attention_layernorm")}  # in Llama


def logits(context: ProbeContext, checkpoint: bool) -> dict[str, float]:
    side = context.pair.checkpoint if checkpoint else context.pair.base
    found = {}
    for chosen, batch in context.batches(context.prompts.of("test", "harmful")):
        with side.active():
            hidden_BLD, _ = context.run(side, batch).whole()
        logit_B = refusal_logits(side.model, context.tree, hidden_BLD)
        found |= {p.id: float(x) for p, x in zip(chosen, logit_B, strict=True)}
    return found


def pair_of(kind: adapters.Kind, folder: Path) -> ModelPair:
    plain = load_model(str(folder), device="cpu", dtype="float32") if kind == "full" else None
    return ModelPair.of(adapted(folder, kind), plain)


def merged_weights(kind: adapters.Kind, folder: Path) -> dict[str, Tensor]:
    """Return the checkpoint's weights under the plain model's names, merged by peft."""
    model = adapted(folder, kind)
    lm = model.lm.merge_and_unload() if adapters.is_low_rank(model) else model.lm
    return {k: v.clone() for k, v in lm.state_dict().items()}


def with_parts(
    folder: Path,
    tuned: dict[str, Tensor],
    parts: set[tuple[int, str]] | None,
    back: set[tuple[int, str]] | None = None,
) -> Model:
    """Return the base with the checkpoint's weights in some parts of its blocks; None: everywhere but in `back`."""
    model = load_model(str(folder), device="cpu", dtype="float32")
    names = tuple(f"model.layers.{k}.{n}." for k, site in (parts or back or ()) for n in PART[site])
    for name, p in model.lm.state_dict().items():
        if name.startswith(names) == (parts is not None):
            p.copy_(tuned[name])
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_every_part_alone_and_left_out_equals_explicit_weights(
    kind: adapters.Kind, models: dict[str, Path], record_property: Record
) -> None:
    """By whole passes of plain models built from state dicts; also both sides themselves, merged and switched off."""
    folder = models["llama"]
    context, tuned = tiny_context(pair_of(kind, folder)), merged_weights(kind, folder)
    ids = [p.id for p in context.prompts.of("test", "harmful")]

    def explicit(parts: set[tuple[int, str]] | None, back: set[tuple[int, str]] | None = None) -> dict[str, float]:
        return logits(tiny_context(ModelPair.of(with_parts(folder, tuned, parts, back))), checkpoint=True)

    base, every = explicit(set()), explicit(None)
    assert logits(context, checkpoint=False) == pytest.approx(base, abs=2e-5)
    assert logits(context, checkpoint=True) == pytest.approx(every, abs=2e-5)
    assert max(abs(every[i] - base[i]) for i in ids) > 0.02
    values, worst = adapter_layers.measure(context), 0.0
    places = {(k, site) for k in range(2) for site in LAYER_SITES}
    for place in sorted(places):  # all else stays the checkpoint's: embeddings, the last norm and the head too
        for name, expected, plain in (
            ("one-alone", explicit({place}), base),
            ("leave-one-out", explicit(None, {place}), every),
        ):
            own = {v.item_id: v for v in values if (v.measure, v.layer, v.site) == (name, *place)}
            assert len(own) == len(ids)
            for i, v in own.items():
                gap = (base[i] - every[i]) * (-1 if name == "one-alone" else 1)
                assert v.scale == pytest.approx(gap, abs=4e-5)
                assert math.isnan(v.control) == (name == "one-alone")
                worst = max(worst, abs(v.value - (expected[i] - plain[i])))
    record_property("measured", f"parts of the update, {kind}: {worst:.1e} from explicit weights")
    assert worst < 4e-5


@pytest.mark.parametrize("kind", KINDS)
def test_own_activations_change_nothing_and_all_of_the_bases_give_the_base(
    kind: adapters.Kind, models: dict[str, Path], record_property: Record
) -> None:
    context = tiny_context(pair_of(kind, models["llama"]))
    errors = patching.identity_and_full(context, context.prompts.of("test", "harmful"))
    record_property("measured", f"identity and full patch, {kind}: {errors[0]:.1e}, {errors[1]:.1e} nats")
    assert max(errors) < 1e-5


def test_controls_of_some_prompts_are_those_of_all(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = tiny_context(pair_of("lora", models["llama"]))
    ids = [p.id for p in tuned.prompts.of("test", "harmful")]
    found = []
    for least in (len(ids), 2):
        monkeypatch.setattr("leeway.probe.context.CONTROLS", least)
        values = [*patching.measure(tuned), *adapter_layers.measure(tuned)]
        kept = [v for v in values if v.detail == patching.INTO_CHECKPOINT or v.measure == adapter_layers.LEAVE_OUT]
        found.append({(v.measure, v.item_id, v.layer, v.site): v.control for v in kept})
    every, some = found
    assert not any(map(math.isnan, every.values()))
    assert {key[1] for key, control in some.items() if not math.isnan(control)} == set(ids[::4])
    for key, control in some.items():
        assert math.isnan(control) or control == pytest.approx(every[key], abs=2e-5)
    left = [m for m in tuned.model.lm.modules() if "lora_A" in m._modules and "forward" in vars(m)]
    assert left == []


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_delta_is_the_difference_of_the_weights(kind: adapters.Kind, models: dict[str, Path]) -> None:
    folder = models["qwen3"]
    pair, tuned = pair_of(kind, folder), merged_weights(kind, folder)
    plain = load_model(str(folder), device="cpu", dtype="float32").lm.state_dict()
    for name, change in delta(pair, 1, "mlp"):
        full = f"model.layers.1.mlp.{name}.weight"
        torch.testing.assert_close(change, tuned[full] - plain[full], rtol=1e-4, atol=1e-6)
    assert {n for n, _ in delta(pair, 0, "attn")} >= {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_two_adapters_on_one_base_are_two_sides(models: dict[str, Path]) -> None:
    """Parts swap between two adapters, and their updates are subtracted."""
    one, two = (adapted(models["llama"], "lora", seed) for seed in (1, 2))
    pair = ModelPair.of(one, two)
    assert not pair.is_switched
    context = tiny_context(pair)
    assert logits(context, checkpoint=True) != pytest.approx(logits(context, checkpoint=False), abs=1e-2)
    mine, other = (dict(delta(ModelPair.of(m), 0, "attn")) for m in (one, two))
    for name, change in delta(pair, 0, "attn"):
        torch.testing.assert_close(change, mine[name] - other[name])
    before = logits(context, checkpoint=True)
    with pair.part(0, "attn", tuned=False):
        assert logits(context, checkpoint=True) != pytest.approx(before, abs=1e-4)
    assert logits(context, checkpoint=True) == before


def test_the_base_of_trained_control_tokens_is_the_model_before_training(models: dict[str, Path]) -> None:
    model = load_model(str(models["llama"]), device="cpu", dtype="float32")
    adapters.attach(model, adapters.AdapterSettings(4, 8, 0.0, "all-linear"), seed=0, control_tokens=("<A>",))
    pair = ModelPair.of(model)
    context = tiny_context(pair)
    context.prefix = "<A>"
    before = logits(context, checkpoint=True)
    for p in adapters.trainable(model):
        p.data += 0.05
    assert logits(context, checkpoint=True) != pytest.approx(before, abs=1e-3)
    assert logits(context, checkpoint=False) == pytest.approx(before, abs=2e-5)
    with switched(model.lm, on=False):
        assert logits(context, checkpoint=True) == logits(context, checkpoint=False)
