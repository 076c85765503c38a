"""The update itself, layer by layer.

‖ΔW‖_F; stable rank ‖ΔW‖_F² / ‖ΔW‖₂²; and how much of what the update writes into the residual stream lies along the
refusal direction: ‖r̂ᵀΔW‖ / ‖ΔW‖_F over the matrices that write into it (attention's and the MLP's output), against
1/√D, what a random direction has on average. Description: no test is made of it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from leeway.probe.context import ProbeContext, Value
from leeway.probe.pair import LAYER_SITES, delta

WRITERS = ("o_proj", "down_proj")


def measure(context: ProbeContext) -> list[Value]:
    """Return norm, stable rank and share along the refusal direction of each block's attention and MLP update."""
    assert context.directions is not None
    found: list[Value] = []
    unit_D = context.directions.unit_D
    for layer in range(len(context.pair.checkpoint.blocks)):
        for site in LAYER_SITES:
            changes = delta(context.pair, layer, site)
            place: dict[str, Any] = {"layer": layer, "site": site}
            total = math.sqrt(sum(float(w.norm()) ** 2 for _, w in changes))
            found.append(Value("weight-norm", value=total, **place))
            ranks = [stable_rank(w) for _, w in changes if float(w.norm()) > 0]
            if ranks:
                found.append(Value("stable-rank", value=sum(ranks) / len(ranks), **place))
            writers = [w for name, w in changes if name.split(".")[-1] in WRITERS and float(w.norm()) > 0]
            for w in writers:
                share = float((unit_D.to(w) @ w).norm() / w.norm())
                chance = 1 / math.sqrt(len(unit_D))
                found.append(Value("weight-on-direction", value=share, control=chance, **place))
    return found


def stable_rank(weight: Tensor) -> float:
    """Return ‖W‖_F² / ‖W‖₂²: 1 for a matrix of rank 1, at most the rank."""
    return float(weight.norm() ** 2 / torch.linalg.matrix_norm(weight, 2) ** 2)
