"""How often a study of several claims holds a wrong verdict, where the truth lies on every claim's border."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from benchmarks.statistics.finding import Finding
from benchmarks.statistics.world import Rates, World, rows
from leeway.claims.evaluate import EvaluationContext, judge
from leeway.claims.schema import build

STILL, EDGE = Rates(0.4, 0.1, 0.2), Rates(0.4, 0.15, 0.25)  # five points off in ASR and in endorsement
LEVEL = 0.05
CLAIMS: list[dict[str, object]] = [
    {"kind": "no_drift", "measure": "endorsement", "objectives": "sft", "margin": 0.05},
    {"kind": "moves", "measure": "asr", "objectives": "sft", "direction": "up", "margin": 0.05},
    {"kind": "ranks", "measure": "accuracy", "higher": "sft", "lower": "kl"},
    {"kind": "moves", "measure": "accuracy", "objectives": "kl", "direction": "down"},
    {"kind": "equivalent", "measure": "asr", "objectives": ["sft", "kl"], "margin": 0.05},
    {"kind": "steeper", "measure": "accuracy", "higher": "sft", "lower": "kl"},
]


def wrong_verdicts(studies: int) -> Iterator[Finding]:
    """Every claim is false by a hair and so is its contrary: each verdict but inconclusive is wrong."""
    studies = max(studies // 10, 50)
    claims = build([{"id": f"c{n}", "statement": "on the border", **c} for n, c in enumerate(CLAIMS)])
    for seeds, prompts in (((0,), 100), ((0, 1, 2), 60)):
        tuned = {"sft": (EDGE, EDGE), "kl": (STILL, STILL)}
        world = World(STILL, tuned, (1000, 2000), seeds, items=150, prompts=prompts, statements=120)
        found, alone = [], []
        for n in range(studies):
            bench = EvaluationContext(rows(world, np.random.default_rng([7, n])), {"t": "plain"}, resamples=1000)
            table = judge(claims, bench)
            found.append([(table["verdict"] == v).any() for v in ("supported", "contradicted")])
            alone.append((table["p"] <= LEVEL).to_numpy())
        setting = f"{len(CLAIMS)} claims on their border, {prompts} prompts, {len(seeds)} seeds"
        supported, contradicted = np.mean(found, axis=0)
        about = "Claims: studies with a wrong verdict, Holm over the claims"
        yield Finding(about, f"supported: {setting}", float(supported), studies, (0.0, 0.065))
        yield Finding(about, f"contradicted: {setting}", float(contradicted), studies, (0.0, 0.065))
        yield Finding(
            "Claims: the worst single claim, uncorrected",
            setting,
            float(np.mean(alone, axis=0).max()),
            studies,
            (0.0, 0.065),
        )
