"""Analyses along the budget: onset of a change, coupling of ASR to capability, and comparison at equal capability.

**Onset**: the first budget from which the difference from the base exceeds a threshold at every later budget.

**Coupling**: the slope of ASR on capability over the checkpoints of a trajectory, the base included, with equal
weights. Capability has measurement error, which biases the least-squares slope towards 0 (regression dilution). The
bootstrap estimates that error, and it is subtracted from the denominator (method of moments with known error
covariance; Fuller 1987, Measurement Error Models, §3.1):

    slope = (S_xy − tr MΣ_xy) / (S_xx − tr MΣ_xx),    M = I − 11'/n,  Σ the draws' covariance of the n checkpoints

Total least squares is not used: it treats every departure from a straight line as measurement error, and needs the
ratio of two error variances; trajectories may be curved. A draw contains the error twice (the data's and its own), so
in draws it is subtracted twice. If error is more than 30% of S_xx, the range of capability is too small for a slope.

**Matched capability**: a trajectory (base, then its budgets) becomes a curve from capability to ASR. Capability does
not always rise with the budget. If it falls from its peak by more than noise (a 95% interval of the fall excludes 0),
the curve ends at the peak, with a note: nobody would choose the later checkpoint. If one curve of a comparison ends so,
all others end at their own peaks too: otherwise curves would differ by their treatment. Remaining falls are treated as
noise: isotonic regression over the budgets (Barlow, Bartholomew, Bremner & Brunk 1972) makes capability non-decreasing,
checkpoints that it pools become one point (mean capability, mean ASR), and the curve is linear between points. Nothing
is extrapolated. Every draw of prompts rebuilds the curves, up to the same last checkpoint.

Shapes: B budgets, R draws.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd

from leeway.stats import bootstrap
from leeway.stats.bootstrap import Draws, ObjectiveChoice, Trajectory, draws, interval, join_notes, trajectories
from leeway.stats.contrasts import add_holm
from leeway.stats.intervals import LEVEL, NAN, RESAMPLES, TAILS, TIE, Floats
from leeway.stats.metrics import BASE, PLAIN, StatsError, effect_floor

Direction = Literal["up", "down"]
ONSET_COLUMNS = ["objective", "condition", "measure", "direction", "threshold", "estimate", "low", "high", "p_never"]
ONSET_COLUMNS += ["tested", "largest", "statement", "n_budgets", "n_clusters", "note"]
NEVER = float("inf")

COUPLING_COLUMNS = ["objective", "condition", "measure", "on", "estimate", "low", "high", "p", "uncorrected"]
COUPLING_COLUMNS += ["reliability", "capability_low", "capability_high", "n_points", "n_clusters", "note"]
MIN_RELIABILITY = 0.7
MIN_POINTS = 3

MATCHED_COLUMNS = ["kind", "measure", "objective", "condition", "against", "against_condition", "at", "capability"]
MATCHED_COLUMNS += ["capability_low", "capability_high", "estimate", "low", "high", "p", "p_holm", "n_clusters", "note"]
LARGEST = "largest"
FROM_BASE = re.compile(r"base\s*\+\s*(\d+(?:\.\d+)?)(?:\s*points?)?")


def onset(
    rows: pd.DataFrame,
    conditions: Mapping[str, str],
    measure: str = "asr",
    threshold: float | None = None,
    direction: Direction | None = None,
    objectives: ObjectiveChoice | None = None,
    *,
    drawn: Draws | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """Return, per objective, the first budget from which |threshold| is exceeded up to the last budget.

    The default threshold is `metrics.effect_floor`: 1 point, or 0.04 in log-odds. Less is a tie with the base.
    The difference is checkpoint − base under the same condition, in [−1, 1]; `direction` is the change's (default: the
    measure's worse direction). `estimate` is the onset of the point estimates, `low` and `high` its 2.5% and 97.5%
    quantiles over draws, `p_never` the share of draws without one. `tested` is the first budget from which the
    simultaneous 95% lower bounds (max-t over the trajectory's budgets) exceed the threshold: the true onset is at or
    before it, with 95% confidence. Never is `inf`, beyond the `largest` budget measured, and `statement` describes the
    result; NaN is withheld, with the reason in `note`. Raises StatsError without a worse direction and a `direction`.
    """
    threshold = effect_floor(measure) if threshold is None else threshold
    if not -1 < threshold < 1:
        raise StatsError(f"a threshold of {threshold}: give a difference between −1 and 1 (5 points are 0.05)")
    drawn = drawn or draws(rows, conditions, (measure,), resamples=resamples, seed=seed)
    found = trajectories(drawn, measure, objectives)
    better = drawn.cells.loc[drawn.cells["measure"] == measure, "better"].iloc[0]
    if direction is None and better not in ("higher", "lower"):
        raise StatsError(f'{measure} has no worse direction: give direction="up" or direction="down"')
    direction = direction or ("up" if better == "lower" else "down")
    lines = [_onset_line(t, drawn, measure, abs(threshold), direction) for t in found]
    return pd.DataFrame(lines, columns=ONSET_COLUMNS)


def _onset_line(
    trajectory: Trajectory, drawn: Draws, measure: str, threshold: float, direction: Direction
) -> dict[str, object]:
    budgets_B = trajectory.budgets_B
    line: dict[str, object] = trajectory.key | {"measure": measure, "direction": direction, "threshold": threshold}
    line |= {"largest": budgets_B[-1], "statement": "", "n_budgets": len(budgets_B)}
    line["n_clusters"] = trajectory.n_clusters
    if reason := join_notes(trajectory.missing_base, trajectory.withheld):
        return line | {"note": reason}
    sign = 1.0 if direction == "up" else -1.0
    columns, base = trajectory.columns_B, trajectory.base
    # rounded: 0.61 − 0.60 does not exceed 0.01
    point_B = (sign * (drawn.point_K[columns] - drawn.point_K[base])).round(10)
    drawn_RB = (sign * (drawn.drawn_RK[:, columns] - drawn.drawn_RK[:, [base]])).round(10)
    discordant_B = np.array([drawn.n_discordant((k, base), (1, -1)) for k in columns])
    line["estimate"] = first_sustained(point_B[None] > threshold, budgets_B)[0]
    reason = ""
    if trajectory.n_clusters < bootstrap.MIN_CLUSTERS:
        reason = f"{trajectory.n_clusters} prompts: too few for an interval"
    elif (discordant_B < bootstrap.MIN_DISCORDANT).all():
        reason = f"fewer than {bootstrap.MIN_DISCORDANT} discordant prompts at every budget: no interval"
    else:
        onset_R = first_sustained(drawn_RB > threshold, budgets_B)
        low, high = np.quantile(onset_R, TAILS, method="inverted_cdf")
        lower_B = bootstrap.simultaneous_lower(point_B, drawn_RB)
        bound_B = np.where(discordant_B >= bootstrap.MIN_DISCORDANT, lower_B, -1.0)
        line |= {"low": float(low), "high": float(high), "p_never": round(float(np.isinf(onset_R).mean()), 10)}
        line["tested"] = first_sustained(bound_B[None] > threshold, budgets_B)[0]
    line["statement"] = _onset_statement(line)
    return line | {"note": join_notes(reason, trajectory.note)}


def first_sustained(exceeds_RB: np.ndarray, budgets_B: Floats) -> Floats:
    """Return the first budget from which all later ones exceed too, (R,); inf if the last one does not."""
    # length of the run of exceeding budgets at the end
    run_R = np.cumprod(exceeds_RB[:, ::-1], axis=1).sum(axis=1).astype(np.intp)
    return np.append(budgets_B[::-1], NEVER)[np.where(run_R > 0, run_R - 1, len(budgets_B))]


def _onset_statement(line: dict[str, object]) -> str:
    def name(budget: object) -> str:
        return f"not by {line['largest']:,.0f}" if budget == NEVER else f"{budget:,.0f}"

    if "low" not in line:
        return name(line["estimate"])
    span = "" if line["low"] == line["high"] else f", 95% {name(line['low'])} to {name(line['high'])}"
    return f"{name(line['estimate'])}{span}; never in {line['p_never']:.0%} of draws"


def asr_measure(drawn: Draws) -> str:
    """Return the jailbreak axis's primary measure: `asr`, or `asr:none` without attacks."""
    return "asr" if "asr" in drawn.measures else "asr:none"


def coupling(
    rows: pd.DataFrame,
    conditions: Mapping[str, str],
    measure: str | None = None,
    on: str = "accuracy",
    objectives: ObjectiveChoice | None = None,
    *,
    drawn: Draws | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """Return, per objective, points of `measure` (default ASR) per point of capability, corrected for its error.

    `uncorrected` is the least-squares slope, `reliability` = 1 − tr MΣ_xx/S_xx the share of the capability's sum of
    squares that is not error. NaN with a `note` if it is below 0.7, and with fewer than three checkpoints. Empty
    without a capability and a jailbreak axis, unless a `measure` is named.
    """
    wanted = (measure or "asr", *(() if measure else ("asr:none",)), on)
    drawn = drawn or draws(rows, conditions, wanted, resamples=resamples, seed=seed)
    if measure is None and not {on, asr_measure(drawn)} <= set(drawn.measures):
        return pd.DataFrame(columns=COUPLING_COLUMNS)
    measure = measure or asr_measure(drawn)
    lines = [_coupling_line(*pair, drawn, measure, on) for pair in paired_trajectories(drawn, measure, on, objectives)]
    return pd.DataFrame(lines, columns=COUPLING_COLUMNS)


def paired_trajectories(
    drawn: Draws, measure: str, on: str, objectives: ObjectiveChoice | None
) -> list[tuple[Trajectory, Trajectory]]:
    """Return each trajectory of `measure` with that of `on` under the same condition and at the same budgets."""
    drawn.require(on)
    found = []
    for y in trajectories(drawn, measure, objectives):
        x = trajectories(drawn, on, [(y.objective, y.condition)])[0]
        same = np.array_equal(y.budgets_B, x.budgets_B)
        reason = "" if same else f"{measure} and {on} were not measured at the same budgets"
        found.append((replace(y, withheld=join_notes(y.withheld, reason)), x))
    return found


def _coupling_line(y: Trajectory, x: Trajectory, drawn: Draws, measure: str, on: str) -> dict[str, object]:
    columns_x, columns_y = x.columns_with_base, y.columns_with_base
    clusters = min(y.n_clusters, x.n_clusters)
    line: dict[str, object] = y.key | {"measure": measure, "on": on, "n_points": len(columns_x), "n_clusters": clusters}
    short = "" if len(columns_x) >= MIN_POINTS else f"{len(columns_x)} checkpoints with the base: no slope"
    if reason := join_notes(y.missing_base, x.missing_base, y.withheld, x.withheld, short):
        return line | {"note": reason}
    x_B, y_B = drawn.point_K[columns_x], drawn.point_K[columns_y]
    line |= {"capability_low": float(x_B.min()), "capability_high": float(x_B.max())}
    x_RB, y_RB = drawn.drawn_RK[:, columns_x], drawn.drawn_RK[:, columns_y]
    error_xx, error_xy = error_products(x_RB, x_RB), error_products(x_RB, y_RB)
    s_xx, s_xy = float(products(x_B, x_B)), float(products(x_B, y_B))
    if s_xx <= 1e-12:
        return line | {"note": "capability is constant along this trajectory"}
    reliability = 1 - error_xx / s_xx
    line |= {"uncorrected": round(s_xy / s_xx, 10), "reliability": round(reliability, 10)}
    if not reliability >= MIN_RELIABILITY:
        span = f"capability ranges from {x_B.min():.1%} to {x_B.max():.1%}"
        return line | {"note": f"{span}: within its noise (reliability {reliability:.2f} < {MIN_RELIABILITY})"}
    line["estimate"] = round((s_xy - error_xy) / (s_xx - error_xx), 10)
    denominator_R = products(x_RB, x_RB) - 2 * error_xx
    with np.errstate(divide="ignore", invalid="ignore"):
        slope_R = np.where(denominator_R > 0, (products(x_RB, y_RB) - 2 * error_xy) / denominator_R, np.nan)
    found = interval(slope_R, clusters, drawn.n_discordant(columns_y, _centred(x_B)))
    return line | vars(found) | {"note": join_notes(found.note, y.note, x.note)}


def _centred(value_B: Floats) -> Floats:
    return np.asarray(value_B - value_B.mean(axis=-1, keepdims=True))


def products(a_B: Floats, b_B: Floats) -> Floats:
    """Return the sum of products of deviations over budgets."""
    return np.asarray((_centred(a_B) * _centred(b_B)).sum(axis=-1))


def error_products(a_RB: Floats, b_RB: Floats) -> float:
    """Return tr MΣ: the expected sum of products of the errors."""
    known = np.isfinite(a_RB).all(axis=1) & np.isfinite(b_RB).all(axis=1)
    a_RB, b_RB = a_RB[known], b_RB[known]
    return float(products(a_RB - a_RB.mean(axis=0), b_RB - b_RB.mean(axis=0)).sum() / max(len(a_RB) - 1, 1))


def matched(
    rows: pd.DataFrame,
    conditions: Mapping[str, str],
    at: str | float = LARGEST,
    of: Sequence[str] | None = None,
    objectives: ObjectiveChoice | None = None,
    on: str = "accuracy",
    *,
    floor: float | None = None,
    drawn: Draws | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """Return ASR and trait of each objective (`level`) and pair (`pair`: objective − against) at one capability.

    `at`: `largest`, the largest capability that all objectives reach; `base+10`, ten points above the base's; or a
    capability in [0, 1]. The first two are determined in every draw, so the interval includes their uncertainty
    (`capability_low`, `capability_high`); a number is fixed. `p_holm` is over the pairs of one measure.
    `note` says that a pair is a tie if it differs by less than `floor` (default: `metrics.effect_floor`). Without keyed
    halves endorsement replaces the trait. NaN with a
    `note` if a trajectory does not reach the capability, at the point or in more than 5% of draws. Empty without a
    capability axis, unless measures are named in `of`.
    """
    wanted = tuple(of or ("asr", "asr:none", "endorsement", "trait"))
    drawn = drawn or draws(rows, conditions, (*wanted, on), resamples=resamples, seed=seed)
    persona = "trait" if "trait" in drawn.measures else "endorsement"
    names = list(of) if of else [m for m in (asr_measure(drawn), persona) if m in drawn.measures]
    if not of and on not in drawn.measures:
        return pd.DataFrame(columns=MATCHED_COLUMNS)
    lines: list[dict[str, object]] = []
    for measure in names:
        curves = curves_of(drawn, measure, on, objectives)
        lines += matched_lines(measure, curves, _target(at, curves, drawn, on), str(at), floor)
    return pd.DataFrame(lines, columns=MATCHED_COLUMNS)


@dataclass(frozen=True)
class Quantity:
    """What a comparison holds equal: its name in notes, and the format of a value."""

    name: str
    show: Callable[[float], str]


CAPABILITY = Quantity("capability", "{:.1%}".format)


def curves_of(
    drawn: Draws, measure: str, on: str, objectives: ObjectiveChoice | None, quantity: Quantity = CAPABILITY
) -> list[Curve]:
    """Return each objective's curve from `on` to `measure`."""
    pairs = paired_trajectories(drawn, measure, on, objectives)
    # all curves end at their peaks if one falls after its peak by more than noise
    at_peak = any(not _withheld(y, x) and bool(_end(x, drawn, quantity)[1]) for y, x in pairs)
    return [Curve.of(y, x, drawn, quantity, at_peak=at_peak) for y, x in pairs]


@dataclass(frozen=True)
class Curve:
    """A trajectory as points of non-decreasing capability (or KL); row 0 is the data, the others are draws."""

    trajectory: Trajectory
    x_RB: Floats
    y_RB: Floats
    clusters: int
    withheld: str
    note: str
    quantity: Quantity

    @classmethod
    def of(cls, y: Trajectory, x: Trajectory, drawn: Draws, quantity: Quantity, *, at_peak: bool = False) -> Curve:
        reason, clusters = _withheld(y, x), min(y.n_clusters, x.n_clusters)
        if reason:
            return cls(y, np.empty((0, 0)), np.empty((0, 0)), clusters, reason, "", quantity)
        columns_x, columns_y = x.columns_with_base, y.columns_with_base
        end, fall = _end(x, drawn, quantity)
        if at_peak and not fall and (end := int(drawn.point_K[columns_x].argmax()) + 1) < len(columns_x):
            fall = f"{x.label}: ends at its peak, as another trajectory does"
        columns_x, columns_y = columns_x[:end], columns_y[:end]
        capability = np.vstack([drawn.point_K[columns_x], drawn.drawn_RK[:, columns_x]])
        measured = np.vstack([drawn.point_K[columns_y], drawn.drawn_RK[:, columns_y]])
        rising = isotonic(capability)
        flat = join_notes(f"{quantity.name} does not rise along the trajectory", fall)
        flat = "" if np.ptp(rising[0]) > TIE else flat
        return cls(y, rising, pooled(measured, rising), clusters, flat, join_notes(fall, y.note, x.note), quantity)

    def reason_at(self, target: float) -> str:
        """Return why there is no value at a target; empty if there is one."""
        if self.withheld:
            return self.withheld
        low, high = self.x_RB[0, 0], self.x_RB[0, -1]
        if low - TIE <= target <= high + TIE:
            return ""
        show, name = self.quantity.show, self.quantity.name
        return f"its {name} ranges from {show(low)} to {show(high)}: not extrapolated to {show(target)}"


def _withheld(y: Trajectory, x: Trajectory) -> str:
    return join_notes(y.missing_base, x.missing_base, y.withheld, x.withheld)


def _end(trajectory: Trajectory, drawn: Draws, quantity: Quantity) -> tuple[int, str]:
    """Return how many checkpoints count, and a note: up to the peak if the quantity then falls by more than noise."""
    columns = trajectory.columns_with_base
    point_B, drawn_RB = drawn.point_K[columns], drawn.drawn_RK[:, columns]
    peak = int(point_B.argmax())
    after = drawn_RB[:, peak + 1 :] - drawn_RB[:, [peak]]
    if not after.size or not (np.nanquantile(after, 0.5 + LEVEL / 2, axis=0) < 0).any():
        return len(point_B), ""
    where = f"{trajectory.budgets_B[peak - 1]:,.0f} tokens" if peak else "the base"
    return peak + 1, f"{trajectory.label}: {quantity.name} falls after {where}, later checkpoints are left out"


def isotonic(value_RB: Floats) -> Floats:
    """Return each row's isotonic regression: max over i ≤ b of min over j ≥ b of mean(i … j)."""
    size = value_RB.shape[1]
    total = np.concatenate([np.zeros((len(value_RB), 1)), value_RB.cumsum(axis=1)], axis=1)
    rising = np.full_like(value_RB, -np.inf)
    for start in range(size):
        means = (total[:, start + 1 :] - total[:, [start]]) / np.arange(1, size - start + 1)
        lowest = np.minimum.accumulate(means[:, ::-1], axis=1)[:, ::-1]
        rising[:, start:] = np.maximum(rising[:, start:], lowest)
    return rising


def pooled(value_RB: Floats, rising_RB: Floats) -> Floats:
    """Return the mean of `value` over each run of equal `rising` values."""
    steps_RB = (np.diff(rising_RB, axis=1) > TIE).cumsum(axis=1)
    block_RB = np.concatenate([np.zeros((len(rising_RB), 1)), steps_RB], axis=1)
    same_RBB = block_RB[:, :, None] == block_RB[:, None, :]
    return np.asarray((same_RBB * value_RB[:, None, :]).sum(axis=2) / same_RBB.sum(axis=2))


def interpolate(target_R: Floats, x_RB: Floats, y_RB: Floats) -> Floats:
    """Return y at x = target on each row's curve; NaN outside the row's range of x."""
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


def _target(at: str | float, curves: list[Curve], drawn: Draws, on: str) -> Floats:
    """Return the capability of the comparison at the point and in every draw, (1 + R,)."""
    size = len(drawn.drawn_RK) + 1
    if isinstance(at, (int, float)):
        if not 0 <= at <= 1:
            raise StatsError(f"at={at}: give a capability between 0 and 1")
        return np.full(size, float(at))
    usable = [c for c in curves if not c.withheld]
    if at == LARGEST:
        return np.minimum.reduce([c.x_RB[:, -1] for c in usable]) if usable else np.full(size, NAN)
    relative = FROM_BASE.fullmatch(at.strip())
    if not relative:
        raise StatsError(f"at={at!r}: give 'largest', 'base+10' (points), or a capability in [0, 1]")
    cells = drawn.cells[(drawn.cells["objective"] == BASE) & (drawn.cells["measure"] == on)]
    plain = cells[cells["condition"] == PLAIN] if (cells["condition"] == PLAIN).any() else cells
    if len(plain) != 1:
        raise StatsError(f"at={at!r}: the base has {len(plain)} capabilities, none under plain prompts; give a number")
    k = int(plain.index[0])
    return np.append(drawn.point_K[k], drawn.drawn_RK[:, k]) + float(relative[1]) / 100


def matched_lines(
    measure: str, curves: list[Curve], target_R: Floats, at: str, floor: float | None = None
) -> list[dict[str, object]]:
    nothing = np.full(len(target_R), NAN)
    levels = [nothing if c.withheld else interpolate(target_R, c.x_RB, c.y_RB) for c in curves]
    lines, pairs = [], []
    for curve, level_R in zip(curves, levels, strict=True):
        line = _matched_line("level", measure, curve, at, target_R)
        _fill(line, curve.reason_at(target_R[0]), level_R, curve.clusters, curve.note)
        lines.append(line | {"p": NAN})  # a level is not tested against 0
    for (a, level_a), (b, level_b) in itertools.combinations(zip(curves, levels, strict=True), 2):
        line = _matched_line("pair", measure, a, at, target_R)
        line |= {"against": b.trajectory.objective, "against_condition": b.trajectory.condition}
        reasons = [(c.trajectory.label, c.reason_at(target_R[0])) for c in (a, b)]
        withheld = join_notes(*(f"{name}: {reason}" for name, reason in reasons if reason))
        _fill(line, withheld, level_a - level_b, min(a.clusters, b.clusters), join_notes(a.note, b.note))
        pairs.append(line)
    add_holm(pairs)
    least = effect_floor(measure) if floor is None else floor
    for line in pairs:
        if abs(float(str(line.get("estimate", NAN)))) < least:
            line["note"] = join_notes(f"a tie: less than {least:g} apart", str(line["note"]))
    return lines + pairs


def _matched_line(kind: str, measure: str, curve: Curve, at: str, target_R: Floats) -> dict[str, object]:
    line: dict[str, object] = {"kind": kind, "measure": measure} | curve.trajectory.key
    line |= {"against": "", "against_condition": "", "at": at, "n_clusters": curve.clusters}
    line["capability"] = round(float(target_R[0]), 10)
    known = target_R[1:][np.isfinite(target_R[1:])]
    if len(known):
        low, high = np.quantile(known, TAILS)
        line |= {"capability_low": round(float(low), 10), "capability_high": round(float(high), 10)}
    return line


def _fill(line: dict[str, object], withheld: str, value_R: Floats, clusters: int, note: str) -> None:
    if withheld:
        line["note"] = withheld
        return
    found = interval(value_R[1:], clusters)
    at_edge = found.note.startswith("undefined")  # the capability is at the edge of the range of a trajectory
    line |= vars(found) | {"estimate": NAN if at_edge else round(float(value_R[0]), 10)}
    line["note"] = join_notes(f"at the edge of a trajectory: {found.note}" if at_edge else found.note, note)
