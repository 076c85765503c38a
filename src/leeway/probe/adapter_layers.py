"""Measure 4: which layers' weights carry the change, exactly, by switching parts of the update.

    leave one out   L(θ + Σ_{k≠ℓ} ΔW_k) − L(θ + ΔW)
    one alone       L(θ + ΔW_ℓ) − L(θ)

for attention and MLP apart (each with the norms around it). Exact for LoRA, rsLoRA, DoRA and whole weights: nothing is
approximated or merged. A value is a prompt's difference; `scale` is L(base) − L(ckpt) for leaving out and
L(ckpt) − L(base) for one alone. `control`: what the part adds to the stream changes as much at each position, in a
random direction, another one for every prompt (measured for leaving out, on which claims rest). Ours.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from torch import Tensor

from leeway.probe.context import ProbeContext, Value, random_units
from leeway.probe.hooks import Point, moved_as_far
from leeway.probe.pair import LAYER_SITES, Side
from leeway.probe.patching import _rows
from leeway.probe.prompts import ProbePrompt
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
            for point in ((k, site) for k in range(len(side.blocks)) for site in LAYER_SITES):
                logit_B, control_B = _switched(context, side, point, state[point[0], "input"], (chosen, batch))
                control_B = None if control_B is None else control_B - plain_B
                found += _rows(name, chosen, *point, "", (logit_B - plain_B, control_B, gap_B))
    return found


def _switched(
    context: ProbeContext, side: Side, point: Point, state_BLD: Tensor, batch: tuple[Seq[ProbePrompt], PromptBatch]
) -> tuple[Tensor, Tensor | None]:
    """Return a batch's refusal logits with the other side's weights in one part, and under its control, [B] each."""
    layer, site = point
    run = context.run(side, batch[1])
    with side.active():
        with context.pair.part(layer, site, tuned=side is context.pair.base):
            hidden_BLD, kept = run.from_layer(layer, state_BLD, record={point: slice(None)})
        logit_B = refusal_logits(side.model, context.tree, hidden_BLD)
        if side is context.pair.base:
            return logit_B, None
        other_BLD = kept[point]
        unit_BD = random_units(other_BLD.shape[-1], "layers", *point, prompts=[p.id for p in batch[0]])
        control_BLD, _ = run.from_layer(layer, state_BLD, {point: moved_as_far(other_BLD, unit_BD)})
    return logit_B, refusal_logits(side.model, context.tree, control_BLD)


def _inputs(context: ProbeContext, side: Side, batch: PromptBatch) -> tuple[Tensor, dict[Point, Tensor]]:
    """Return a batch's refusal logits and every block's input at all its positions."""
    every: dict[Point, slice | list[int]] = {(k, "input"): slice(None) for k in range(len(side.blocks))}
    with side.active():
        hidden_BLD, kept = context.run(side, batch).whole(record=every)
    return refusal_logits(side.model, context.tree, hidden_BLD), kept
