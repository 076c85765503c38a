"""Do objectives diverge with scale? The interaction objective × log2(budget), jointly and by pair.

The joint test is a Wald test of equal slopes in a logistic GEE, clustered by prompt:

    logit P(y = 1) = α_o + β_o · log2(budget) + γ_attack,        H0: all β_o equal

Fitted by statsmodels' GEE (Liang & Zeger 1986, Biometrika 73:13) with an independence working correlation: its
estimates do not depend on an assumed correlation of responses to one prompt, and with every prompt at every checkpoint
it loses almost no efficiency. The covariance is Mancl & DeRouen's (2001, Biometrics 57:126), which corrects the
sandwich for few clusters; the statistic W is treated as Hotelling's T², W (C − q) / (q (C − 1)) ~ F(q, C − q) for C
prompts and q contrasts. Scores between 0 and 1 have the same estimating equations (quasi-binomial; Papke & Wooldridge
1996, J. Appl. Econometrics 11:619): they are not dichotomised.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy
from numpy.linalg import LinAlgError

from leeway.stats.bootstrap import Draws, ObjectiveChoice, Trajectory, draws, interval, join_notes, trajectories
from leeway.stats.contrasts import add_holm
from leeway.stats.intervals import NAN, RESAMPLES, Floats, Ints
from leeway.stats.metrics import analysis_table, measures

COLUMNS = ["kind", "method", "measure", "objective", "condition", "against", "against_condition", "estimate"]
COLUMNS += ["low", "high", "p", "p_holm", "statistic", "df", "df_resid", "unit", "n", "n_clusters", "note"]
PER_DOUBLING, LOG_ODDS = "per doubling", "log-odds per doubling"
TOO_FEW = "fewer than two objectives with a slope"
SINGULAR = 1e-9  # a variance is 0 if it is this small relative to the largest one
ZERO = 1e-12  # or this small in absolute terms: rounding and the tolerance of a fit
DIVERGED = 12.0  # log-odds per doubling, or of an intercept: beyond it the fit is diverging


def divergence(
    rows: pd.DataFrame,
    conditions: Mapping[str, str],
    measure: str = "asr",
    objectives: ObjectiveChoice | None = None,
    *,
    drawn: Draws | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """Return slopes over log2(budget), without the base, and tests of whether they differ.

    `kind` is `joint` (the logistic GEE's Wald test of equal slopes), `joint-check` (the same test on the bootstrap's
    slopes of the rates), `slope` (one objective: change of the rate per doubling) or `pair` (objective − against;
    `p_holm` over the pairs). `estimate` of a joint line is the largest slope minus the smallest, in `unit`. Objectives
    without a finite slope are left out of the joint tests and named in `note`: a small p is then still evidence of a
    divergence, a large one is no evidence about them. NaN with a `note` if withheld.
    """
    drawn = drawn or draws(rows, conditions, (measure,), resamples=resamples, seed=seed)
    slopes = [Slope(t, drawn) for t in trajectories(drawn, measure, objectives)]
    lines = [_joint_gee_line(rows, conditions, measure, slopes), joint_bootstrap_line(slopes, measure)]
    lines += [s.line(measure) for s in slopes]
    pairs = [pair_line(a, b, drawn, measure) for a, b in itertools.combinations(slopes, 2)]
    add_holm(pairs)
    return pd.DataFrame(lines + pairs, columns=COLUMNS)


class Slope:
    """An objective's least-squares slope of the rate on log2(budget), at the point and in every draw."""

    def __init__(self, trajectory: Trajectory, drawn: Draws) -> None:
        columns, weights_B = trajectory.columns_B, slope_weights(np.log2(trajectory.budgets_B))
        self.trajectory, self.weights_B = trajectory, weights_B
        self.point = float(drawn.point_K[columns] @ weights_B)
        self.drawn_R = drawn.drawn_RK[:, columns] @ weights_B
        self.interval = interval(self.drawn_R, trajectory.n_clusters, drawn.n_discordant(columns, weights_B))
        self.n = int(drawn.cells.loc[columns, "n"].sum())
        self.withheld = trajectory.withheld or ("a single budget: no slope" if len(columns) < 2 else "")
        self.untested = self.withheld or (self.interval.note if np.isnan(self.interval.p) else "")

    def line(self, measure: str) -> dict[str, object]:
        line = _blank("slope", "bootstrap", measure) | self.trajectory.key
        line |= {"n": self.n, "n_clusters": self.trajectory.n_clusters}
        if self.withheld:
            return line | {"note": self.withheld}
        found = self.interval
        line["estimate"] = round(self.point, 10)
        return line | vars(found) | {"note": join_notes(found.note, self.trajectory.note)}


