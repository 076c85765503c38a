"""How the base's and the checkpoint's directions differ, layer by layer.

cos(r_base, r_ckpt); ‖r‖ / mean ‖h‖ of both; and how well the *base's* direction still separates the checkpoint's
states of test prompts (AUROC). Geometry alone misleads (a cosine of 0.62 went with an AUROC of 0.99 elsewhere), so the
two are always reported together, and neither is evidence of a mechanism. At the instruction's last token the direction
is about harmfulness, at the template's last token about refusal (arXiv 2507.11878).

Controls: cosine between the directions of two random halves of the base's prompts; AUROC of random directions; AUROC
of a direction made from permuted labels; AUROC on categories of harm that the direction was not made from.

Linear CKA (Kornblith et al. 2019, arXiv 1905.00414, eq. 3) describes how alike the states are; it is no test.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leeway.hashing import derive_seed
from leeway.probe.context import ProbeContext, Value, random_unit, states
from leeway.probe.prompts import ProbePrompt

Floats = NDArray[np.float64]
RESAMPLES = 1_000
HALVES = 20  # random splits behind the split-half cosine
RANDOM = 20  # random directions, and permutations, behind a control


def measure(context: ProbeContext) -> list[Value]:
    """Return cosines, norms and projections at every layer, at the last instruction token and the last token."""
    base, tuned = context.pair.base, context.pair.checkpoint
    names = context.positions.names
    kinds = ("harmful", "harmless")
    making = [context.prompts.of("direction", k) for k in kinds]  # type: ignore[arg-type]
    testing = [context.prompts.of("test", k) for k in kinds]  # type: ignore[arg-type]
    made = {s: [states(context, side, p) for p in making] for s, side in (("base", base), ("tuned", tuned))}
    test = [states(context, tuned, p) for p in testing]
    plain = [states(context, base, p) for p in testing]
    found: list[Value] = []
    assert context.directions is not None
    chosen = (context.directions.layer, context.directions.position)
    for position in dict.fromkeys((names[0], names[-1], chosen[1])):
        k = names.index(position)
        for layer in range(len(test[0])):
            pick = [s[layer, :, k].double().numpy() for s in (*made["base"], *made["tuned"])]
            found += _cosine(layer, position, pick)
            own = [s[layer, :, k].double().numpy() for s in test]
            found += _separation(layer, position, pick[:2], own, testing)
            if (layer, position) == chosen:
                found += _held_out(layer, position, pick[:2], own, testing[0], making[0])
            was = [s[layer, :, k].double().numpy() for s in plain]
            both = np.concatenate(was), np.concatenate(own)
            found.append(Value("cka", layer=layer, site="resid", position=position, value=linear_cka(*both)))
    return found


def _cosine(layer: int, position: str, pick: Seq[Floats]) -> list[Value]:
    """Return cosine and relative norms with bootstrap intervals over the direction prompts."""
    place: dict[str, Any] = {"layer": layer, "site": "resid", "position": position}
    point = _directions(pick)
    drawn = [_directions(pick, w) for w in _weights(len(pick[0]), len(pick[1]), RESAMPLES)]
    cosines = np.array([cosine(b, t) for b, t in drawn])
    low, high = np.quantile(cosines, [0.025, 0.975])
    halves = _split_half(pick[:2])
    found = [Value("direction-cosine", value=cosine(*point), control=halves, low=float(low), high=float(high), **place)]
    for side, which, own in (("base", 0, pick[:2]), ("checkpoint", 1, pick[2:])):
        norm = float(np.linalg.norm(np.concatenate(own), axis=1).mean())
        lengths = np.array([np.linalg.norm(d[which]) for d in drawn]) / norm
        ends = np.quantile(lengths, [0.025, 0.975])
        value = float(np.linalg.norm(point[which])) / norm
        found.append(
            Value("direction-norm", detail=side, value=value, low=float(ends[0]), high=float(ends[1]), **place)
        )
    return found


def _directions(pick: Seq[Floats], weights: tuple[Floats, Floats] | None = None) -> tuple[Floats, Floats]:
    """Return the base's and the checkpoint's difference in means, under the same weights of prompts."""
    a, b = weights or (None, None)
    means = [np.average(x, axis=0, weights=w) for x, w in zip(pick, (a, b, a, b), strict=True)]
    return means[0] - means[1], means[2] - means[3]


def _weights(harmful: int, harmless: int, count: int) -> list[tuple[Floats, Floats]]:
    rng = np.random.default_rng(derive_seed("probe bootstrap", harmful, harmless))
    return [
        (
            np.bincount(rng.integers(0, harmful, harmful), minlength=harmful).astype(float),
            np.bincount(rng.integers(0, harmless, harmless), minlength=harmless).astype(float),
        )
        for _ in range(count)
    ]


def _split_half(pick: Seq[Floats]) -> float:
    """Return the mean cosine between directions made from random halves of the prompts."""
    rng = np.random.default_rng(derive_seed("probe halves", *map(len, pick)))
    found = []
    for _ in range(HALVES):
        orders = [rng.permutation(len(x)) for x in pick]
        sides = [pick[0][orders[0][h::2]].mean(0) - pick[1][orders[1][h::2]].mean(0) for h in (0, 1)]
        found.append(cosine(*sides))
    return float(np.mean(found))


def _separation(
    layer: int, position: str, made: Seq[Floats], test: Seq[Floats], prompts: Seq[Seq[ProbePrompt]]
) -> list[Value]:
    """Return each test prompt's projection on the base's direction, and the controls' AUROC.

    The AUROC itself is computed from the projections, with its interval. Rows of `direction-auroc`: value projection,
    group harmful or harmless. `direction-auroc-control`: detail `random` or `permuted`, with the middle 95% of draws.
    """
    place: dict[str, Any] = {"layer": layer, "site": "resid", "position": position}
    direction = made[0].mean(0) - made[1].mean(0)
    unit = direction / np.linalg.norm(direction)
    found = [
        Value("direction-auroc", p.id, p.kind, value=float(h @ unit), **place)
        for own, states_PD in zip(prompts, test, strict=True)
        for p, h in zip(own, states_PD, strict=True)
    ]
    random = [random_unit(len(unit), "auroc", layer, i).double().numpy() for i in range(RANDOM)]
    rng = np.random.default_rng(derive_seed("probe permuted", layer, position))
    every = np.concatenate(made)
    permuted = []
    for _ in range(RANDOM):
        order = rng.permutation(len(every))
        permuted.append(every[order[: len(made[0])]].mean(0) - every[order[len(made[0]) :]].mean(0))
    controls = {"random": random, "permuted": permuted}
    for name, some in controls.items():
        areas = [max(a, 1 - a) for a in (auroc(test[0] @ d, test[1] @ d) for d in some)]
        ends = np.quantile(areas, [0.025, 0.975])
        found.append(
            Value(
                "direction-auroc-control", detail=name, value=float(np.mean(areas)), low=ends[0], high=ends[1], **place
            )
        )
    return found


def _held_out(
    layer: int,
    position: str,
    made: Seq[Floats],
    test: Seq[Floats],
    harmful: Seq[ProbePrompt],
    sources: Seq[ProbePrompt],
) -> list[Value]:
    """Return the AUROC on each category of harm, by the direction made from the others."""
    found = []
    for category in sorted({p.category for p in harmful} - {""}):
        kept = np.array([p.category != category for p in sources])
        own = np.array([p.category == category for p in harmful])
        if not kept.any() or own.sum() < 3:
            continue
        direction = made[0][kept].mean(0) - made[1].mean(0)
        area = auroc(test[0][own] @ direction, test[1] @ direction)
        found.append(Value("direction-auroc-category", "", "", category, layer, "resid", position, value=area))
    return found


def cosine(a: Floats, b: Floats) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def auroc(positive: Floats, negative: Floats) -> float:
    """Return the probability that a positive's score exceeds a negative's, ties counted half."""
    above = (positive[:, None] > negative).mean() + 0.5 * (positive[:, None] == negative).mean()
    return float(above)


def linear_cka(x_PD: Floats, y_PD: Floats) -> float:
    """Return ‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖) of centred states, by their Gram matrices over prompts."""
    grams = []
    for z in (x_PD, y_PD):
        centred = z - z.mean(0)
        grams.append(centred @ centred.T)
    return float((grams[0] * grams[1]).sum() / (np.linalg.norm(grams[0]) * np.linalg.norm(grams[1])))
