"""One effect from several studies: a random-effects mean whose errors may be correlated.

Study i saw y_i with error covariance V, and true effects scatter with variance τ². Studies that asked the same prompts
have correlated errors: V is then not diagonal, and a mean that takes it for diagonal believes in more than was seen.

    w_i = 1/(V_ii + τ²),  μ̂ = Σ w_i y_i / Σ w_i,  Var(μ̂) = w'(V + τ²I)w / (Σ w_i)²

τ² is where Q(τ²) = Σ w_i (y_i − μ̂)² equals its expectation tr(P(V + τ²I)), P = diag(w) − ww'/Σw, and 0 where Q is
below it already. With a diagonal V that expectation is K − 1 and this is Paule & Mandel (1982, J. Res. NBS 87:377), as
statsmodels' `combine_effects` has it (the tests hold ours to it; it takes errors for independent and leaves DerSimonian
& Laird's τ² negative, so that its mean is then none). The interval is Hartung & Knapp's (2001, Stat. Med. 20:3875) with
t on K − 1 degrees of freedom, never narrowed by a small Q (Röver, Knapp & Friede 2015, BMC Med. Res. Methodol. 15:99).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.stats import chi2, t

from leeway.stats.intervals import LEVEL, Floats
from leeway.stats.metrics import StatsError

TINY = 1e-12


@dataclass(frozen=True)
class Combined:
    """A mean effect over studies with its 95% interval, and how far the studies differ."""

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
    predict_low: float  # where a further study's true effect may lie; NaN with fewer than three
    predict_high: float
    tau2_dl: float  # DerSimonian & Laird's, errors taken for independent: a check
    estimate_dl: float
    correlation: float  # mean correlation of the studies' errors


def combine(effects_K: Floats, covariance_KK: Floats) -> Combined:
    """Combine K effects given the covariance of their errors; raises StatsError for fewer than two, or no error."""
    y, V = np.asarray(effects_K, dtype=float), np.asarray(covariance_KK, dtype=float)
    K, variance = len(y), np.diag(np.asarray(covariance_KK, dtype=float))
    if K < 2:
        raise StatsError("one study is no meta-analysis: give two or more")
    if not (np.isfinite(y).all() and np.isfinite(V).all() and (variance > 0).all()):
        raise StatsError("an effect without a standard error has no weight in a mean over studies")
    tau2 = _tau2(y, V)
    w = 1 / (variance + tau2)
    mean = float(w @ y / w.sum())
    q, expected = _q(y, V, tau2)
    inflate = max(1.0, q / expected) if expected > TINY else 1.0
    se = math.sqrt(float(w @ (V + tau2 * np.eye(K)) @ w) * inflate) / float(w.sum())
    half = float(t.ppf(0.5 + LEVEL / 2, K - 1)) * se
    low_new, high_new = float("nan"), float("nan")
    if K > 2:
        reach = float(t.ppf(0.5 + LEVEL / 2, K - 2)) * math.sqrt(tau2 + se**2)
        low_new, high_new = mean - reach, mean + reach
    q0, expected0 = _q(y, V, 0.0)
    scaled = q0 * (K - 1) / expected0 if expected0 > TINY else float("nan")
    tau2_dl = max(0.0, float(_moments(y, variance)))
    w_dl = 1 / (variance + tau2_dl)
    share = V / np.sqrt(np.outer(variance, variance))
    return Combined(
        studies=K,
        estimate=mean,
        se=se,
        low=mean - half,
        high=mean + half,
        p=float(2 * t.sf(abs(mean) / se, K - 1)),
        tau2=tau2,
        i2=max(0.0, 1 - (K - 1) / scaled) if scaled > 0 else 0.0,
        q=scaled,
        p_q=float(chi2.sf(scaled, K - 1)),
        predict_low=low_new,
        predict_high=high_new,
        tau2_dl=tau2_dl,
        estimate_dl=float(w_dl @ y / w_dl.sum()),
        correlation=float((share.sum() - K) / (K * (K - 1))),
    )


def _q(y: Floats, V: Floats, tau2: float) -> tuple[float, float]:
    """Q at one τ², and what it is expected to be if that τ² is the true one."""
    w = 1 / (np.diag(V) + tau2)
    mean = w @ y / w.sum()
    P = np.diag(w) - np.outer(w, w) / w.sum()
    return float(w @ (y - mean) ** 2), float(np.sum(P * (V + tau2 * np.eye(len(y)))))


def _moments(y: Floats, variance: Floats) -> float:
    """DerSimonian & Laird (1986, Control. Clin. Trials 7:177), not yet cut at 0."""
    w = 1 / variance
    q = float(w @ (y - w @ y / w.sum()) ** 2)
    return (q - (len(y) - 1)) / float(w.sum() - w @ w / w.sum())


def _tau2(y: Floats, V: Floats) -> float:
    def excess(tau2: float) -> float:
        q, expected = _q(y, V, tau2)
        return q - expected

    if excess(0.0) <= TINY:
        return 0.0
    upper = float(np.var(y, ddof=1) + np.diag(V).max())
    while excess(upper) > 0:
        upper *= 2
    return float(brentq(excess, 0.0, upper, xtol=1e-14))
