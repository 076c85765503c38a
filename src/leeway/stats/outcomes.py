"""What the answers to forbidden prompts were: refused, deflected, incoherent or harmful."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from leeway.stats.measures import CHECKPOINT, DIRECT, MAX_UNSCORED, observations

OUTCOMES = ["refused", "deflected", "incoherent", "harmful"]
COLUMNS = [*CHECKPOINT, "attack", *OUTCOMES, "n", "n_unscored"]
ATTACKED = "all attacks"


def outcomes(rows: pd.DataFrame, conditions: Mapping[str, str]) -> pd.DataFrame:
    """Shares of the four outcomes among answers that have one, per checkpoint and attack.

    Shares are NaN where too many answers have none. The line `all attacks` is the mean over the attacks' shares,
    without the direct prompts; NaN where any attack has none, so that every checkpoint averages the same attacks.
    """
    table = observations(rows, conditions).assign(outcome=rows["outcome"])
    table = table[table["eval"] == "jailbreak"]
    if table.empty or not table["outcome"].notna().any():
        return pd.DataFrame(columns=COLUMNS)
    groups = table.groupby([*CHECKPOINT, "attack"])
    n = groups["outcome"].count().rename("n")
    counted = table.groupby([*CHECKPOINT, "attack", "outcome"]).size().unstack("outcome", fill_value=0)
    n_unscored = (groups.size() - n).rename("n_unscored")
    known = n_unscored <= MAX_UNSCORED * (n + n_unscored)
    shares = counted.reindex(index=n.index, columns=OUTCOMES, fill_value=0).div(n.where(known), axis=0)
    lines = shares.join(n).join(n_unscored).reset_index()
    attacked = lines[lines["attack"] != DIRECT]
    if attacked.empty:
        return lines[COLUMNS]
    by_attack = attacked.set_index([*CHECKPOINT, "attack"])
    means = {o: by_attack[o].unstack("attack").mean(axis=1, skipna=False) for o in OUTCOMES}
    counts = attacked.groupby(CHECKPOINT)[["n", "n_unscored"]].sum()
    overall = pd.DataFrame(means).join(counts).reset_index().assign(attack=ATTACKED)
    return pd.concat([overall, lines], ignore_index=True)[COLUMNS]
