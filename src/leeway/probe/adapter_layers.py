"""Which layers' weights carry the change, exactly, by switching parts of the update.

    leave one out   L(θ + Σ_{k≠ℓ} ΔW_k) − L(θ + ΔW)
    one alone       L(θ + ΔW_ℓ) − L(θ)

for attention and MLP apart (each with the norms around it). Exact for LoRA, rsLoRA, DoRA and whole weights: nothing is
approximated or merged. A value is a prompt's difference; `scale` is L(base) − L(ckpt) for leaving out and
L(ckpt) − L(base) for one alone. `control`: what the part adds to the stream changes as much at each position, in a
random direction, another one for every prompt (measured for leaving out, on which claims rest, on at least `CONTROLS`
of the prompts). Ours.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from leeway.probe.context import ProbeContext, Value, controlled, random_units
from leeway.probe.hooks import moved_as_far
from leeway.probe.pair import LAYER_SITES, Side
from leeway.probe.passes import Pass
from leeway.probe.patching import _rows
from leeway.probe.refusal_logit import refusal_logits

LEAVE_OUT, ALONE = "leave-one-out", "one-alone"


def measure(context: ProbeContext) -> list[Value]:
    """Return every prompt's change of the refusal logit for each part of the update, left out and alone."""
    base, tuned = context.pair.base, context.pair.checkpoint
    found: list[Value] = []
    prompts = context.prompts.of("test", "harmful")
    with_control = controlled(prompts)
    for chosen, batch in context.batches(prompts):
        runs = [context.run(side, batch, blockwise=True) for side in (base, tuned)]
        plain = [_plain(context, side, run) for side, run in zip((base, tuned), runs, strict=True)]
        rows = [i for i, p in enumerate(chosen) if p.id in with_control]
        for layer in range(len(base.blocks)):
            left_out, others = _switched(context, tuned, runs[1], layer, record=bool(rows))
            alone, _ = _switched(context, base, runs[0], layer, record=False)
            control_VB = torch.full((len(LAYER_SITES), len(chosen)), float("nan"), dtype=torch.float64)
            if rows:
                control_VB[:, rows] = _controls(context, runs[1], layer, others, ([p.id for p in chosen], rows))
            for site, out_B, alone_B, control_B in zip(LAYER_SITES, left_out, alone, control_VB, strict=True):
                values = out_B - plain[1], control_B - plain[1], plain[0] - plain[1]
                found += _rows(LEAVE_OUT, chosen, layer, site, "", values)
                found += _rows(ALONE, chosen, layer, site, "", (alone_B - plain[0], None, plain[1] - plain[0]))
    return found


def _plain(context: ProbeContext, side: Side, run: Pass) -> Tensor:
    """Return a batch's refusal logits, [B]; the pass keeps every block's input."""
    with side.active():
        hidden_BLD, _ = run.whole()
    return refusal_logits(side.model, context.tree, hidden_BLD)


def _switched(
    context: ProbeContext, side: Side, run: Pass, layer: int, *, record: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the logits with the other side's weights in a block's attention, and in its MLP, [B] each.

    With `record` also what the switched part adds to the stream at all positions, [B, K, D] each.
    """
    logits, added = [], []
    for site in LAYER_SITES:
        with side.active(), context.pair.part(layer, site, tuned=side is context.pair.base):
            hidden_BLD, other_BKD = run.from_block(layer, (layer, site) if record else None)
        logits.append(refusal_logits(side.model, context.tree, hidden_BLD))
        if other_BKD is not None:
            added.append(other_BKD)
    return logits, added


def _controls(
    context: ProbeContext, run: Pass, layer: int, others: Seq[Tensor], chosen: tuple[Seq[str], list[int]]
) -> Tensor:
    """Return the checkpoint's logits with each part's output moved as far as the switch moves it, [sites, rows].

    Every prompt moves in its own random direction, so the common start runs with each prompt.
    """
    ids, rows = chosen
    tuned, variants = context.pair.checkpoint, []
    for site, other_BKD in zip(LAYER_SITES, others, strict=True):
        prompts = [ids[i] for i in rows]
        unit_BD = random_units(other_BKD.shape[-1], "layers", layer, site, prompts=prompts)
        variants.append({(layer, site): moved_as_far(other_BKD[rows], unit_BD)})
    apart = context.run(tuned, run.batch.rows(rows).joined())
    with tuned.active():
        hidden_VBKD = apart.from_state(layer, run.input_of(layer)[rows], variants)
    return refusal_logits(tuned.model, context.tree, hidden_VBKD.flatten(0, 1)).view(len(variants), -1)
