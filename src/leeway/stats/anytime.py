"""Anytime-valid tests and intervals for the mean of bounded values, and the design that needs them.

Bet on values y_1, y_2, … in [0, 1] in sequence. With a fraction c of the capital against "the mean is at most m",

    K_t(m) = Π_{i ≤ t} (1 + λ (y_i − m)),  λ = c / m

is a nonnegative supermartingale under that hypothesis, so by Ville's inequality it ever reaches 1/α with probability at
most α (Waudby-Smith & Ramdas 2024, JRSS-B 86:1, arXiv 2010.09686, section 4: the capital process). The best bet is
unknown in advance. Here the capital is split over the fixed fractions c = 1/21 … 20/21, their "diversified" Kelly bets:
the mean of the 20 capitals is a supermartingale too and depends on no level and no schedule. Every factor
1 − c + c y/m decreases in m, so the means that are not rejected form an interval, and a one-sided p inverts exactly the
one-sided bound. The values need bounds and one mean: no normal approximation, no variance. Two-sided statements use
half the level on each side, as the hedged capital there (theorem 3) does.

The sequential design takes the prompts of an axis in one fixed random order, derived from their names alone. A
checkpoint answers a prefix of it, and whether the prefix is extended depends on its results: estimates for a fixed
number of prompts are therefore invalid, and these are used instead. Rows of such an axis have `SEQUENTIAL` in the
column `design`.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from leeway.hashing import digest
from leeway.stats.intervals import LEVEL, Floats, Ints

BET_FRACTIONS = np.arange(1, 21) / 21
BISECTIONS = 34  # of an interval of length 1
DESIGN, SEQUENTIAL, FIXED = "design", "sequential", "fixed"


@dataclass(frozen=True)
class Anytime:
    """Tests and bounds for the mean of values in [−1, 1], valid at every stopping time.

    The order must not depend on the values, and whether to take one more only on those before it.
    """

    values_T: Floats

    def p_above(self, bound: float) -> float:
        """Return the p-value of H0: mean ≤ bound; 1 without values."""
        return float(np.exp(-_final_log_capital(self._y_T, (bound + 1) / 2)))

    def p_below(self, bound: float) -> float:
        """Return the p-value of H0: mean ≥ bound."""
        return float(np.exp(-_final_log_capital(1 - self._y_T, 1 - (bound + 1) / 2)))

    @cached_property
    def p(self) -> float:
        """Two-sided p-value of H0: mean = 0."""
        return min(1.0, 2 * min(self.p_above(0.0), self.p_below(0.0)))

    def low(self, alpha: float) -> float:
        """Return the lower one-sided 1 − alpha bound, valid at all times; `p_above` rejects the bounds below it."""
        return 2 * _lower_bound(self._y_T, alpha) - 1

    def high(self, alpha: float) -> float:
        """Return the upper one-sided 1 − alpha bound."""
        return 1 - 2 * _lower_bound(1 - self._y_T, alpha)

    def interval(self) -> tuple[float, float]:
        """Return the two-sided 95% interval, in order even if it excludes every mean."""
        low, high = sorted((self.low((1 - LEVEL) / 2), self.high((1 - LEVEL) / 2)))
        return low, high

    def decision(self, alpha: float, margin: float) -> str:
        """Return `different` (from 0), `equivalent` (within ±margin) or "" by the two-sided interval of level alpha.

        The probability of a wrong decision at any time is at most alpha: both come from one sequence of intervals.
        """
        if min(self.p_above(0.0), self.p_below(0.0)) <= alpha / 2:
            return "different"
        if max(self.p_above(-margin), self.p_below(margin)) <= alpha / 2:
            return "equivalent"
        return ""

    @cached_property
    def _y_T(self) -> Floats:
        return np.clip((np.asarray(self.values_T, dtype=np.float64) + 1) / 2, 0.0, 1.0)


def rate_test(values: Floats, strata: Ints, positions: Ints) -> Anytime:
    """Return the test of a mean of scores in [0, 1], rescaled to [−1, 1]."""
    return Anytime(2 * cluster_means(values, strata, positions) - 1)


def cluster_means(values: Floats, strata: Ints, positions: Ints) -> Floats:
    """Return each prompt's mean over its own strata, (T,), in the order of `positions`.

    Every prompt has the same weight, whatever the others contain.
    """
    _, where = np.unique(positions, return_inverse=True)
    size = int(strata.max(initial=0)) + 1
    cell, shape = where * size + strata, (int(where.max(initial=-1)) + 1, size)
    count_TS = np.bincount(cell, minlength=shape[0] * size).reshape(shape)
    sum_TS = np.bincount(cell, weights=values, minlength=shape[0] * size).reshape(shape)
    mean_TS = np.divide(sum_TS, count_TS, out=np.zeros(shape), where=count_TS > 0)
    return np.asarray(mean_TS.sum(axis=1) / (count_TS > 0).sum(axis=1), dtype=np.float64)


def log_capital(y_T: Floats, m: float) -> Floats:
    """Return the log of the largest capital so far against "the mean of y is m or less", after each value, (T,).

    Never below 0, the initial capital.
    """
    if m >= 1:
        return np.zeros(len(y_T))
    if m <= 0:
        return np.where(np.maximum.accumulate(y_T) > 0, np.inf, 0.0)
    values, where = np.unique(y_T, return_inverse=True)  # few distinct values: most scores are 0 or 1
    log_GV = np.log1p(BET_FRACTIONS[:, None] * (values / m - 1))
    log_GT = np.cumsum(log_GV[:, where], axis=1)
    most_T = log_GT.max(axis=0)
    capital_T = most_T + np.log(np.exp(log_GT - most_T).mean(axis=0))
    return np.asarray(np.maximum(np.maximum.accumulate(capital_T), 0.0), dtype=np.float64)


def _final_log_capital(y_T: Floats, m: float) -> float:
    return float(log_capital(y_T, m)[-1]) if len(y_T) else 0.0


def _lower_bound(y_T: Floats, alpha: float) -> float:
    """Return the largest m in [0, 1] up to which every "the mean is at most m" is rejected, by bisection from below."""
    needed, low, high = -np.log(alpha), 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if _final_log_capital(y_T, middle) >= needed:
            low = middle
        else:
            high = middle
    return low


def cluster_order(clusters: Iterable[str]) -> list[str]:
    """Return the distinct clusters in the order of the sequential design."""
    return sorted(set(clusters), key=lambda c: (digest("turn", c), c))


def is_sequential(table: pd.DataFrame) -> pd.Series:
    """Return which rows come from the sequential design; none without a column `design`."""
    if DESIGN not in table.columns:
        return pd.Series(False, index=table.index)
    return table[DESIGN] == SEQUENTIAL


def common_prefix(table: pd.DataFrame, keys: Seq[str], *, paired: bool = False) -> pd.DataFrame:
    """Drop sequential rows beyond the prefix that all training seeds share; its end is a stopping time too.

    `paired`: the prefix must also have partners in the reference (column `_merge` is "both").
    """
    mark = is_sequential(table)
    if not mark.any():
        return table
    rows = table[mark]
    last = rows.groupby([*keys, "eval", "seed"])["position"].max()
    if paired:
        partners = rows[rows["_merge"] == "both"].groupby([*keys, "eval", "seed"])["position"].max()
        last = pd.concat([last, partners], axis=1).min(axis=1)
    end = last.groupby(level=list(range(len(keys) + 1))).min().rename("end")
    ends = table.join(end, on=[*keys, "eval"])["end"]
    return table[~mark | (table["position"] <= ends)]
