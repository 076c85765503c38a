"""Several judges of the same answers: one comes first, each other one is an axis of its own, nothing is averaged."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from leeway.stats.measures import ANSWER, AT, StatsError, judged_twice


def judged(rows: pd.DataFrame, judges: Mapping[str, str] | None = None) -> pd.DataFrame:
    """The rows with every further judge's under the eval `<eval>@<judge>`, for all estimates to read.

    `judges` names the first judge of an eval, whose rows keep the eval's name; an eval with one judge per answer needs
    none. Raises StatsError where several judged one answer and none is named, where a named one judged nothing, and
    where the first judge has no row for an answer that another one judged.
    """
    judges = judges or {}
    for axis, judge in judges.items():
        if not ((rows["eval"] == axis) & (rows["judge"] == judge)).any():
            there = ", ".join(sorted(map(str, rows.loc[rows["eval"] == axis, "judge"].unique()))) or "no rows at all"
            raise StatsError(f"{axis} has no rows judged by {judge}: it has {there}")
    names = rows["eval"].astype(object)
    for axis in dict.fromkeys([*judges, *judged_twice(rows)]):
        own = rows[rows["eval"] == axis]
        if axis not in judges:
            known = ", ".join(sorted(map(str, own["judge"].unique())))
            raise StatsError(f"{axis} was judged by {known}: say which one comes first")
        first = own["judge"] == judges[axis]
        _covers(own, first, judges[axis])
        further = own.index[~first]
        names.loc[further] = axis + AT + own.loc[further, "judge"].astype(str)
    return rows.assign(eval=names)


def _covers(rows: pd.DataFrame, first: pd.Series, judge: str) -> None:
    keys = pd.MultiIndex.from_frame(rows[ANSWER].fillna(""))
    without = ~keys.isin(keys[first.to_numpy()])
    if without.any():
        row = rows[without].iloc[0]
        raise StatsError(
            f"{row['eval']}: {row['judge']} judged {row['item_id']} of {row['objective']} at {row['budget']}, and "
            f"{judge} has no row for it ({int(without.sum())} such rows)"
        )
