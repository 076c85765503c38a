"""Rows of small trajectories: per checkpoint, capability and jailbreak answers prompt by prompt."""

from __future__ import annotations

import numpy as np
import pandas as pd
from stats_table import answers, attacked, rows

Scores = list[float]


def first(hits: int, of: int) -> Scores:
    """1 for the first `hits` prompts of `of`."""
    return [1.0] * hits + [0.0] * (of - hits)


def checkpoint(
    objective: str, budget: int, right: Scores | None = None, harmful: dict[str, Scores] | None = None, **more: object
) -> list[dict[str, object]]:
    """One checkpoint's lines; the base is objective "base", budget 0."""
    lines = answers(objective, right, budget=budget, **more) if right is not None else []
    for line in attacked(objective, harmful or {}):
        lines.append(line | {"budget": budget} | more)
    return lines


def random_rows(seed: int = 0, seeds: tuple[int, ...] = (0,), prompts: int = 30, missing: float = 0.0) -> pd.DataFrame:
    """Two objectives at two budgets and their base, with random answers, two attacks and some unscored."""
    rng = np.random.default_rng(seed)

    def some(count: int, rate: float) -> Scores:
        found = (rng.random(count) < rate).astype(float)
        found[rng.random(count) < missing] = np.nan
        return [float(v) for v in found]

    def harmful(rate: float) -> dict[str, Scores]:
        return {"dan": some(prompts, rate), "zulu": some(prompts, rate / 2)}

    lines = checkpoint("base", 0, some(40, 0.4), harmful(0.2))
    for objective, step in (("ip", 0.05), ("sft", 0.15)):
        for n, budget in enumerate((1000, 4000)):
            for own in seeds:
                rate = 0.2 + step * (n + 1)
                lines += checkpoint(objective, budget, some(40, 0.4 + rate), harmful(rate), seed=own)
    return rows(*lines)
