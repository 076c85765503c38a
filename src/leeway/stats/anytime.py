"""Tests and intervals for the mean of bounded values that hold whenever one looks, and wherever one stops.

Bet on values y_1, y_2, … in [0, 1] one after the other. With a share c of the capital against "the mean is at most m",

    K_t(m) = Π_{i ≤ t} (1 + λ (y_i − m)),  λ = c / m

is a nonnegative supermartingale under that hypothesis, so that by Ville's inequality it ever reaches 1/α with chance α
at most (Waudby-Smith & Ramdas 2024, JRSS-B 86:1, arXiv 2010.09686, section 4: the capital process). How much to bet is
not known beforehand. Here the capital is split over fixed shares c = 1/21 … 20/21, their "diversified" Kelly bets: the
mean of the 20 capitals is one too, and depends on no level and no schedule. Every factor 1 − c + c y/m falls with m, so
the means that are not rejected are an interval, and a one-sided p inverts exactly the one-sided bound.

Nothing is assumed of the values but bounds and one mean: no normal approximation, no variance. Two-sided statements
take half the level on each side, as the hedged capital there (theorem 3) does.

Prompts in turn: the order in which a sequential design asks them, and which rows were asked by one.

The prompts of an axis are taken in one fixed random order, drawn from their names alone. A checkpoint is asked a prefix
of it, and whether the prefix is made longer depends on what it holds: so `stats.anytime` speaks of it, and no estimate
for a fixed number of prompts does. Rows of such an axis carry `SEQUENTIAL` in the column `design`.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from leeway.hashing import digest
from leeway.stats.intervals import Floats, Ints

SHARES = np.arange(1, 21) / 21
HALVINGS = 34  # of an interval of length 1


@dataclass(frozen=True)
class Anytime:
    """What may be said of the mean of moves in [−1, 1], taken in the order in which they were seen.

    The order may not depend on the moves, and whether one more is taken only on those before it.
    """

    moves_T: Floats

    def p_above(self, bound: float) -> float:
        """p of H0: the mean is `bound` or less; 1 where there is no move."""
        return _p(_evidence(self._y_T, _unit(bound)))

    def p_below(self, bound: float) -> float:
        """p of H0: the mean is `bound` or more."""
        return _p(_evidence(1 - self._y_T, 1 - _unit(bound)))

    @cached_property
    def p(self) -> float:
        """Two-sided p of H0: the mean is 0."""
        return min(1.0, 2 * min(self.p_above(0.0), self.p_below(0.0)))

    def low(self, alpha: float) -> float:
        """The lower one-sided bound of confidence 1 − alpha at all times at once: p_above rejects what is below it."""
        return 2 * _bound(self._y_T, alpha) - 1

    def high(self, alpha: float) -> float:
        return 1 - 2 * _bound(1 - self._y_T, alpha)

    def decided(self, alpha: float, margin: float) -> str:
        """`different` from 0, `equivalent` within ±margin, or nothing yet: by the two-sided interval of level alpha.

        Chance of any wrong word ever: alpha at most, since both are read off one sequence of intervals.
        """
        if min(self.p_above(0.0), self.p_below(0.0)) <= alpha / 2:
            return "different"
        if max(self.p_above(-margin), self.p_below(margin)) <= alpha / 2:
            return "equivalent"
        return ""

    @cached_property
    def _y_T(self) -> Floats:
        return np.clip((np.asarray(self.moves_T, dtype=np.float64) + 1) / 2, 0.0, 1.0)


def _unit(move: float) -> float:
    return (move + 1) / 2


def evidence(y_T: Floats, m: float) -> Floats:
    """log of the largest capital held so far against "the mean of y is m or less", after each value, [T].

    Never below 0, which is what one began with.
    """
    if m >= 1:
        return np.zeros(len(y_T))
    if m <= 0:
        return np.where(np.maximum.accumulate(y_T) > 0, np.inf, 0.0)
    values, where = np.unique(y_T, return_inverse=True)  # few distinct values: most answers are right or wrong
    log_GV = np.log1p(SHARES[:, None] * (values / m - 1))
    log_GT = np.cumsum(log_GV[:, where], axis=1)
    most_T = log_GT.max(axis=0)
    capital_T = most_T + np.log(np.exp(log_GT - most_T).mean(axis=0))
    return np.asarray(np.maximum(np.maximum.accumulate(capital_T), 0.0), dtype=np.float64)


def _evidence(y_T: Floats, m: float) -> float:
    return float(evidence(y_T, m)[-1]) if len(y_T) else 0.0


def _p(log_evidence: float) -> float:
    return float(np.exp(-log_evidence))


def _bound(y_T: Floats, alpha: float) -> float:
    """The largest m in [0, 1] up to which every "the mean is at most m" is rejected, from below."""
    needed, low, high = -np.log(alpha), 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if _evidence(y_T, middle) >= needed:
            low = middle
        else:
            high = middle
    return low


DESIGN, SEQUENTIAL, FIXED = "design", "sequential", "fixed"


def in_turn(clusters: Iterable[str]) -> list[str]:
    """The distinct clusters in the order in which they are asked."""
    return sorted(set(clusters), key=lambda c: (digest("turn", c), c))


def is_sequential(table: pd.DataFrame) -> pd.Series:
    """Which rows were asked by this design; none of a run that knows no other than a fixed one."""
    if DESIGN not in table.columns:
        return pd.Series(False, index=table.index)
    return table[DESIGN] == SEQUENTIAL


def by_turn(values: Floats, strata: Ints, turns: Ints) -> Floats:
    """Each prompt's mean over those of its strata that are there, in the order of the turns.

    Of one prompt's answers alone: every prompt weighs the same, whatever the others hold.
    """
    _, where = np.unique(turns, return_inverse=True)
    size = int(strata.max(initial=0)) + 1
    cell, shape = where * size + strata, (int(where.max(initial=-1)) + 1, size)
    count_TS = np.bincount(cell, minlength=shape[0] * size).reshape(shape)
    sum_TS = np.bincount(cell, weights=values, minlength=shape[0] * size).reshape(shape)
    mean_TS = np.divide(sum_TS, count_TS, out=np.zeros(shape), where=count_TS > 0)
    return np.asarray(mean_TS.sum(axis=1) / (count_TS > 0).sum(axis=1), dtype=np.float64)


def of_rates(values: Floats, strata: Ints, turns: Ints) -> Anytime:
    """What may be said of a mean of scores in [0, 1], as of moves: 0 is −1."""
    return Anytime(2 * by_turn(values, strata, turns) - 1)


def common(table: pd.DataFrame, keys: Seq[str], *, paired: bool = False) -> pd.DataFrame:
    """Without what only some training seeds were asked: all of them share a prefix, whose end is a stopping time too.

    `paired`: nor what the reference (column `found`) was not asked.
    """
    mark = is_sequential(table)
    if not mark.any():
        return table
    asked = table[mark]
    last = asked.groupby([*keys, "eval", "seed"])["turn"].max()
    if paired:
        partners = asked[asked["found"] == "both"].groupby([*keys, "eval", "seed"])["turn"].max()
        last = pd.concat([last, partners], axis=1).min(axis=1)
    end = last.groupby(level=list(range(len(keys) + 1))).min().rename("end")
    ends = table.join(end, on=[*keys, "eval"])["end"]
    return table[~mark | (table["turn"] <= ends)]