def slope_weights(x_B: Floats) -> Floats:
    """Return the weights of the least-squares slope on x as a sum over values; NaN for a constant x."""
    centred = x_B - x_B.mean()
    size = float(centred @ centred)
    return centred / size if size > 0 else np.full(len(x_B), NAN)


def pair_line(a: Slope, b: Slope, drawn: Draws, measure: str) -> dict[str, object]:
    """Return the line of the difference of two slopes."""
    one, other = a.trajectory, b.trajectory
    clusters = min(one.n_clusters, other.n_clusters)
    line = _blank("pair", "bootstrap", measure) | one.key
    line |= {"against": other.objective, "against_condition": other.condition}
    line |= {"n": a.n + b.n, "n_clusters": clusters}
    reasons = (f"{s.trajectory.label}: {s.withheld}" for s in (a, b) if s.withheld)
    if withheld := join_notes(*reasons):
        return line | {"note": withheld}
    discordant = drawn.n_discordant([*one.columns_B, *other.columns_B], [*a.weights_B, *(-b.weights_B)])
    found = interval(a.drawn_R - b.drawn_R, clusters, discordant)
    line["estimate"] = round(a.point - b.point, 10)
    return line | vars(found) | {"note": join_notes(found.note, one.note, other.note)}


def joint_bootstrap_line(slopes: list[Slope], measure: str) -> dict[str, object]:
    """Return the test of equal slopes of the rates by the draws' covariance, as Hotelling's T² like the GEE's."""
    line = _blank("joint-check", "bootstrap", measure)
    usable = [s for s in slopes if not s.untested]
    left_out = [f"{s.trajectory.label} left out: {s.untested}" for s in slopes if s.untested]
    if len(usable) < 2:
        return line | {"note": join_notes(TOO_FEW, *left_out)}
    clusters = min(s.trajectory.n_clusters for s in usable)
    point_J = np.array([s.point for s in usable])
    test = wald_test(point_J, np.cov(np.array([s.drawn_R for s in usable])), clusters)
    line |= {"estimate": round(float(np.ptp(point_J)), 10), "p": test.p, "p_holm": test.p}
    line |= {"statistic": test.statistic, "df": test.df, "df_resid": test.df_resid, "n_clusters": clusters}
    line["n"] = sum(s.n for s in usable)
    return line | {"note": join_notes(test.note, *left_out, *(s.trajectory.note for s in usable))}


