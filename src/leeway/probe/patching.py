"""Activation patching both ways, per layer, for the residual stream, attention, MLP and windows of layers.

    Δ_ℓ = [L(patched at ℓ) − L(ckpt)] / [L(base) − L(ckpt)]        base → checkpoint
    Δ_ℓ = [L(patched at ℓ) − L(base)] / [L(ckpt) − L(base)]        checkpoint → base

with L the refusal logit (Zhang & Nanda 2023, arXiv 2309.16042; Heimersheim & Nanda 2024, arXiv 2404.15255). One side's
activations replace the other's at the positions from the instruction's last token to the prompt's end; the tokens of
the refusal openings after it run on in the patched model. A value is a prompt's numerator, its `scale` the
denominator; `control` is the numerator if the activation moves as far at each position in a random direction, another
one for every prompt: what one direction does by chance is then seen in the spread over prompts (measured for patches
into the checkpoint, the direction that claims rest on, on at least `CONTROLS` of the prompts).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from leeway.probe.context import ProbeContext, Value, controlled, random_units
from leeway.probe.hooks import Edit, Point, Site, moved_as_far, replacement
from leeway.probe.pair import LAYER_SITES, Side
from leeway.probe.passes import At, Edits, Pass, PromptBatch
from leeway.probe.prompts import ProbePrompt
from leeway.probe.refusal_logit import refusal_logits

INTO_CHECKPOINT, INTO_BASE = "base to checkpoint", "checkpoint to base"
SITES: tuple[Site, ...] = ("resid", "attn", "mlp")
WINDOWS = 6  # windows of adjacent layers, attention and MLP together


def measure(context: ProbeContext) -> list[Value]:
    """Return every prompt's effect of every patch, and the refusal logits of both models on all test prompts."""
    found: list[Value] = []
    prompts = context.prompts.of("test", "harmful")
    with_control = controlled(prompts)
    for chosen, batch in context.batches(prompts):
        runs = [_Run.of(context, side, batch) for side in (context.pair.base, context.pair.checkpoint)]
        found += _logit_rows(chosen, runs)
        rows = [i for i, p in enumerate(chosen) if p.id in with_control]
        for into, source, detail in ((runs[1], runs[0], INTO_CHECKPOINT), (runs[0], runs[1], INTO_BASE)):
            scale_B = source.logit_B - into.logit_B
            some = (into.only(rows), source.only(rows)) if rows and detail == INTO_CHECKPOINT else None
            ids = [chosen[i].id for i in rows]
            for places in _places(len(into.side.blocks)):
                effect_VB = into.effects([_patch(source, points) for *_, points in places])
                control_VB = torch.full_like(effect_VB, float("nan"))
                if some:
                    control_VB[:, rows] = some[0].effects([_control(*some, points, ids) for *_, points in places])
                for (layer, site, _), effect_B, control_B in zip(places, effect_VB, control_VB, strict=True):
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
        points: dict[Point, At] = {(layer, site): window for layer in range(len(side.blocks)) for site in SITES}
        run = context.run(side, batch, window=True)
        with side.active():
            hidden_BLD, kept = run.whole(record=points)
        return cls(context, side, run, refusal_logits(side.model, context.tree, hidden_BLD), kept)

    def only(self, rows: list[int]) -> _Run:
        """Return the run of some of the prompts."""
        kept = {point: x_BQD[rows] for point, x_BQD in self.kept.items()}
        return _Run(self.context, self.side, self.run.only(rows), self.logit_B[rows], kept)

    def effects(self, variants: Seq[Edits]) -> Tensor:
        """Return how much each set of edits changes each prompt's logit, [V, B]."""
        with self.side.active():
            hidden_VBQD = self.run.again(variants)
        logit_V = refusal_logits(self.side.model, self.context.tree, hidden_VBQD.flatten(0, 1))
        return logit_V.view(len(variants), -1) - self.logit_B

    @property
    def window(self) -> slice:
        return slice(0, self.context.positions.window)


Points = tuple[Point, ...]


def _places(layers: int) -> Iterator[list[tuple[int, str, Points]]]:
    """Yield (layer, site, patched points) of every patch: a layer's sites together, then each window of layers."""
    for layer in range(layers):
        yield [(layer, site, ((layer, site),)) for site in SITES]
    size = max(2, -(-layers // WINDOWS))
    for start in range(0, layers, size):
        stop, sites = min(start + size, layers), LAYER_SITES
        yield [(start, f"layers {start + 1}-{stop}", tuple((k, s) for k in range(start, stop) for s in sites))]


def _patch(source: _Run, points: Points) -> Edits:
    return {point: replacement(source.window, source.kept[point]) for point in points}


def _control(into: _Run, source: _Run, points: Points, prompts: Seq[str]) -> Edits:
    """Return the edits that move the same activations as far, along each prompt's own random direction."""
    edits = dict[Point, Edit]()
    for point in points:
        own_BQD, other_BQD = into.kept[point], source.kept[point]
        unit_BD = random_units(own_BQD.shape[-1], "patching", *point, prompts=prompts)
        edits[point] = replacement(into.window, moved_as_far(other_BQD, unit_BD)(own_BQD))
    return edits


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
    for _, together in context.batches(prompts):
        batch, base, tuned = together.joined(), context.pair.base, context.pair.checkpoint
        every: dict[Point, At] = {(k, "resid"): slice(None) for k in range(len(base.blocks))}
        logits, kept = [], []
        for side in (base, tuned):
            with side.active():
                hidden_BLD, states = context.run(side, batch).whole(record=every)
            if side is base and not context.pair.is_switched:
                with tuned.active():
                    end_BLD = states[len(base.blocks) - 1, "resid"]
                    hidden_BLD = context.run(tuned, batch).from_state(len(base.blocks), end_BLD)[0]
            logits.append(refusal_logits(tuned.model, context.tree, hidden_BLD))
            kept.append(states)
        for k, (target, states) in enumerate(((logits[1], kept[1]), (logits[0], kept[0]))):
            with tuned.active():
                edits = {p: replacement(slice(None), s) for p, s in states.items()}
                hidden_BLD, _ = context.run(tuned, batch).whole(edits)
            got = refusal_logits(tuned.model, context.tree, hidden_BLD)
            worst[k] = max(worst[k], float(torch.abs(got - target).max()))
    return worst[0], worst[1]
