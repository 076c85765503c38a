"""Random-effects meta-analysis of several studies whose errors may be correlated.

Study i has effect y_i with error covariance V, and true effects vary with variance τ². Studies with the same prompts
have correlated errors: V is then not diagonal, and a mean that assumes it is diagonal is overconfident.

    w_i = 1/(V_ii + τ²),  μ̂ = Σ w_i y_i / Σ w_i,  Var(μ̂) = w'(V + τ²I)w / (Σ w_i)²

τ² is where Q(τ²) = Σ w_i (y_i − μ̂)² equals its expectation tr(P(V + τ²I)), P = diag(w) − ww'/Σw, and 0 if Q is
already below it. With a diagonal V that expectation is K − 1 and this is Paule & Mandel (1982, J. Res. NBS 87:377), as
in statsmodels' `combine_effects` (tested; it assumes independent errors, and a negative DerSimonian–Laird τ² leaves it
without a mean). The interval is Hartung & Knapp's (2001, Stat. Med. 20:3875) with t on K − 1 degrees of freedom, never
narrowed by a small Q (Röver, Knapp & Friede 2015, BMC Med. Res. Methodol. 15:99).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy

from leeway.stats.intervals import LEVEL, NAN, Floats
from leeway.stats.metrics import StatsError

TINY = 1e-12


@dataclass(frozen=True)
class Combined:
    """A mean effect over studies with its 95% interval, and the heterogeneity of the studies."""

    studies: int
    estimate: float
    se: float
    low: float
    high: float
    p: float
    tau2: float
    i2: float  # Higgins & Thompson 2002: the share of Q that sampling error does not explain
    q: float
    p_q: float
    predict_low: float  # 95% prediction interval of a further study's true effect; NaN with fewer than three
    predict_high: float
    tau2_dl: float  # DerSimonian & Laird's, assuming independent errors: a check
    estimate_dl: float
    correlation: float  # mean correlation of the studies' errors


def combine(effects_K: Floats, covariance_KK: Floats) -> Combined:
    """Combine K effects, given the (K, K) covariance of their errors.

    Raises StatsError for fewer than two effects, and for a missing or zero error.
    """
    y, V = np.asarray(effects_K, dtype=float), np.asarray(covariance_KK, dtype=float)
    K, variance = len(y), np.diag(np.asarray(covariance_KK, dtype=float))
    if K < 2:
        raise StatsError("a meta-analysis needs two or more studies")
    if not (np.isfinite(y).all() and np.isfinite(V).all() and (variance > 0).all()):
        raise StatsError("every effect needs a positive standard error")
    tau2 = _tau2(y, V)
    w = 1 / (variance + tau2)
    mean = float(w @ y / w.sum())
    q, expected = _q(y, V, tau2)
    inflate = max(1.0, q / expected) if expected > TINY else 1.0
    se = math.sqrt(float(w @ (V + tau2 * np.eye(K)) @ w) * inflate) / float(w.sum())
    half = float(scipy.stats.t.ppf(0.5 + LEVEL / 2, K - 1)) * se
    reach = float(scipy.stats.t.ppf(0.5 + LEVEL / 2, K - 2)) * math.sqrt(tau2 + se**2) if K > 2 else NAN
    q0, expected0 = _q(y, V, 0.0)
    scaled = q0 * (K - 1) / expected0 if expected0 > TINY else NAN
    w = 1 / variance  # DerSimonian & Laird (1986, Control. Clin. Trials 7:177)
    excess = float(w @ (y - w @ y / w.sum()) ** 2) - (K - 1)
    tau2_dl = max(0.0, excess / float(w.sum() - w @ w / w.sum()))
    w_dl = 1 / (variance + tau2_dl)
    share = V / np.sqrt(np.outer(variance, variance))
    return Combined(
        studies=K,
        estimate=mean,
        se=se,
        low=mean - half,
        high=mean + half,
        p=float(2 * scipy.stats.t.sf(abs(mean) / se, K - 1)),
        tau2=tau2,
        i2=max(0.0, 1 - (K - 1) / scaled) if scaled > 0 else 0.0,
        q=scaled,
        p_q=float(scipy.stats.chi2.sf(scaled, K - 1)),
        predict_low=mean - reach,
        predict_high=mean + reach,
        tau2_dl=tau2_dl,
        estimate_dl=float(w_dl @ y / w_dl.sum()),
        correlation=float((share.sum() - K) / (K * (K - 1))),
    )


def _q(y: Floats, V: Floats, tau2: float) -> tuple[float, float]:
    """Return Q at τ², and its expectation if that τ² is true."""
    w = 1 / (np.diag(V) + tau2)
    mean = w @ y / w.sum()
    P = np.diag(w) - np.outer(w, w) / w.sum()
    return float(w @ (y - mean) ** 2), float(np.sum(P * (V + tau2 * np.eye(len(y)))))


def _tau2(y: Floats, V: Floats) -> float:
    def excess(tau2: float) -> float:
        q, expected = _q(y, V, tau2)
        return q - expected

    if excess(0.0) <= TINY:
        return 0.0
    upper = float(np.var(y, ddof=1) + np.diag(V).max())
    while excess(upper) > 0:
        upper *= 2
    return float(scipy.optimize.brentq(excess, 0.0, upper, xtol=1e-14))
