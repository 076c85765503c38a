"""Do objectives diverge with scale? The interaction objective × log2(budget), jointly and by pair.

Do the slopes of several trajectories differ? A logistic GEE, clustered by prompt, and its joint Wald test.

    logit P(y = 1) = α_o + β_o · log2(budget) + γ_attack,        H0: all β_o equal

Fitted by statsmodels' GEE (Liang & Zeger 1986, Biometrika 73:13) with independence as working correlation: its
estimates do not lean on a guess of how answers to one prompt hang together, and where every prompt is asked at every
checkpoint it loses next to nothing. The covariance is Mancl & DeRouen's (2001, Biometrics 57:126), which corrects the
sandwich for few clusters; the statistic W is read as Hotelling's, W (C − q) / (q (C − 1)) ~ F(q, C − q) for C prompts
and q contrasts. Scores between 0 and 1 have the same estimating equations (quasi-binomial; Papke & Wooldridge 1996,
J. Appl. Econometrics 11:619): nothing is cut at a half.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.linalg import LinAlgError
from scipy.stats import f as f_distribution

from leeway.stats.bootstrap import Asked, Draws, Trajectory, draws, interval, notes, trajectories
from leeway.stats.contrasts import holm
from leeway.stats.intervals import RESAMPLES, Floats, Ints
from leeway.stats.metrics import Measure, measures, observations

NAN = float("nan")
SINGULAR = 1e-9  # a variance this small beside the largest one is none
NOTHING = 1e-12  # and so is this one by itself: what rounding and the tolerance of a fit leave
HUGE = 12.0  # log-odds per doubling, or of an intercept: beyond it the fit is running away


@dataclass(frozen=True)
class Joint:
    """W, its F p-value, and the slopes per doubling of budget in log-odds; NaN with a note where there is no fit."""

    statistic: float
    df: int
    df_resid: int
    p: float
    slopes_J: Floats
    slope_se_J: Floats
    clusters: int
    note: str = ""


def separated(outcome: Floats, x: Floats) -> str:
    """Why a logistic slope of `outcome` on `x` is not finite ('' if it is)."""
    if len(np.unique(outcome)) < 2:
        return f"every outcome is {outcome[0]:g}" if len(outcome) else "nothing scored"
    below, above = x[outcome < 1], x[outcome > 0]
    if not len(below) or not len(above) or above.min() >= below.max() or above.max() <= below.min():
        return "one budget parts the outcomes: the logistic slope is infinite"
    return ""


def joint(table: pd.DataFrame, trajectories: int) -> Joint:
    """Test equal slopes. `table`: `trajectory` 0 … J − 1, `x` (log2 budget), `attack`, `cluster`, `value` in [0, 1]."""
    cells = aggregated(table)
    clusters = int(cells["cluster"].nunique())
    df, attacks = trajectories - 1, sorted(cells["attack"].unique())
    parameters = 2 * trajectories + len(attacks) - 1
    if clusters <= parameters + 1:
        return _none(df, trajectories, clusters, f"{clusters} prompts for {parameters} coefficients: too few to test")
    design = _design(cells, trajectories, attacks)
    try:
        beta, covariance = _fit(cells, design)
    except (LinAlgError, ValueError, FloatingPointError, Warning) as error:
        return _none(df, trajectories, clusters, f"the GEE did not fit: {str(error).splitlines()[0][:80]}")
    slopes = beta[trajectories : 2 * trajectories]
    of_slopes = covariance[trajectories : 2 * trajectories, trajectories : 2 * trajectories]
    if not np.isfinite(covariance).all() or (np.abs(beta) > HUGE).any():
        return _none(df, trajectories, clusters, "the GEE ran away: outcomes are close to separated")
    test = wald(slopes, of_slopes, clusters)
    spread = np.sqrt(np.diag(of_slopes))
    return Joint(test.statistic, test.df, test.df_resid, test.p, slopes, spread, clusters, test.note)


@dataclass(frozen=True)
class Wald:
    """A joint test of equal slopes; NaN with a note where there is none."""

    statistic: float
    df: int
    df_resid: int
    p: float
    note: str


def wald(slopes_J: Floats, covariance_JJ: Floats, clusters: int) -> Wald:
    """Are all slopes equal? W = (Lβ)'(LVL')⁻¹(Lβ), read as Hotelling's T² on `clusters` prompts.

    Where some objectives' answers are the same throughout, LVL' has a lower rank: the test is of what does vary, with
    as many degrees of freedom.
    """
    contrast = np.eye(len(slopes_J)) - 1 / len(slopes_J)
    values, vectors = np.linalg.eigh(contrast @ covariance_JJ @ contrast)
    kept = values > max(SINGULAR * values.max(), NOTHING)
    q, moves = int(kept.sum()), vectors.T @ contrast @ slopes_J
    if q < 1 or clusters - q < 1 or (np.abs(moves[~kept]) > np.sqrt(NOTHING)).any():
        return Wald(NAN, q, max(clusters - q, 0), NAN, "the covariance of the slopes is singular")
    statistic = float((moves[kept] ** 2 / values[kept]).sum())
    p = float(f_distribution.sf(statistic * (clusters - q) / (q * (clusters - 1)), q, clusters - q))
    note = "" if q == len(slopes_J) - 1 else f"some objectives answered alike: {q} contrasts, not {len(slopes_J) - 1}"
    return Wald(round(statistic, 10), q, clusters - q, float(f"{p:.10g}"), note)


def aggregated(table: pd.DataFrame) -> pd.DataFrame:
    """Samples and seeds of one prompt under one attack at one checkpoint as their mean, with their number."""
    keys = ["cluster", "trajectory", "x", "attack"]
    return table.groupby(keys, sort=True)["value"].agg(["mean", "size"]).reset_index()


def _design(cells: pd.DataFrame, trajectories: int, attacks: list[str]) -> Floats:
    own = (cells["trajectory"].to_numpy()[:, None] == np.arange(trajectories)).astype(float)
    x = cells["x"].to_numpy(float)
    under = (cells["attack"].to_numpy(object)[:, None] == np.array(attacks[1:], dtype=object)).astype(float)
    return np.hstack([own, own * (x - x.mean())[:, None], under.reshape(len(cells), -1)])


def _fit(cells: pd.DataFrame, design: Floats) -> tuple[Floats, Floats]:
    """Coefficients and their covariance; any warning of the fit is an error."""
    from statsmodels.genmod.cov_struct import Independence
    from statsmodels.genmod.families import Binomial
    from statsmodels.genmod.generalized_estimating_equations import GEE

    size_N, cluster_N = cells["size"].to_numpy(float), cells["cluster"].to_numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = GEE(
            cells["mean"].to_numpy(float),
            design,
            groups=cluster_N,
            family=Binomial(),
            cov_struct=Independence(),
            weights=size_N,
        )
        fitted = model.fit(maxiter=100)
        if not fitted.converged:
            raise ValueError("no convergence in 100 iterations")
    beta = np.asarray(fitted.params, dtype=float)
    return beta, bias_reduced(design, cells["mean"].to_numpy(float), size_N, cluster_N, beta)


def bias_reduced(design_NP: Floats, mean_N: Floats, size_N: Floats, cluster_N: Ints, beta_P: Floats) -> Floats:
    """Mancl & DeRouen's covariance under independence: B Σ_c g_c g_c' B with g_c = X'(I − H_c)⁻¹ r, H_c = W X B X'.

    Taken as g_c = (I − X'WXB)⁻¹ X'r, the same thing in as many dimensions as there are coefficients: statsmodels' own
    solves a system as large as the prompt's answers, and fails on weights.
    """
    fitted_N = 1 / (1 + np.exp(-(design_NP @ beta_P)))
    variance_N = size_N * fitted_N * (1 - fitted_N)
    bread = np.linalg.inv(design_NP.T @ (variance_N[:, None] * design_NP))
    meat, eye = np.zeros_like(bread), np.eye(len(bread))
    for c in np.unique(cluster_N):
        own = cluster_N == c
        x = design_NP[own]
        information = x.T @ (variance_N[own, None] * x)
        pull = np.linalg.solve(eye - information @ bread, x.T @ (size_N[own] * (mean_N[own] - fitted_N[own])))
        meat += np.outer(pull, pull)
    return np.asarray(bread @ meat @ bread)


def _none(df: int, trajectories: int, clusters: int, note: str) -> Joint:
    nothing = np.full(trajectories, NAN)
    return Joint(NAN, df, max(clusters - df, 0), NAN, nothing, nothing, clusters, note)


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
