"""Measure 4: which layers' weights carry the change, exactly, by switching parts of the update.

    leave one out   L(θ + Σ_{k≠ℓ} ΔW_k) − L(θ + ΔW)
    one alone       L(θ + ΔW_ℓ) − L(θ)

for attention and MLP apart (each with the norms around it). Exact for LoRA, rsLoRA, DoRA and whole weights: nothing is
approximated or merged. A value is a prompt's difference; `scale` is L(base) − L(ckpt) for leaving out and
L(ckpt) − L(base) for one alone. Ours; it has no random-direction control, since the parts are of the update itself.
"""

from __future__ import annotations

from contextlib import ExitStack

from torch import Tensor

from leeway.probe.context import ProbeContext, Value
from leeway.probe.hooks import Point
from leeway.probe.pair import LAYER_SITES, Side
from leeway.probe.patching import _rows
from leeway.probe.refusal_logit import PromptBatch, refusal_logits

LEAVE_OUT, ALONE = "leave-one-out", "one-alone"


def measure(context: ProbeContext) -> list[Value]:
    """Return every prompt's change of the refusal logit for each part of the update, left out and alone."""
    base, tuned = context.pair.base, context.pair.checkpoint
    found: list[Value] = []
    for chosen, batch in context.batches(context.prompts.of("test", "harmful")):
        (logit_base_B, in_base), (logit_tuned_B, in_tuned) = (_inputs(context, s, batch) for s in (base, tuned))
        for name, side, state, plain_B, gap_B in (
            (LEAVE_OUT, tuned, in_tuned, logit_tuned_B, logit_base_B - logit_tuned_B),
            (ALONE, base, in_base, logit_base_B, logit_tuned_B - logit_base_B),
        ):
            for layer in range(len(side.blocks)):
                for site in LAYER_SITES:
                    with ExitStack() as stack:
                        stack.enter_context(side.active())
                        stack.enter_context(context.pair.part(layer, site, tuned=name == ALONE))
                        hidden_BLD = context.run(side, batch).from_layer(layer, state[layer, "input"])
                    logit_B = refusal_logits(side.model, context.tree, hidden_BLD)
                    found += _rows(name, chosen, layer, site, "", (logit_B - plain_B, None, gap_B))
    return found


def _inputs(context: ProbeContext, side: Side, batch: PromptBatch) -> tuple[Tensor, dict[Point, Tensor]]:
    """Return a batch's refusal logits and every block's input at all its positions."""
    every: dict[Point, slice | list[int]] = {(k, "input"): slice(None) for k in range(len(side.blocks))}
    with side.active():
        hidden_BLD, kept = context.run(side, batch).whole(record=every)
    return refusal_logits(side.model, context.tree, hidden_BLD), kept
