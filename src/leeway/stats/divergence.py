"""Do objectives diverge with scale? The interaction objective × log2(budget), jointly and by pair."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import pandas as pd

from leeway.stats.draws import Draws, draws
from leeway.stats.gee import joint, separated, wald
from leeway.stats.intervals import RESAMPLES, Floats
from leeway.stats.measures import Measure, measures, observations
from leeway.stats.multiplicity import holm
from leeway.stats.trajectory import Asked, Trajectory, interval, notes, trajectories

COLUMNS = ["kind", "method", "measure", "objective", "condition", "against", "against_condition", "estimate"]
COLUMNS += ["low", "high", "p", "p_holm", "statistic", "df", "df_resid", "unit", "n", "n_clusters", "note"]
NAN = float("nan")
POINTS, ODDS = "per doubling", "log-odds per doubling"


def divergence(
    rows: pd.DataFrame,
    conditions: Mapping[str, str],
    measure: str = "asr",
    objectives: Asked | None = None,
    *,
    drawn: Draws | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """Slopes over log2(budget), base left out, and whether they differ.

    `kind` is `joint` (the logistic GEE's Wald test of equal slopes, `stats.gee`), `joint-check` (the same question to
    the bootstrap's slopes of the rates), `slope` (one objective, change of the rate per doubling) or `pair` (objective
    − against; `p_holm` over the pairs). `estimate` of a joint line is the largest slope minus the smallest, in `unit`.
    An objective without a finite slope is left out of the joint tests and named: a small p is then still a divergence,
    a large one says nothing of it. NaN with a `note` where nothing can be said.
    """
    drawn = drawn or draws(rows, conditions, (measure,), resamples=resamples, seed=seed)
    found = trajectories(drawn, measure, objectives)
    slopes = [_Slope.of(t, drawn) for t in found]
    lines = [_joint(rows, conditions, measure, slopes), _check(slopes, measure)]
    lines += [s.line(measure) for s in slopes]
    pairs = [_pair(a, b, drawn, measure) for a, b in itertools.combinations(slopes, 2)]
    tested = [line for line in pairs if line["p"] == line["p"]]
    for line, p in zip(tested, holm(np.array([float(str(t["p"])) for t in tested])), strict=True):
        line["p_holm"] = round(float(p), 10)
    return pd.DataFrame(lines + pairs, columns=COLUMNS)


class _Slope:
    """An objective's least-squares slope of the rate on log2(budget), at the point and in every draw."""

    def __init__(self, trajectory: Trajectory, weights_B: Floats, drawn: Draws) -> None:
        columns = trajectory.columns_B
        self.trajectory, self.weights_B = trajectory, weights_B
        self.point = float(drawn.point_K[columns] @ weights_B)
        self.drawn_R = drawn.drawn_RK[:, columns] @ weights_B
        self.moved = drawn.moved(columns, weights_B)
        self.found = interval(self.drawn_R, trajectory.n_clusters, self.moved)
        self.n = int(drawn.cells.loc[columns, "n"].sum())
        self.why = trajectory.withheld or ("a single budget: no slope" if len(columns) < 2 else "")
        self.untested = self.why or (self.found.note if np.isnan(self.found.p) else "")

    @classmethod
    def of(cls, trajectory: Trajectory, drawn: Draws) -> _Slope:
        return cls(trajectory, slope_weights(np.log2(trajectory.budgets_B)), drawn)

    def line(self, measure: str) -> dict[str, object]:
        line = _blank("slope", "bootstrap", measure) | self.trajectory.key
        line |= {"n": self.n, "n_clusters": self.trajectory.n_clusters}
        if self.why:
            return line | {"note": self.why}
        line |= {"estimate": round(self.point, 10), "low": self.found.low, "high": self.found.high, "p": self.found.p}
        return line | {"note": notes(self.found.note, self.trajectory.note)}


def slope_weights(x_B: Floats) -> Floats:
    """The weights with which values make their least-squares slope on x; NaN where x does not vary."""
    centred = x_B - x_B.mean()
    size = float(centred @ centred)
    return centred / size if size > 0 else np.full(len(x_B), NAN)


def _pair(a: _Slope, b: _Slope, drawn: Draws, measure: str) -> dict[str, object]:
    one, other = a.trajectory, b.trajectory
    line = _blank("pair", "bootstrap", measure) | one.key
    line |= {"against": other.objective, "against_condition": other.condition, "n": a.n + b.n}
    clusters = min(one.n_clusters, other.n_clusters)
    line["n_clusters"] = clusters
    if why := notes(a.why and f"{one.label}: {a.why}", b.why and f"{other.label}: {b.why}"):
        return line | {"note": why}
    moved = drawn.moved([*one.columns_B, *other.columns_B], [*a.weights_B, *(-b.weights_B)])
    found = interval(a.drawn_R - b.drawn_R, clusters, moved)
    line |= {"estimate": round(a.point - b.point, 10), "low": found.low, "high": found.high, "p": found.p}
    return line | {"note": notes(found.note, one.note, other.note)}


