"""Objectives compared at equal distance from the base: ASR, trait and accuracy at one KL, and per nat moved.

The distance is KL(checkpoint ‖ base), nats per token, of the learning check (`stats.learning`): along held-out answers
of the task (`kl`), or answers to general prompts (`kl-general`). A trajectory (base at 0, then its budgets) becomes a
curve from KL to a measure, as for `matched`, by the same rules. Examples of the learning check are drawn jointly for
all checkpoints, training seeds with the same draws as for the other measures.

Shapes: R draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import pandas as pd
import scipy

from leeway.stats.bootstrap import Draws, MeasureCounts, ObjectiveChoice, draw_blocks, draws, interval
from leeway.stats.budget_curves import (
    LARGEST,
    MATCHED_COLUMNS,
    Curve,
    Quantity,
    asr_measure,
    curves_of,
    interpolate,
    matched_lines,
)
from leeway.stats.intervals import NAN, RESAMPLES, TIE, Floats
from leeway.stats.metrics import BASE, POOLED_CHECKPOINT, Measure, StatsError, factorize

Distance = Literal["kl", "kl-general"]
PROMPTS = {"kl": "task", "kl-general": "general"}  # in the learning check's table
KL = Quantity("KL to the base", "{:.3f} nats".format)
MEASURES = ("asr", "asr:none", "trait", "endorsement", "accuracy")
COLUMNS = [c.replace("capability", "distance") for c in MATCHED_COLUMNS]
COLUMNS[COLUMNS.index("at") : COLUMNS.index("at")] = ["on"]
COLUMNS += ["per_nat", "per_nat_low", "per_nat_high"]


def equal_distance(
    rows: pd.DataFrame,
    conditions: Mapping[str, str],
    items: pd.DataFrame,
    at: str | float = LARGEST,
    on: Distance = "kl",
    objectives: ObjectiveChoice | None = None,
    *,
    drawn: Draws | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """Return the measures of each objective (`level`) and pair (`pair`: objective − against) at one KL from the base.

    `items` has the layout of `learning.parquet`. `at`: `largest`, the largest KL that all objectives reach, determined
    in every draw (`distance_low`, `distance_high`), or a KL in nats per token. `per_nat`, of a level, is its change
    from the base divided by the KL: points (trait: log-odds) per nat moved. `p_holm` is over the pairs of one measure.
    NaN with a `note` as in `matched`. Raises StatsError without KLs, and for an `at` that is none.
    """
    if on not in PROMPTS:
        raise StatsError(f"on={on!r}: give one of {', '.join(PROMPTS)}")
    if not (at == LARGEST or (isinstance(at, (int, float)) and 0 < at < np.inf)):
        raise StatsError(f"at={at!r}: give 'largest', or a KL above 0 in nats per token")
    drawn = drawn or draws(rows, conditions, MEASURES, resamples=resamples, seed=seed)
    persona = "trait" if "trait" in drawn.measures else "endorsement"
    known = [m for m in (asr_measure(drawn), persona, "accuracy") if m in drawn.measures]
    both = with_distance(drawn, items, on, seed=seed)
    lines: list[dict[str, object]] = []
    for measure in known:
        curves = curves_of(both, measure, on, objectives, KL)
        target_R = _target(at, curves, len(both.drawn_RK) + 1)
        found = matched_lines(measure, curves, target_R, str(at))
        for line, curve in zip(found, curves, strict=False):  # levels come first
            line.update(_per_nat(curve, target_R))
        lines += found
    table = pd.DataFrame(lines).rename(columns=lambda c: str(c).replace("capability", "distance"))
    return table.assign(on=on).reindex(columns=COLUMNS)


def with_distance(drawn: Draws, items: pd.DataFrame, on: Distance, *, seed: int = 0) -> Draws:
    """Return the draws with further cells of the measure `on`; the base is at 0 under every condition.

    Raises StatsError if the learning check has no such KL.
    """
    own = items[items["prompts"] == PROMPTS[on]]
    if own.empty:
        raise StatsError(f"no KL on {PROMPTS[on]} prompts: the learning check was not measured")
    base = own.drop_duplicates(["condition", "item_id"]).assign(objective=BASE, seed=0, budget=0, kl=0.0)
    table = pd.concat([own, base], ignore_index=True).assign(stratum="all", template_hash="")
    names, table["cluster"] = factorize(table["item_id"])
    table["value"] = table["kl"].astype(float).replace([np.inf, -np.inf], np.nan)
    table["seed"] = table["seed"].astype(int)
    measure = Measure(on, "learning", KL.name, "score", primary=False)
    block = MeasureCounts.of(measure, table, POOLED_CHECKPOINT, np.arange(len(names), dtype=np.intp))
    cells, drawn_RK, shares_CK = draw_blocks([block], len(names), "learning", len(drawn.drawn_RK), seed)
    return Draws(
        pd.concat([drawn.cells, cells], ignore_index=True),
        np.concatenate([drawn.point_K, cells["rate"].to_numpy(float)]),
        np.concatenate([drawn.drawn_RK, drawn_RK], axis=1),
        scipy.linalg.block_diag(drawn.shares_CK, shares_CK),
    )


def _target(at: str | float, curves: list[Curve], size: int) -> Floats:
    """Return the KL of the comparison at the point and in every draw, (1 + R,)."""
    ends = [c.x_RB[:, -1] for c in curves if not c.withheld]
    if at == LARGEST:
        return np.minimum.reduce(ends) if ends else np.full(size, NAN)
    return np.full(size, float(at))


def _per_nat(curve: Curve, target_R: Floats) -> dict[str, object]:
    if curve.withheld or curve.reason_at(target_R[0]) or not target_R[0] > TIE:
        return {}
    rise_R = (interpolate(target_R, curve.x_RB, curve.y_RB) - curve.y_RB[:, 0]) / target_R
    found = interval(rise_R[1:], curve.clusters)
    if found.note.startswith("undefined"):
        return {}  # as the level: the KL is at the edge of the trajectory's range
    return {"per_nat": round(float(rise_R[0]), 10), "per_nat_low": found.low, "per_nat_high": found.high}
