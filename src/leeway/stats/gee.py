"""Do the slopes of several trajectories differ? A logistic GEE, clustered by prompt, and its joint Wald test.

    logit P(y = 1) = α_o + β_o · log2(budget) + γ_attack,        H0: all β_o equal

Fitted by statsmodels' GEE (Liang & Zeger 1986, Biometrika 73:13) with independence as working correlation: its
estimates do not lean on a guess of how answers to one prompt hang together, and where every prompt is asked at every
checkpoint it loses next to nothing. The covariance is Mancl & DeRouen's (2001, Biometrics 57:126), which corrects the
sandwich for few clusters; the statistic W is read as Hotelling's, W (C − q) / (q (C − 1)) ~ F(q, C − q) for C prompts
and q contrasts. Scores between 0 and 1 have the same estimating equations (quasi-binomial; Papke & Wooldridge 1996,
J. Appl. Econometrics 11:619): nothing is cut at a half.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.linalg import LinAlgError
from scipy.stats import f as f_distribution

from leeway.stats.intervals import Floats, Ints

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