def _joint_gee_line(
    rows: pd.DataFrame, conditions: Mapping[str, str], measure: str, slopes: list[Slope]
) -> dict[str, object]:
    line = _blank("joint", "gee", measure) | {"unit": LOG_ODDS}
    table = analysis_table(rows, conditions)
    definition = next(m for m in measures(table) if m.name == measure)
    chosen = definition.select(table).dropna(subset="value")
    parts, left_out, limitations = list[pd.DataFrame](), list[str](), list[str]()
    for slope in slopes:
        trajectory = slope.trajectory
        part = chosen[(chosen["objective"] == trajectory.objective) & (chosen["condition"] == trajectory.condition)]
        part = part.assign(x=np.log2(part["budget"].to_numpy(float)), attack=part["stratum"])
        reason = slope.untested or separation(part["value"].to_numpy(float), part["x"].to_numpy(float))
        if reason:
            left_out.append(f"{trajectory.label} left out: {reason}")
        else:
            parts.append(part.assign(trajectory=len(parts)))
            limitations.append(trajectory.note)
    if len(parts) < 2:
        return line | {"note": join_notes(TOO_FEW, *left_out)}
    every, constant = pd.concat(parts), ""
    if definition.strata:  # a constant outcome has no finite coefficient, and no information about slopes
        varies = every.groupby("attack")["value"].nunique() > 1
        flat = sorted(varies.index[~varies])
        every = every[every["attack"].map(varies)]
        constant = f"no outcome varies under {', '.join(flat)}: not in the model" if flat else ""
    fit = gee_test(every, len(parts))
    spread = NAN if np.isnan(fit.p) else round(float(np.ptp(fit.slopes_J)), 10)
    line |= {"estimate": spread, "statistic": fit.statistic, "p": fit.p, "p_holm": fit.p}
    line |= {"df": fit.df, "df_resid": fit.df_resid, "n": len(every), "n_clusters": fit.clusters}
    pooled = "training seeds are pooled, without an outer level" if every["seed"].nunique() > 1 else ""
    fractional = "" if every["value"].isin((0.0, 1.0)).all() else "scores between 0 and 1: quasi-binomial"
    return line | {"note": join_notes(fit.note, *left_out, constant, fractional, pooled, *limitations)}


def _blank(kind: str, method: str, measure: str) -> dict[str, object]:
    line: dict[str, object] = {"kind": kind, "method": method, "measure": measure, "unit": PER_DOUBLING}
    line |= dict.fromkeys(("objective", "condition", "against", "against_condition"), "")
    return line | {"df": 0, "df_resid": 0, "n": 0, "n_clusters": 0, "note": ""}


@dataclass(frozen=True)
class WaldTest:
    """A joint test of equal slopes; NaN with a note if there is none."""

    statistic: float
    df: int
    df_resid: int
    p: float
    note: str


@dataclass(frozen=True)
class GEETest(WaldTest):
    """The test with the fitted slopes per doubling of budget in log-odds; NaN without a fit."""

    slopes_J: Floats
    slope_se_J: Floats
    clusters: int


def separation(outcome: Floats, x: Floats) -> str:
    """Return why a logistic slope of `outcome` on `x` is not finite ("" if it is)."""
    if len(np.unique(outcome)) < 2:
        return f"every outcome is {outcome[0]:g}" if len(outcome) else "nothing scored"
    below, above = x[outcome < 1], x[outcome > 0]
    if not len(below) or not len(above) or above.min() >= below.max() or above.max() <= below.min():
        return "one budget separates the outcomes: the logistic slope is infinite"
    return ""


def gee_test(table: pd.DataFrame, trajectories: int) -> GEETest:
    """Test equal slopes. `table`: `trajectory` 0 … J − 1, `x` (log2 budget), `attack`, `cluster`, `value` in [0, 1]."""
    cells = _aggregate(table)
    clusters = int(cells["cluster"].nunique())
    df, attacks = trajectories - 1, sorted(cells["attack"].unique())
    parameters = 2 * trajectories + len(attacks) - 1

    def unfitted(note: str) -> GEETest:
        nothing = np.full(trajectories, NAN)
        return GEETest(NAN, df, max(clusters - df, 0), NAN, note, nothing, nothing, clusters)

    if clusters <= parameters + 1:
        return unfitted(f"{clusters} prompts for {parameters} coefficients: too few to test")
    intercept = (cells["trajectory"].to_numpy()[:, None] == np.arange(trajectories)).astype(float)
    x = cells["x"].to_numpy(float)
    attack = (cells["attack"].to_numpy(object)[:, None] == np.array(attacks[1:], dtype=object)).astype(float)
    design = np.hstack([intercept, intercept * (x - x.mean())[:, None], attack.reshape(len(cells), -1)])
    try:
        beta, covariance = _fit(cells, design)
    except (LinAlgError, ValueError, FloatingPointError, Warning) as error:
        return unfitted(f"the GEE did not fit: {str(error).splitlines()[0][:80]}")
    own = slice(trajectories, 2 * trajectories)
    if not np.isfinite(covariance).all() or (np.abs(beta) > DIVERGED).any():
        return unfitted("the GEE diverged: outcomes are nearly separated")
    test = wald_test(beta[own], covariance[own, own], clusters)
    se_J = np.sqrt(np.diag(covariance[own, own]))
    return GEETest(**vars(test), slopes_J=beta[own], slope_se_J=se_J, clusters=clusters)


