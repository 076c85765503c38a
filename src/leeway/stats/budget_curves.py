"""From which budget on a trajectory stands beyond a threshold from its base, and stays there.

How tightly vulnerability follows capability along one objective's trajectory.

The slope of ASR on capability over the checkpoints of a trajectory, the base included, each weighing the same.
Capability is itself measured with error, which pulls the least-squares slope towards 0 (regression dilution). The
bootstrap knows that error, so it is taken out of the denominator (method of moments with known error covariance;
Fuller 1987, Measurement Error Models, §3.1):

    slope = (S_xy − tr MΣ_xy) / (S_xx − tr MΣ_xx),    M = I − 11'/n,  Σ the draws' covariance of the n checkpoints

Total least squares was not taken: it calls every departure from a straight line measurement error, and needs the ratio
of two error variances; a trajectory may bend. A draw carries the error twice (the data's and its own), so that in draws
it is taken out twice. Where error is more than 30% of S_xx, there is no range to speak of and no number.

Objectives at equal capability: what each costs by the time it has bought as much.

A trajectory (base, then its budgets) becomes a curve from capability to ASR. Capability does not always rise with
budget. Where it falls from its peak by more than noise (a 95% interval of the fall that excludes 0), the curve ends at
the peak, and the note says so: nobody takes the checkpoint after. Where one curve of a comparison ends so, every other
one ends at its own peak too: one that is cut and one that is pooled would differ by the treatment. What falls are left
are taken as noise: isotonic regression over the budgets (Barlow, Bartholomew, Bremner & Brunk 1972) makes capability
rise, checkpoints that it pools are one point (mean capability, mean ASR), and between points the curve is a straight
line. It ends where the trajectory ends: nothing is extrapolated. In every draw of prompts the curves are built anew, up
to the same last checkpoint.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd

from leeway.stats.bootstrap import (
    MIN_CLUSTERS,
    MIN_MOVED,
    Asked,
    Draws,
    Trajectory,
    draws,
    interval,
    notes,
    simultaneous_lower,
    trajectories,
)
from leeway.stats.contrasts import holm
from leeway.stats.intervals import LEVEL, RESAMPLES, Floats
from leeway.stats.metrics import BASE, PLAIN, StatsError

Move = Literal["up", "down"]
ONSET_COLUMNS = ["objective", "condition", "measure", "move", "threshold", "estimate", "low", "high", "p_never"]
ONSET_COLUMNS += ["tested", "largest", "says", "n_budgets", "n_clusters", "note"]
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
    lines = [_onset_row(t, drawn, measure, abs(threshold), move) for t in found]
    return pd.DataFrame(lines, columns=ONSET_COLUMNS)


def _worse(drawn: Draws, measure: str) -> Move:
    better = drawn.cells.loc[drawn.cells["measure"] == measure, "better"].iloc[0]
    if better not in ("higher", "lower"):
        raise StatsError(f'{measure} has no worse direction: say move="up" or move="down"')
    return "up" if better == "lower" else "down"


def _onset_row(trajectory: Trajectory, drawn: Draws, measure: str, threshold: float, move: Move) -> dict[str, object]:
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


COUPLING_COLUMNS = [
    "objective",
    "condition",
    "measure",
    "on",
    "estimate",
    "low",
    "high",
    "p",
    "uncorrected",
    "reliability",
]
COUPLING_COLUMNS += ["capability_low", "capability_high", "n_points", "n_clusters", "note"]
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
        return pd.DataFrame(columns=COUPLING_COLUMNS)
    measure = measure or vulnerability(drawn)
    lines = [_coupling_row(*pair, drawn, measure, on) for pair in beside(drawn, measure, on, objectives)]
    return pd.DataFrame(lines, columns=COUPLING_COLUMNS)


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


def _coupling_row(y: Trajectory, x: Trajectory, drawn: Draws, measure: str, on: str) -> dict[str, object]:
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


MATCHED_COLUMNS = ["kind", "measure", "objective", "condition", "against", "against_condition", "at", "capability"]
MATCHED_COLUMNS += ["capability_low", "capability_high", "estimate", "low", "high", "p", "p_holm", "n_clusters", "note"]
NAN = float("nan")
LARGEST = "largest"
FROM_BASE = re.compile(r"base\s*\+\s*(\d+(?:\.\d+)?)(?:\s*points?)?")
TIE = 1e-9


def matched(
    rows: pd.DataFrame,
    conditions: Mapping[str, str],
    at: str | float = LARGEST,
    of: Sequence[str] | None = None,
    objectives: Asked | None = None,
    on: str = "accuracy",
    *,
    drawn: Draws | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """ASR and endorsement of each objective (`level`) and of each pair (`pair`: objective − against) at one capability.

    `at`: `largest`, the largest capability that all the objectives reach; `base+10`, ten points above the base's; or a
    capability in [0, 1]. The first two are chosen anew in every draw, so that the interval carries their uncertainty
    (`capability_low`, `capability_high`); a number is held. `p_holm` runs over the pairs of one measure. NaN with a
    `note` where a trajectory does not reach the capability, at the point or in more than 5% of draws. Empty without a
    capability axis, where no measures were named.
    """
    wanted = tuple(of or ("asr", "asr:none", "endorsement"))
    drawn = drawn or draws(rows, conditions, (*wanted, on), resamples=resamples, seed=seed)
    names = list(of) if of else [m for m in (vulnerability(drawn), "endorsement") if m in drawn.measures]
    if not of and on not in drawn.measures:
        return pd.DataFrame(columns=MATCHED_COLUMNS)
    lines: list[dict[str, object]] = []
    for measure in names:
        curves = _curves(beside(drawn, measure, on, objectives), drawn)
        lines += _of_measure(measure, curves, _target(at, curves, drawn, on), str(at))
    return pd.DataFrame(lines, columns=MATCHED_COLUMNS)


@dataclass(frozen=True)
class _Curve:
    """A trajectory as points of rising capability; row 0 is the data, the others are draws."""

    trajectory: Trajectory
    x_RB: Floats
    y_RB: Floats
    clusters: int
    why: str
    note: str

    @classmethod
    def of(cls, y: Trajectory, x: Trajectory, drawn: Draws, *, at_peak: bool = False) -> _Curve:
        missing = "" if min(x.base, y.base) >= 0 else f"no base under {y.condition}"
        why, clusters = notes(missing, y.withheld, x.withheld), min(y.n_clusters, x.n_clusters)
        if why:
            return cls(y, np.empty((0, 0)), np.empty((0, 0)), clusters, why, "")
        of_x, of_y = with_base(x), with_base(y)
        end, fallen = _end(x, drawn.point_K[of_x], drawn.drawn_RK[:, of_x])
        if at_peak and not fallen and (end := int(drawn.point_K[of_x].argmax()) + 1) < len(of_x):
            fallen = f"{x.label}: ends at its peak too, as another one does"
        of_x, of_y = of_x[:end], of_y[:end]
        capability = np.vstack([drawn.point_K[of_x], drawn.drawn_RK[:, of_x]])
        measured = np.vstack([drawn.point_K[of_y], drawn.drawn_RK[:, of_y]])
        rising = isotonic(capability)
        flat = "" if np.ptp(rising[0]) > TIE else notes("capability does not rise along it", fallen)
        return cls(y, rising, pooled(measured, rising), clusters, flat, notes(fallen, y.note, x.note))

    def level(self, target_R: Floats) -> Floats:
        return interpolate(target_R, self.x_RB, self.y_RB)


def _curves(found: Sequence[tuple[Trajectory, Trajectory]], drawn: Draws) -> list[_Curve]:
    """Every trajectory's curve; all end at their peaks where one falls after its own by more than noise."""
    falls = [
        not notes(y.withheld, x.withheld)
        and min(x.base, y.base) >= 0
        and bool(_end(x, drawn.point_K[with_base(x)], drawn.drawn_RK[:, with_base(x)])[1])
        for y, x in found
    ]
    return [_Curve.of(y, x, drawn, at_peak=any(falls)) for y, x in found]


