"""Hooks see what attention and MLP add to the residual stream, in every architecture; others are turned away."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from probe_contexts import tiny_context
from torch import nn

from leeway.errors import LeewayError
from leeway.model.load import Model, load_model
from leeway.probe.hooks import Blocks, ablation, moved_as_far, replacement
from leeway.probe.pair import ModelPair


@pytest.fixture(params=tiny.ARCHITECTURES)
def model(request: pytest.FixtureRequest, models: dict[str, Path]) -> Model:
    return load_model(str(models[request.param]), device="cpu", dtype="float32")


def test_attention_and_mlp_add_up_to_the_stream(model: Model) -> None:
    """Read and written: what is put in place of an output arrives in the stream as it is."""
    context = tiny_context(ModelPair.of(model))
    side = context.pair.checkpoint
    _, batch = next(context.batches(context.prompts.of("test", "harmful")))
    points = {(k, s): slice(None) for k in range(2) for s in ("input", "attn", "mlp", "resid")}
    _, kept = context.run(side, batch).whole(record=points)
    for k in range(2):
        total = kept[k, "input"] + kept[k, "attn"] + kept[k, "mlp"]
        torch.testing.assert_close(total, kept[k, "resid"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kept[0, "resid"], kept[1, "input"], rtol=0, atol=0)
    put = {"attn": torch.randn_like(kept[0, "attn"]), "mlp": torch.randn_like(kept[0, "mlp"])}
    edits = {(0, site): replacement(slice(None), value) for site, value in put.items()}
    _, moved = context.run(side, batch).whole(edits, points)
    torch.testing.assert_close(moved[0, "resid"], kept[0, "input"] + put["attn"] + put["mlp"], rtol=1e-5, atol=1e-5)


def test_edits_do_what_their_formulas_say() -> None:
    x_BQD, unit_D = torch.randn(2, 3, 8), torch.nn.functional.normalize(torch.randn(8), dim=0)
    ablated = ablation(unit_D)(x_BQD)
    assert float((ablated @ unit_D).abs().max()) < 1e-6
    torch.testing.assert_close(x_BQD - ablated, (x_BQD @ unit_D)[..., None] * unit_D)
    other, units_BD = torch.randn(2, 3, 8), torch.nn.functional.normalize(torch.randn(2, 8), dim=-1)
    moved = moved_as_far(other, units_BD)(x_BQD) - x_BQD
    torch.testing.assert_close(moved.norm(dim=-1), (other - x_BQD).norm(dim=-1))
    torch.testing.assert_close((moved * units_BD[:, None]).sum(-1), moved.norm(dim=-1))


class _Scaled(nn.Module):
    """An attention whose output the block doubles behind our back."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: object, **kwargs: object) -> object:
        found = self.inner(*args, **kwargs)
        return found + found.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("layers", "a list `layers` in its decoder"),
        ("self_attn", "a module `self_attn` in each block"),
        ("sums", "attention and MLP outputs that add up to the residual stream \\(they miss it by"),
    ],
)
def test_another_architecture_is_one_line(missing: str, said: str, models: dict[str, Path]) -> None:
    model = load_model(str(models["llama"]), device="cpu", dtype="float32")
    body = model.lm.model
    if missing == "layers":
        body.layers = None
    elif missing == "self_attn":
        body.layers[1].attention = body.layers[1].self_attn
        del body.layers[1].self_attn
    else:
        body.layers[1] = _Scaled(body.layers[1])
        body.layers[1].self_attn, body.layers[1].mlp = body.layers[1].inner.self_attn, body.layers[1].inner.mlp
    with pytest.raises(LeewayError, match=said) as raised:
        Blocks.of(model)
    assert "LlamaForCausalLM" in str(raised.value)
    assert "\n" not in str(raised.value).split("\n", 1)[0]