def _check(slopes: list[_Slope], measure: str) -> dict[str, object]:
    """Equal slopes of the rates, by the draws' covariance; Hotelling's reading as in the GEE."""
    line = _blank("joint-check", "bootstrap", measure)
    usable = [s for s in slopes if not s.untested]
    left = [f"{s.trajectory.label} left out: {s.untested}" for s in slopes if s.untested]
    if len(usable) < 2:
        return line | {"note": notes("fewer than two objectives with a slope", *left)}
    clusters = min(s.trajectory.n_clusters for s in usable)
    point_J = np.array([s.point for s in usable])
    test = wald(point_J, np.cov(np.array([s.drawn_R for s in usable])), clusters)
    line |= {"estimate": round(float(np.ptp(point_J)), 10), "p": test.p, "p_holm": test.p}
    line |= {"statistic": test.statistic, "df": test.df, "df_resid": test.df_resid, "n_clusters": clusters}
    line["n"] = sum(s.n for s in usable)
    return line | {"note": notes(test.note, *left, *(s.trajectory.note for s in usable))}


def _joint(rows: pd.DataFrame, conditions: Mapping[str, str], measure: str, slopes: list[_Slope]) -> dict[str, object]:
    line = _blank("joint", "gee", measure) | {"unit": ODDS}
    table = observations(rows, conditions)
    how = next(m for m in measures(table) if m.name == measure)
    chosen = how.select(table).dropna(subset="value")
    parts: list[pd.DataFrame] = []
    left: list[str] = []
    weak: list[str] = []
    for slope in slopes:
        trajectory = slope.trajectory
        part, why = _of_trajectory(chosen, trajectory, slope.untested)
        if why:
            left.append(f"{trajectory.label} left out: {why}")
        else:
            parts.append(part.assign(trajectory=len(parts)))
            weak.append(trajectory.note)
    if len(parts) < 2:
        return line | {"note": notes("fewer than two objectives with a slope", *left)}
    every, silent = _without_silent(pd.concat(parts), how)
    fit = joint(every, len(parts))
    spread = NAN if np.isnan(fit.p) else round(float(np.ptp(fit.slopes_J)), 10)
    line |= {"estimate": spread, "statistic": fit.statistic}
    line |= {"p": fit.p, "p_holm": fit.p, "df": fit.df, "df_resid": fit.df_resid}
    line |= {"n": len(every), "n_clusters": fit.clusters}
    kept = "seeds are not an outer level here" if every["seed"].nunique() > 1 else ""
    fractional = "" if every["value"].isin((0.0, 1.0)).all() else "scores between 0 and 1: quasi-binomial"
    return line | {"note": notes(fit.note, *left, silent, fractional, kept, *weak)}


def _of_trajectory(chosen: pd.DataFrame, trajectory: Trajectory, why: str) -> tuple[pd.DataFrame, str]:
    own = chosen[(chosen["objective"] == trajectory.objective) & (chosen["condition"] == trajectory.condition)]
    x = np.log2(own["budget"].to_numpy(float))
    part = own[["cluster", "seed", "value"]].assign(x=x, attack=own["stratum"])
    return part, why or separated(own["value"].to_numpy(float), x)


def _without_silent(every: pd.DataFrame, measure: Measure) -> tuple[pd.DataFrame, str]:
    """Attacks that always fail or always work have no finite coefficient, and tell nothing of slopes."""
    if not measure.strata:
        return every, ""
    varies = every.groupby("attack")["value"].nunique() > 1
    silent = sorted(varies.index[~varies])
    said = f"no outcome varies under {', '.join(silent)}: not in the model" if silent else ""
    return every[every["attack"].map(varies)], said


def _blank(kind: str, method: str, measure: str) -> dict[str, object]:
    line: dict[str, object] = {"kind": kind, "method": method, "measure": measure, "unit": POINTS}
    line |= dict.fromkeys(("objective", "condition", "against", "against_condition"), "")
    line |= dict.fromkeys(("estimate", "low", "high", "p", "p_holm", "statistic"), NAN)
    return line | {"df": 0, "df_resid": 0, "n": 0, "n_clusters": 0, "note": ""}
