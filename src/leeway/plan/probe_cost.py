"""What a study's probe costs, counted in positions that pass through the model, and in positions that reach its head.

Counts follow the measures' loops (`leeway.probe`): a patch or a part of the update at layer ℓ runs the blocks from ℓ
on, so half of them on average; the rest are whole passes. What all prompts begin with runs once a batch: it is left
out, except where random directions move every prompt's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from leeway.evals.jailbreak import Jailbreak
from leeway.plan import cost_model
from leeway.plan.cost_model import Shape
from leeway.plan.hardware import Machine
from leeway.probe.context import controlled
from leeway.probe.directions import DEPTH, FINALISTS, SCREEN
from leeway.probe.passes import common_start
from leeway.probe.patching import SITES, WINDOWS
from leeway.probe.prompts import Positions
from leeway.probe.refusal_logit import OpeningTree
from leeway.probe.token_depth import TOKENS
from leeway.study.prepare import Prepared
from leeway.study.probing import Probing, probe_jobs
from leeway.study.run_dir import RunDir


@dataclass(frozen=True)
class ProbeCost:
    """The checkpoints of a probe and its seconds on one worker: once for the base, and for each checkpoint."""

    checkpoints: int
    base_seconds: float
    checkpoint_seconds: float

    @property
    def seconds(self) -> float:
        return self.base_seconds + self.checkpoints * self.checkpoint_seconds

    def __str__(self) -> str:
        base, each = (cost_model.as_time(s / 3600) for s in (self.base_seconds, self.checkpoint_seconds))
        return f"probe: {self.checkpoints} checkpoints, {each} each, and {base} for the base, on one worker"


def probe_cost(prepared: Prepared, size: Shape, on: Machine) -> ProbeCost | None:
    """Return the cost of the study's probe, or None if it has none. Reads the probe's prompts."""
    own = prepared.spec.probe
    if own is None:
        return None
    prompts = Probing(prepared, RunDir(Path())).prompts  # nothing in a run directory is read
    tree, window = OpeningTree.of(prepared.chat), Positions.of(prepared.chat).window
    ids = [prepared.chat.prompt_ids([{"role": "user", "content": p.text}]) for p in prompts.sets["test"]]
    nodes, n = len(tree.nodes), len(prompts.of("test", "harmful"))
    whole = sum(map(len, ids)) / len(ids) + nodes - 1
    long, controls = whole - common_start(ids, window), len(controlled(prompts.of("test", "harmful")))
    made, chosen = len(prompts.of("direction", "harmful")), len(prompts.of("selection", "harmful"))

    def seconds(positions: float, read: float) -> float:
        return cost_model.forward_seconds(size, on, int(positions), int(read))

    places = int(DEPTH * size.layers) * window
    runs = places * SCREEN + 3 * (3 * FINALISTS * SCREEN + FINALISTS * chosen) if own.directions is None else 0
    base = seconds((2 * made + runs) * long, runs * nodes)
    measures, total = set(own.measures), 0.0
    if "geometry" in measures:
        total += seconds(4 * (made + n) * long, 0)
    if "patching" in measures:
        patches = (len(SITES) * size.layers + WINDOWS) * (2 * n + controls)  # two directions, one with its control
        total += seconds(2 * n * long + patches * (window + nodes - 1) / 2, patches * nodes)
    if "layers" in measures:
        parts = 2 * size.layers  # attention and MLP: left out and alone, with a control of the first
        positions = 2 * n * long + parts * (2 * n * long + controls * whole) / 2
        total += seconds(positions, parts * (2 * n + controls) * nodes)
    if "depth" in measures:
        total += seconds(2 * n * (whole + TOKENS), 2 * n * TOKENS)
    if "persona" in measures:
        total += seconds(2 * n * long, 0)
    jailbreak = next((e for e in prepared.evals if isinstance(e, Jailbreak)), None)
    if "mediation" in measures and jailbreak is not None:
        answers = 6 * min(own.mediation, n) * max(1, len(own.attacks))  # four arms, two of them with both models
        total += seconds(answers * (whole + jailbreak.max_new_tokens), answers * jailbreak.max_new_tokens)
    return ProbeCost(len(probe_jobs(prepared)) - 1, base, total)
