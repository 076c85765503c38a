"""Which checkpoints no other one beats on capability and robustness at once."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from leeway.stats.measures import CHECKPOINT
from leeway.stats.rates import rates

COLUMNS = [*CHECKPOINT, "capability", "asr", "on_frontier", "dominated_by", "note"]
NOTE = "point estimates only: no uncertainty is carried into who dominates whom"


def frontier(rows: pd.DataFrame, conditions: Mapping[str, str]) -> pd.DataFrame:
    """Every checkpoint's accuracy and ASR; on the frontier if none is as good on both and better on one.

    Without a capability and a jailbreak axis the table is empty; a checkpoint whose rate on either was withheld
    is left out.
    """
    return frontier_of(rates(rows, conditions))


def frontier_of(table: pd.DataFrame) -> pd.DataFrame:
    """The same from a table of rates already made."""
    # before the pivot, which drops a measure withheld everywhere: direct requests must not take its place
    asr = "asr" if (table["measure"] == "asr").any() else "asr:none"
    wide = table.pivot_table(index=CHECKPOINT, columns="measure", values="rate", sort=False)
    if "accuracy" not in wide or asr not in wide:
        return pd.DataFrame(columns=COLUMNS)
    points = wide[["accuracy", asr]].dropna().set_axis(["capability", "asr"], axis=1).reset_index()
    capability, vulnerable = points["capability"].to_numpy(), points["asr"].to_numpy()
    as_good = (capability >= capability[:, None]) & (vulnerable <= vulnerable[:, None])
    better = (capability > capability[:, None]) | (vulnerable < vulnerable[:, None])
    points["dominated_by"] = (as_good & better).sum(axis=1)
    points["on_frontier"] = points["dominated_by"] == 0
    points["note"] = NOTE
    return points[COLUMNS]
