"""Measure 3: activation patching both ways, per layer, for the residual stream, attention, MLP and windows of layers.

    Δ_ℓ = [L(patched at ℓ) − L(ckpt)] / [L(base) − L(ckpt)]        base → checkpoint
    Δ_ℓ = [L(patched at ℓ) − L(base)] / [L(ckpt) − L(base)]        checkpoint → base

with L the refusal logit (Zhang & Nanda 2023, arXiv 2309.16042; Heimersheim & Nanda 2024, arXiv 2404.15255). One side's
activations replace the other's at the positions from the instruction's last token to the prompt's end; the tokens of
the refusal openings after it run on in the patched model. A value is a prompt's numerator, its `scale` the
denominator; `control` is the numerator if the activation moves as far at each position in a random direction, another
one for every prompt: what one direction does by chance is then seen in the spread over prompts (measured for patches
into the checkpoint, the direction that claims rest on).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from leeway.probe.context import ProbeContext, Value, random_units
from leeway.probe.hooks import Edit, Point, Site, moved_as_far, replacement
from leeway.probe.pair import Side
from leeway.probe.prompts import ProbePrompt
from leeway.probe.refusal_logit import Pass, PromptBatch, refusal_logits

INTO_CHECKPOINT, INTO_BASE = "base to checkpoint", "checkpoint to base"
SITES: tuple[Site, ...] = ("resid", "attn", "mlp")
WINDOWS = 6  # windows of adjacent layers, attention and MLP together


def measure(context: ProbeContext) -> list[Value]:
    """Return every prompt's effect of every patch, and the refusal logits of both models on all test prompts."""
    found: list[Value] = []
    for chosen, batch in context.batches(context.prompts.of("test", "harmful")):
        runs = [_Run.of(context, side, batch) for side in (context.pair.base, context.pair.checkpoint)]
        found += _logit_rows(chosen, runs)
        for into, source, detail in ((runs[1], runs[0], INTO_CHECKPOINT), (runs[0], runs[1], INTO_BASE)):
            scale_B = source.logit_B - into.logit_B
            for layer, site, edits, control in _patches(context, into, source, [p.id for p in chosen]):
                effect_B = into.effect(edits)
                control_B = into.effect(control) if detail == INTO_CHECKPOINT else None
                found += _rows("patching", chosen, layer, site, detail, (effect_B, control_B, scale_B))
    return found + _harmless_logits(context)


@dataclass
class _Run:
    """One side's plain run over a batch: its logits, its activations in the window, and reruns of the window."""

    context: ProbeContext
    side: Side
    run: Pass
    logit_B: Tensor
    kept: Mapping[Point, Tensor]  # at the window's positions

    @classmethod
    def of(cls, context: ProbeContext, side: Side, batch: PromptBatch) -> _Run:
        window = slice(batch.width - context.positions.window, batch.width)
        points: dict[Point, slice | list[int]] = {
            (layer, site): window for layer in range(len(side.blocks)) for site in SITES
        }
        run = context.run(side, batch, window=True)
        with side.active():
            hidden_BLD, kept = run.whole(record=points)
        return cls(context, side, run, refusal_logits(side.model, context.tree, hidden_BLD), kept)

    def effect(self, edits: Mapping[Point, Edit]) -> Tensor:
        """Return how much the edits change each prompt's logit, [B]: only the blocks from the first edit on run."""
        with self.side.active():
            hidden_BQD = self.run.again(edits)
        return refusal_logits(self.side.model, self.context.tree, hidden_BQD) - self.logit_B


