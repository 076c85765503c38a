"""One direction and one patch against nnterp, which hooks models by its own means; runs where nnterp is installed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from probe_contexts import adapted, tiny_context

from leeway.model.load import load_model
from leeway.probe import patching
from leeway.probe.context import states
from leeway.probe.pair import ModelPair
from leeway.probe.refusal_logit import refusal_logits

nnterp = pytest.importorskip("nnterp")


def test_a_direction_and_a_patch_equal_nnterps(
    models: dict[str, Path], record_property: Callable[[str, object], None]
) -> None:
    """Prompts go one by one, without padding, as nnterp sees them."""
    folder = models["llama"]
    base = load_model(str(folder), device="cpu", dtype="float32")
    tuned = adapted(folder, "full")
    context = tiny_context(ModelPair.of(tuned, base))
    theirs = [nnterp.StandardizedTransformer(m.lm, tokenizer=m.chat.tokenizer, dispatch=True) for m in (base, tuned)]
    harmful, harmless = (context.prompts.of("test", kind) for kind in ("harmful", "harmless"))

    def last_states(ids: tuple[int, ...]) -> torch.Tensor:
        with theirs[0].trace(torch.tensor([ids])):
            first = theirs[0].layers_output[0][:, -1].save()
            second = theirs[0].layers_output[1][:, -1].save()
        return torch.stack([first[0], second[0]]).double()

    means = [torch.stack([last_states(i) for i in context.ids(p)]).mean(0) for p in (harmful, harmless)]
    ours = [states(context, context.pair.base, p)[:, :, -1].double().mean(1) for p in (harmful, harmless)]
    direction = float(((means[0] - means[1]) - (ours[0] - ours[1])).abs().max())

    values = {
        (v.item_id, v.layer): v.value
        for v in patching.measure(context)
        if v.measure == "patching" and v.detail == patching.INTO_CHECKPOINT and v.site == "resid"
    }
    worst = 0.0
    for prompt, ids in zip(harmful, context.ids(harmful), strict=True):
        for layer in range(2):
            patched = nnterp_logit(theirs, context, ids, layer)
            plain = nnterp_logit(theirs, context, ids, None)
            worst = max(worst, abs(patched - plain - values[prompt.id, layer]))
    said = f"{direction:.1e} (direction), {worst:.1e} (patch)"
    record_property("measured", f"against nnterp {getattr(nnterp, '__version__', '')}: {said}")
    assert max(direction, worst) < 1e-4


def nnterp_logit(theirs, context, ids, layer):  # type: ignore[no-untyped-def]
    """Return the refusal logit of the checkpoint with the base's stream after a block put at the window."""
    base, tuned = theirs
    window = slice(len(ids) - context.positions.window, len(ids))
    if layer is not None:
        with base.trace(torch.tensor([ids])):
            source = base.layers_output[layer][:, window].save()
    found = []
    for node in context.tree.nodes:
        with tuned.trace(torch.tensor([(*ids, *node)])):
            if layer is not None:
                tuned.layers_output[layer][:, window] = source
            hidden = tuned.model.norm.output[:, -1].save()
        found.append(hidden)
    return float(refusal_logits(context.pair.checkpoint.model, context.tree, torch.stack(found, 1))[0])