def wald_test(slopes_J: Floats, covariance_JJ: Floats, clusters: int) -> WaldTest:
    """Test that all slopes are equal: W = (Lβ)'(LVL')⁻¹(Lβ), treated as Hotelling's T² on C clusters.

    If some objectives have identical responses, LVL' has a lower rank: the test is of the contrasts that vary, with as
    many degrees of freedom.
    """
    contrast = np.eye(len(slopes_J)) - 1 / len(slopes_J)
    values, vectors = np.linalg.eigh(contrast @ covariance_JJ @ contrast)
    varies = values > max(SINGULAR * values.max(), ZERO)
    q, rotated = int(varies.sum()), vectors.T @ contrast @ slopes_J
    if q < 1 or clusters - q < 1 or (np.abs(rotated[~varies]) > np.sqrt(ZERO)).any():
        return WaldTest(NAN, q, max(clusters - q, 0), NAN, "the covariance of the slopes is singular")
    statistic = float((rotated[varies] ** 2 / values[varies]).sum())
    p = float(scipy.stats.f.sf(statistic * (clusters - q) / (q * (clusters - 1)), q, clusters - q))
    full = len(slopes_J) - 1
    note = "" if q == full else f"some objectives have identical responses: {q} contrasts instead of {full}"
    return WaldTest(round(statistic, 10), q, clusters - q, float(f"{p:.10g}"), note)


def _aggregate(table: pd.DataFrame) -> pd.DataFrame:
    """Return the mean and number of samples and seeds of each prompt under each attack at each checkpoint."""
    keys = ["cluster", "trajectory", "x", "attack"]
    return table.groupby(keys, sort=True)["value"].agg(["mean", "size"]).reset_index()


def _fit(cells: pd.DataFrame, design: Floats) -> tuple[Floats, Floats]:
    """Return coefficients and their covariance; any warning of the fit is an error."""
    from statsmodels.genmod.cov_struct import Independence
    from statsmodels.genmod.families import Binomial
    from statsmodels.genmod.generalized_estimating_equations import GEE

    mean_N, size_N = cells["mean"].to_numpy(float), cells["size"].to_numpy(float)
    cluster_N = cells["cluster"].to_numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        family, independent = Binomial(), Independence()
        model = GEE(mean_N, design, groups=cluster_N, family=family, cov_struct=independent, weights=size_N)
        fitted = model.fit(maxiter=100)
        if not fitted.converged:
            raise ValueError("no convergence in 100 iterations")
    beta = np.asarray(fitted.params, dtype=float)
    return beta, mancl_derouen(design, mean_N, size_N, cluster_N, beta)


def mancl_derouen(design_NP: Floats, mean_N: Floats, size_N: Floats, cluster_N: Ints, beta_P: Floats) -> Floats:
    """Return the bias-reduced covariance: B Σ_c g_c g_c' B with g_c = X'(I − H_c)⁻¹ r, H_c = W X B X'.

    Computed as g_c = (I − X'WXB)⁻¹ X'r, which is equal and has as many dimensions as there are coefficients:
    statsmodels' version solves a system as large as the prompt's responses, and fails on weights.
    """
    fitted_N = 1 / (1 + np.exp(-(design_NP @ beta_P)))
    variance_N = size_N * fitted_N * (1 - fitted_N)
    bread = np.linalg.inv(design_NP.T @ (variance_N[:, None] * design_NP))
    meat, eye = np.zeros_like(bread), np.eye(len(bread))
    for c in np.unique(cluster_N):
        own = cluster_N == c
        x = design_NP[own]
        information = x.T @ (variance_N[own, None] * x)
        score = np.linalg.solve(eye - information @ bread, x.T @ (size_N[own] * (mean_N[own] - fitted_N[own])))
        meat += np.outer(score, score)
    return np.asarray(bread @ meat @ bread)