def _end(trajectory: Trajectory, point_B: Floats, drawn_RB: Floats) -> tuple[int, str]:
    """How many checkpoints count: up to the peak where capability then falls by more than noise, or all."""
    peak = int(point_B.argmax())
    after = drawn_RB[:, peak + 1 :] - drawn_RB[:, [peak]]
    if not after.size or not (np.nanquantile(after, 0.5 + LEVEL / 2, axis=0) < 0).any():
        return len(point_B), ""
    where = f"{trajectory.budgets_B[peak - 1]:,.0f} tokens" if peak else "the base"
    return peak + 1, f"{trajectory.label}: capability falls after {where}, and the rest is left out"


def isotonic(value_RB: Floats) -> Floats:
    """Each row's closest non-decreasing values: max over i ≤ b of min over j ≥ b of mean(i … j)."""
    size = value_RB.shape[1]
    total = np.concatenate([np.zeros((len(value_RB), 1)), value_RB.cumsum(axis=1)], axis=1)
    risen = np.full_like(value_RB, -np.inf)
    for start in range(size):
        means = (total[:, start + 1 :] - total[:, [start]]) / np.arange(1, size - start + 1)
        from_here = np.minimum.accumulate(means[:, ::-1], axis=1)[:, ::-1]
        risen[:, start:] = np.maximum(risen[:, start:], from_here)
    return risen


def pooled(value_RB: Floats, rising_RB: Floats) -> Floats:
    """The mean of `value` over each run of equal `rising` values."""
    block_RB = np.concatenate(
        [np.zeros((len(rising_RB), 1)), (np.diff(rising_RB, axis=1) > TIE).cumsum(axis=1)], axis=1
    )
    same_RBB = block_RB[:, :, None] == block_RB[:, None, :]
    return np.asarray((same_RBB * value_RB[:, None, :]).sum(axis=2) / same_RBB.sum(axis=2))