def _patches(
    context: ProbeContext, into: _Run, source: _Run, prompts: Seq[str]
) -> Iterator[tuple[int, str, dict[Point, Edit], dict[Point, Edit]]]:
    """Yield (layer, site, the patch's edits, its control's) for every layer and site, then windows of layers."""
    window, layers = slice(0, context.positions.window), len(into.side.blocks)

    def edits(points: Seq[Point]) -> tuple[dict[Point, Edit], dict[Point, Edit]]:
        patch, control = dict[Point, Edit](), dict[Point, Edit]()
        for point in points:
            own_BQD, other_BQD = into.kept[point], source.kept[point]
            patch[point] = replacement(window, other_BQD)
            unit_BD = random_units(own_BQD.shape[-1], "patching", *point, prompts=prompts)
            control[point] = replacement(window, moved_as_far(other_BQD, unit_BD)(own_BQD))
        return patch, control

    for layer in range(layers):
        for site in SITES:
            yield layer, site, *edits([(layer, site)])
    size = max(2, -(-layers // WINDOWS))
    for start in range(0, layers, size):
        members: list[Point] = [
            (layer, s) for layer in range(start, min(start + size, layers)) for s in ("attn", "mlp")
        ]
        yield start, f"layers {start + 1}-{min(start + size, layers)}", *edits(members)


def _rows(
    measure: str,
    prompts: Seq[ProbePrompt],
    layer: int,
    site: str,
    detail: str,
    values: tuple[Tensor, Tensor | None, Tensor | None],
) -> list[Value]:
    value_B, control_B, scale_B = values
    return [
        Value(
            measure,
            p.id,
            p.kind,
            detail,
            layer,
            site,
            value=float(value_B[i]),
            control=float("nan") if control_B is None else float(control_B[i]),
            scale=float("nan") if scale_B is None else float(scale_B[i]),
        )
        for i, p in enumerate(prompts)
    ]


def _logit_rows(prompts: Seq[ProbePrompt], runs: Seq[_Run]) -> list[Value]:
    names = ("base", "checkpoint")
    return [
        Value("refusal-logit", p.id, p.kind, f"{name}, {p.kind}", value=float(run.logit_B[i]))
        for name, run in zip(names, runs, strict=True)
        for i, p in enumerate(prompts)
    ]


def _harmless_logits(context: ProbeContext) -> list[Value]:
    found: list[Value] = []
    for chosen, batch in context.batches(context.prompts.of("test", "harmless")):
        for name, side in (("base", context.pair.base), ("checkpoint", context.pair.checkpoint)):
            with side.active():
                hidden_BLD, _ = context.run(side, batch).whole()
            logit_B = refusal_logits(side.model, context.tree, hidden_BLD)
            found += [
                Value("refusal-logit", p.id, p.kind, f"{name}, {p.kind}", value=float(logit_B[i]))
                for i, p in enumerate(chosen)
            ]
    return found


def identity_and_full(context: ProbeContext, prompts: Seq[ProbePrompt]) -> tuple[float, float]:
    """Return the largest errors of two patches that are known: own activations (0) and all of the base's (1), in L.

    The full patch replaces the residual stream after every block at every position. Its logit is the base's if only the
    blocks were trained; whole weights also change the last norm and the head, so it is then the base's stream read by
    these.
    """
    worst = [0.0, 0.0]
    for _, batch in context.batches(prompts):
        base, tuned = (context.pair.base, context.pair.checkpoint)
        every: dict[Point, slice | list[int]] = {(k, "resid"): slice(None) for k in range(len(base.blocks))}
        logits, kept = [], []
        for side in (base, tuned):
            with side.active():
                hidden_BLD, states = context.run(side, batch).whole(record=every)
            if side is base and not context.pair.is_switched:
                with tuned.active():
                    end_BLD = states[len(base.blocks) - 1, "resid"]
                    hidden_BLD, _ = context.run(tuned, batch).from_layer(len(base.blocks), end_BLD)
            logits.append(refusal_logits(tuned.model, context.tree, hidden_BLD))
            kept.append(states)
        for k, (target, states) in enumerate(((logits[1], kept[1]), (logits[0], kept[0]))):
            with tuned.active():
                edits = {p: replacement(slice(None), s) for p, s in states.items()}
                hidden_BLD, _ = context.run(tuned, batch).whole(edits)
            got = refusal_logits(tuned.model, context.tree, hidden_BLD)
            worst[k] = max(worst[k], float(torch.abs(got - target).max()))
    return worst[0], worst[1]
