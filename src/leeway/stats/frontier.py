"""Which checkpoints no other one beats on capability and robustness at once, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from leeway.stats.coupling import vulnerability
from leeway.stats.draws import Draws, draws
from leeway.stats.intervals import RESAMPLES, Floats
from leeway.stats.measures import CHECKPOINT
from leeway.stats.rates import rates
from leeway.stats.trajectory import MIN_CLUSTERS

COLUMNS = [*CHECKPOINT, "capability", "asr", "on_frontier", "p_on_frontier", "dominated_by", "note"]
NOTE = "p_on_frontier: share of draws of prompts in which nothing dominates it; new training runs are not in it"
UNDRAWN = "point estimates only: no uncertainty is carried into who dominates whom"
AT_ONCE = 4_000_000  # comparisons held at once


def frontier(
    rows: pd.DataFrame, conditions: Mapping[str, str], *, resamples: int = RESAMPLES, seed: int = 0
) -> pd.DataFrame:
    """Every checkpoint's accuracy and ASR; on the frontier if none is as good on both and better on one.

    `p_on_frontier` is the share of joint draws of prompts (`stats.draws`) in which it is. Without a capability and a
    jailbreak axis the table is empty; a checkpoint whose rate on either was withheld is left out.
    """
    wanted = ("accuracy", "asr", "asr:none")
    return frontier_of(
        rates(rows, conditions), draws(rows, conditions, wanted, resamples=resamples, seed=seed, by_seed=True)
    )


def frontier_of(table: pd.DataFrame, drawn: Draws | None = None) -> pd.DataFrame:
    """The same from a table of rates already made, and draws `by_seed`; without them `p_on_frontier` is NaN."""
    # before the pivot, which drops a measure withheld everywhere: direct requests must not take its place
    asr = "asr" if (table["measure"] == "asr").any() else "asr:none"
    wide = table.pivot_table(index=CHECKPOINT, columns="measure", values="rate", sort=False)
    if "accuracy" not in wide or asr not in wide:
        return pd.DataFrame(columns=COLUMNS)
    points = wide[["accuracy", asr]].dropna().set_axis(["capability", "asr"], axis=1).reset_index()
    beaten = dominated(points["capability"].to_numpy(float)[None], points["asr"].to_numpy(float)[None])[0]
    points["dominated_by"] = beaten
    points["on_frontier"] = beaten == 0
    points["p_on_frontier"], points["note"] = float("nan"), UNDRAWN
    if drawn is not None and len(points):
        points["p_on_frontier"], points["note"] = _membership(points, drawn)
    return points[COLUMNS]


def dominated(capability_RK: Floats, asr_RK: Floats) -> np.ndarray:
    """(R, K): how many others are as good on both and better on one."""
    x, y = capability_RK[:, None, :], asr_RK[:, None, :]
    own_x, own_y = capability_RK[:, :, None], asr_RK[:, :, None]
    as_good = (x >= own_x) & (y <= own_y)
    return np.asarray((as_good & ((x > own_x) | (y < own_y))).sum(axis=2))


def _membership(points: pd.DataFrame, drawn: Draws) -> tuple[Floats, str]:
    """The share of draws in which each point is on the frontier."""
    found = []
    for measure in ("accuracy", vulnerability(drawn)):
        cells = drawn.cells[drawn.cells["measure"] == measure].reset_index(names="column").set_index(CHECKPOINT)
        own = cells.loc[pd.MultiIndex.from_frame(points[CHECKPOINT])]
        if (own["n_clusters"] < MIN_CLUSTERS).any():
            few = f"{int(own['n_clusters'].min())} prompts: too few to say how sure the frontier is"
            return np.full(len(points), np.nan), few
        found.append(drawn.drawn_RK[:, own["column"].to_numpy(np.intp)])
    known = np.isfinite(found[0]).all(axis=1) & np.isfinite(found[1]).all(axis=1)
    capability, asr = (f[known] for f in found)
    step = max(1, AT_ONCE // len(points) ** 2)
    free = np.zeros(len(points))
    for start in range(0, len(asr), step):
        free += (dominated(capability[start : start + step], asr[start : start + step]) == 0).sum(axis=0)
    return (free / max(len(asr), 1)).round(10), NOTE