def interpolate(target_R: Floats, x_RB: Floats, y_RB: Floats) -> Floats:
    """y where the row's curve has x = target; NaN outside the row's range of x."""
    rows, last = np.arange(len(x_RB)), x_RB.shape[1] - 1
    at_end = np.abs(target_R - x_RB[:, last]) <= TIE
    at_start = np.abs(target_R - x_RB[:, 0]) <= TIE
    left = np.clip((x_RB <= target_R[:, None]).sum(axis=1) - 1, 0, last - 1)
    x0, x1, y0, y1 = x_RB[rows, left], x_RB[rows, left + 1], y_RB[rows, left], y_RB[rows, left + 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        between = y0 + (target_R - x0) / (x1 - x0) * (y1 - y0)
    inside = (target_R >= x_RB[:, 0]) & (target_R <= x_RB[:, last])
    found = np.where(at_end, y_RB[:, last], np.where(at_start, y_RB[:, 0], between))
    return np.where(inside | at_end | at_start, found, NAN)


def _target(at: str | float, curves: list[_Curve], drawn: Draws, on: str) -> Floats:
    """(1 + R,): the capability of the comparison at the point and in every draw."""
    size = len(drawn.drawn_RK) + 1
    if isinstance(at, (int, float)):
        if not 0 <= at <= 1:
            raise StatsError(f"at={at}: a capability lies between 0 and 1")
        return np.full(size, float(at))
    usable = [c for c in curves if not c.why]
    if at == LARGEST:
        return np.minimum.reduce([c.x_RB[:, -1] for c in usable]) if usable else np.full(size, NAN)
    said = FROM_BASE.fullmatch(at.strip())
    if not said:
        raise StatsError(f"at={at!r}: say 'largest', 'base+10' (points), or a capability in [0, 1]")
    cells = drawn.cells[(drawn.cells["objective"] == BASE) & (drawn.cells["measure"] == on)]
    plain = cells[cells["condition"] == PLAIN] if (cells["condition"] == PLAIN).any() else cells
    if len(plain) != 1:
        raise StatsError(
            f"at={at!r}: the base has {len(plain)} capabilities and none under plain prompts; give a number"
        )
    k = int(plain.index[0])
    return np.append(drawn.point_K[k], drawn.drawn_RK[:, k]) + float(said[1]) / 100


def _of_measure(measure: str, curves: list[_Curve], target_R: Floats, at: str) -> list[dict[str, object]]:
    levels = [np.full(len(target_R), NAN) if c.why else c.level(target_R) for c in curves]
    lines = [_matched_row("level", measure, c, at, target_R) for c in curves]
    for line, curve, level in zip(lines, curves, levels, strict=True):
        _fill(line, curve.why or _outside(curve, target_R[0]), level, curve.clusters, curve.note)
        line["p"] = NAN  # a level is not tested against 0
    pairs = []
    for (a, of_a), (b, of_b) in itertools.combinations(zip(curves, levels, strict=True), 2):
        line = _matched_row("pair", measure, a, at, target_R)
        line |= {"against": b.trajectory.objective, "against_condition": b.trajectory.condition}
        reasons = [(c.trajectory.label, c.why or _outside(c, target_R[0])) for c in (a, b)]
        why = notes(*(f"{name}: {reason}" for name, reason in reasons if reason))
        _fill(line, why, of_a - of_b, min(a.clusters, b.clusters), notes(a.note, b.note))
        pairs.append(line)
    tested = [line for line in pairs if line["p"] == line["p"]]
    for line, p in zip(tested, holm(np.array([float(str(t["p"])) for t in tested])), strict=True):
        line["p_holm"] = round(float(p), 10)
    return lines + pairs


def _matched_row(kind: str, measure: str, curve: _Curve, at: str, target_R: Floats) -> dict[str, object]:
    line: dict[str, object] = {"kind": kind, "measure": measure} | curve.trajectory.key
    line |= {"against": "", "against_condition": "", "at": at, "n_clusters": curve.clusters}
    line |= dict.fromkeys(("estimate", "low", "high", "p", "p_holm", "capability_low", "capability_high"), NAN)
    line["capability"] = round(float(target_R[0]), 10)
    known = target_R[1:][np.isfinite(target_R[1:])]
    if len(known):
        low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        line |= {"capability_low": round(float(low), 10), "capability_high": round(float(high), 10)}
    return line


def _outside(curve: _Curve, target: float) -> str:
    low, high = curve.x_RB[0, 0], curve.x_RB[0, -1]
    if low - TIE <= target <= high + TIE:
        return ""
    return f"its capability runs from {low:.1%} to {high:.1%}, not to {target:.1%}: not extrapolated"


def _fill(line: dict[str, object], why: str, value_R: Floats, clusters: int, weak: str) -> None:
    if why:
        line["note"] = why
        return
    found = interval(value_R[1:], clusters)
    line |= {"estimate": round(float(value_R[0]), 10), "low": found.low, "high": found.high, "p": found.p}
    if found.note.startswith("undefined"):  # the capability is at the edge of what a trajectory reaches
        line |= {"estimate": NAN}
        line["note"] = notes(f"at the edge of a trajectory: {found.note}", weak)
    else:
        line["note"] = notes(found.note, weak)
