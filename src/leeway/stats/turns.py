"""Prompts in turn: the order in which a sequential design asks them, and which rows were asked by one.

The prompts of an axis are taken in one fixed random order, drawn from their names alone. A checkpoint is asked a prefix
of it, and whether the prefix is made longer depends on what it holds: so `stats.anytime` speaks of it, and no estimate
for a fixed number of prompts does. Rows of such an axis carry `SEQUENTIAL` in the column `design`.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq

import numpy as np
import pandas as pd

from leeway.hashing import digest
from leeway.stats.anytime import Anytime
from leeway.stats.intervals import Floats, Ints

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
