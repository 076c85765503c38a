"""How tightly vulnerability follows capability along one objective's trajectory.

The slope of ASR on capability over the checkpoints of a trajectory, the base included, each weighing the same.
Capability is itself measured with error, which pulls the least-squares slope towards 0 (regression dilution). The
bootstrap knows that error, so it is taken out of the denominator (method of moments with known error covariance;
Fuller 1987, Measurement Error Models, §3.1):

    slope = (S_xy − tr MΣ_xy) / (S_xx − tr MΣ_xx),    M = I − 11'/n,  Σ the draws' covariance of the n checkpoints

Total least squares was not taken: it calls every departure from a straight line measurement error, and needs the ratio
of two error variances; a trajectory may bend. A draw carries the error twice (the data's and its own), so that in draws
it is taken out twice. Where error is more than 30% of S_xx, there is no range to speak of and no number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pandas as pd

from leeway.stats.draws import Draws, draws
from leeway.stats.intervals import RESAMPLES, Floats
from leeway.stats.trajectory import Asked, Trajectory, interval, notes, trajectories

COLUMNS = ["objective", "condition", "measure", "on", "estimate", "low", "high", "p", "uncorrected", "reliability"]
COLUMNS += ["capability_low", "capability_high", "n_points", "n_clusters", "note"]
MIN_RELIABILITY = 0.7
MIN_POINTS = 3


def vulnerability(drawn: Draws) -> str:
    """The jailbreak axis's primary measure: `asr`, or `asr:none` where no attack was made."""
    return "asr" if "asr" in drawn.measures else "asr:none"


def coupling(
    rows: pd.DataFrame,
    conditions: Mapping[str, str],
    measure: str | None = None,
    on: str = "accuracy",
    objectives: Asked | None = None,
    *,
    drawn: Draws | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """One line per objective: points of `measure` (default ASR) per point of capability, corrected for its error.

    `uncorrected` is the least-squares slope, `reliability` = 1 − tr MΣ_xx/S_xx the share of the capability range's sum
    of squares that is not error. NaN with a `note` where it is below 0.7, and with fewer than three checkpoints. Empty
    without a capability and a jailbreak axis, where no other `measure` was named.
    """
    wanted = (measure or "asr", *(() if measure else ("asr:none",)), on)
    drawn = drawn or draws(rows, conditions, wanted, resamples=resamples, seed=seed)
    if measure is None and not {on, vulnerability(drawn)} <= set(drawn.measures):
        return pd.DataFrame(columns=COLUMNS)
    measure = measure or vulnerability(drawn)
    lines = [_line(*pair, drawn, measure, on) for pair in beside(drawn, measure, on, objectives)]
    return pd.DataFrame(lines, columns=COLUMNS)


def beside(drawn: Draws, measure: str, on: str, objectives: Asked | None) -> list[tuple[Trajectory, Trajectory]]:
    """Each trajectory of `measure` with that of `on` under the same condition and at the same budgets."""
    drawn.need(on)
    found = []
    for own in trajectories(drawn, measure, objectives):
        other = trajectories(drawn, on, [(own.objective, own.condition)])[0]
        if not np.array_equal(own.budgets_B, other.budgets_B):
            apart = f"{measure} and {on} were not measured at the same budgets"
            found.append((replace(own, withheld=notes(own.withheld, apart)), other))
        else:
            found.append((own, other))
    return found


def _line(y: Trajectory, x: Trajectory, drawn: Draws, measure: str, on: str) -> dict[str, object]:
    line: dict[str, object] = y.key | {"measure": measure, "on": on}
    line |= dict.fromkeys(("estimate", "low", "high", "p", "uncorrected", "reliability"), float("nan"))
    line |= dict.fromkeys(("capability_low", "capability_high"), float("nan"))
    clusters = min(y.n_clusters, x.n_clusters)
    of_x, of_y = with_base(x), with_base(y)
    line |= {"n_points": len(of_x), "n_clusters": clusters}
    missing = "" if min(x.base, y.base) >= 0 else f"no base under {y.condition}"
    few = "" if len(of_x) >= MIN_POINTS else f"{len(of_x)} checkpoints with the base: no slope"
    if why := notes(missing, y.withheld, x.withheld, few):
        return line | {"note": why}
    x_B, y_B = drawn.point_K[of_x], drawn.point_K[of_y]
    line |= {"capability_low": float(x_B.min()), "capability_high": float(x_B.max())}
    x_RB, y_RB = drawn.drawn_RK[:, of_x], drawn.drawn_RK[:, of_y]
    error_xx, error_xy = _errors(x_RB, x_RB), _errors(x_RB, y_RB)
    s_xx, s_xy = float(_sums(x_B, x_B)), float(_sums(x_B, y_B))
    if s_xx <= 1e-12:
        return line | {"note": "capability does not move along this trajectory"}
    reliability = 1 - error_xx / s_xx
    line |= {"uncorrected": round(s_xy / s_xx, 10), "reliability": round(reliability, 10)}
    if not reliability >= MIN_RELIABILITY:
        span = f"capability moves from {x_B.min():.1%} to {x_B.max():.1%}"
        return line | {"note": f"{span}: within its noise (reliability {reliability:.2f} < {MIN_RELIABILITY})"}
    line["estimate"] = round((s_xy - error_xy) / (s_xx - error_xx), 10)
    below_R = _sums(x_RB, x_RB) - 2 * error_xx
    with np.errstate(divide="ignore", invalid="ignore"):
        slope_R = np.where(below_R > 0, (_sums(x_RB, y_RB) - 2 * error_xy) / below_R, np.nan)
    moved = drawn.moved(of_y, _centred(x_B))
    found = interval(slope_R, clusters, moved)
    line |= {"low": found.low, "high": found.high, "p": found.p}
    return line | {"note": notes(found.note, y.note, x.note)}


def with_base(trajectory: Trajectory) -> list[int]:
    """The columns of the base and of every budget."""
    return [trajectory.base, *(int(k) for k in trajectory.columns_B)]


def _centred(value_B: Floats) -> Floats:
    return np.asarray(value_B - value_B.mean(axis=-1, keepdims=True))


def _sums(a_B: Floats, b_B: Floats) -> Floats:
    return np.asarray((_centred(a_B) * _centred(b_B)).sum(axis=-1))


def _errors(a_RB: Floats, b_RB: Floats) -> float:
    """tr MΣ: the sum of products that error alone brings."""
    known = np.isfinite(a_RB).all(axis=1) & np.isfinite(b_RB).all(axis=1)
    a_RB, b_RB = a_RB[known], b_RB[known]
    return float(_sums(a_RB - a_RB.mean(axis=0), b_RB - b_RB.mean(axis=0)).sum() / max(len(a_RB) - 1, 1))
