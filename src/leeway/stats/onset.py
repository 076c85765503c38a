"""From which budget on a trajectory stands beyond a threshold from its base, and stays there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import pandas as pd

from leeway.stats.draws import Draws, draws
from leeway.stats.intervals import LEVEL, RESAMPLES, Floats
from leeway.stats.measures import StatsError
from leeway.stats.trajectory import (
    MIN_CLUSTERS,
    MIN_MOVED,
    Asked,
    Trajectory,
    notes,
    simultaneous_lower,
    trajectories,
)

Move = Literal["up", "down"]
COLUMNS = ["objective", "condition", "measure", "move", "threshold", "estimate", "low", "high", "p_never"]
COLUMNS += ["tested", "largest", "says", "n_budgets", "n_clusters", "note"]
NEVER = float("inf")


def onset(
    rows: pd.DataFrame,
    conditions: Mapping[str, str],
    measure: str = "asr",
    threshold: float = 0.0,
    move: Move | None = None,
    objectives: Asked | None = None,
    *,
    drawn: Draws | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """One line per objective: the first budget at which |threshold| is exceeded and stays so to the last one.

    The difference is checkpoint − base under the same condition, in [−1, 1]; `move` says whether a rise (`up`) or a
    fall is looked for (default: the measure's worse direction). `estimate` is the onset of the point estimates, `low`
    and `high` its 2.5% and 97.5% quantiles over draws, `p_never` the share of draws without one. `tested` is the first
    budget from which the simultaneous 95% lower bounds (max-t over the trajectory's budgets) exceed the threshold: the
    true onset is at or before it, with 95% confidence. Never is `inf`, beyond the `largest` budget measured, and
    `says` puts it in words; NaN is withheld, and `note` says why. Raises StatsError for a measure without a worse
    direction where no `move` is given.
    """
    if not -1 < threshold < 1:
        raise StatsError(f"a threshold of {threshold}: differences lie between −1 and 1, so 5 points are 0.05")
    drawn = drawn or draws(rows, conditions, (measure,), resamples=resamples, seed=seed)
    found = trajectories(drawn, measure, objectives)
    move = move or _worse(drawn, measure)
    lines = [_line(t, drawn, measure, abs(threshold), move) for t in found]
    return pd.DataFrame(lines, columns=COLUMNS)


def _worse(drawn: Draws, measure: str) -> Move:
    better = drawn.cells.loc[drawn.cells["measure"] == measure, "better"].iloc[0]
    if better not in ("higher", "lower"):
        raise StatsError(f'{measure} has no worse direction: say move="up" or move="down"')
    return "up" if better == "lower" else "down"


def _line(trajectory: Trajectory, drawn: Draws, measure: str, threshold: float, move: Move) -> dict[str, object]:
    budgets_B = trajectory.budgets_B
    line: dict[str, object] = trajectory.key | {"measure": measure, "move": move, "threshold": threshold}
    line |= dict.fromkeys(("estimate", "low", "high", "p_never", "tested"), float("nan"))
    line |= {"largest": budgets_B[-1], "says": "", "n_budgets": len(budgets_B), "n_clusters": trajectory.n_clusters}
    if trajectory.withheld or trajectory.base < 0:
        missing = "" if trajectory.base >= 0 else f"no base under {trajectory.condition}: nothing to differ from"
        return line | {"note": notes(missing, trajectory.withheld)}
    sign = 1.0 if move == "up" else -1.0
    columns, base = trajectory.columns_B, trajectory.base
    point_B = sign * (drawn.point_K[columns] - drawn.point_K[base])
    drawn_RB = sign * (drawn.drawn_RK[:, columns] - drawn.drawn_RK[:, [base]])
    moved_B = np.array([drawn.moved((k, base), (1, -1)) for k in columns])
    line["estimate"] = first_lasting(point_B[None] > threshold, budgets_B)[0]
    said = []
    if trajectory.n_clusters < MIN_CLUSTERS:
        said.append(f"{trajectory.n_clusters} prompts: too few for an interval")
    elif (moved_B < MIN_MOVED).all():
        said.append("hardly any prompt moved at any budget: no interval")
    else:
        of_draws = first_lasting(drawn_RB > threshold, budgets_B)
        low, high = np.quantile(of_draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="inverted_cdf")
        bound_B = np.where(moved_B >= MIN_MOVED, simultaneous_lower(point_B, drawn_RB), -1.0)
        line |= {"low": float(low), "high": float(high), "p_never": round(float(np.isinf(of_draws).mean()), 10)}
        line["tested"] = first_lasting(bound_B[None] > threshold, budgets_B)[0]
    line["says"] = _says(line)
    return line | {"note": notes(*said, trajectory.note)}


def first_lasting(beyond_RB: np.ndarray, budgets_B: Floats) -> Floats:
    """(R,): the first budget from which every later one is beyond as well; inf where the last one is not."""
    # counted from the end: how many in a row are beyond
    run_R = np.cumprod(beyond_RB[:, ::-1], axis=1).sum(axis=1).astype(np.intp)
    return np.append(budgets_B[::-1], NEVER)[np.where(run_R > 0, run_R - 1, len(budgets_B))]


def _says(line: dict[str, object]) -> str:
    def name(budget: object) -> str:
        return f"not by {line['largest']:,.0f}" if budget == NEVER else f"{budget:,.0f}"

    if line["low"] != line["low"]:
        return name(line["estimate"])
    span = "" if line["low"] == line["high"] else f", 95% {name(line['low'])} to {name(line['high'])}"
    return f"{name(line['estimate'])}{span}; in {line['p_never']:.0%} of draws not at all"
