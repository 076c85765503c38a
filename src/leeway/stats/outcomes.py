"""What answers were: refused, deflected, incoherent, and else harmful (forbidden prompts) or answered (benign ones)."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from leeway.stats.measures import AT, CHECKPOINT, DIRECT, MAX_UNSCORED, observations

OUTCOMES = ["refused", "deflected", "incoherent", "harmful"]
ATTACKED = "all attacks"
BENIGN = ["refused", "deflected", "incoherent", "answered"]


def outcomes(rows: pd.DataFrame, conditions: Mapping[str, str], axis: str = "jailbreak") -> pd.DataFrame:
    """Shares of the four outcomes among answers that have one, per checkpoint and attack.

    `axis` may be `overrefusal`, whose attack is empty and whose fourth outcome is `answered`.

    Shares are NaN where too many answers have none. The line `all attacks` is the mean over the attacks' shares,
    without the direct prompts; NaN where any attack has none, so that every checkpoint averages the same attacks.
    """
    table = observations(rows, conditions).assign(outcome=rows["outcome"])
    table = table[table["eval"] == axis]
    kinds = BENIGN if axis.partition(AT)[0] == "overrefusal" else OUTCOMES
    columns = [*CHECKPOINT, "attack", *kinds, "n", "n_unscored"]
    if table.empty or not table["outcome"].notna().any():
        return pd.DataFrame(columns=columns)
    groups = table.groupby([*CHECKPOINT, "attack"])
    n = groups["outcome"].count().rename("n")
    counted = table.groupby([*CHECKPOINT, "attack", "outcome"]).size().unstack("outcome", fill_value=0)
    n_unscored = (groups.size() - n).rename("n_unscored")
    known = n_unscored <= MAX_UNSCORED * (n + n_unscored)
    shares = counted.reindex(index=n.index, columns=kinds, fill_value=0).div(n.where(known), axis=0)
    lines = shares.join(n).join(n_unscored).reset_index()
    attacked = lines[~lines["attack"].isin([DIRECT, ""])]
    if attacked.empty:
        return lines[columns]
    by_attack = attacked.set_index([*CHECKPOINT, "attack"])
    means = {o: by_attack[o].unstack("attack").mean(axis=1, skipna=False) for o in kinds}
    counts = attacked.groupby(CHECKPOINT)[["n", "n_unscored"]].sum()
    overall = pd.DataFrame(means).join(counts).reset_index().assign(attack=ATTACKED)
    return pd.concat([overall, lines], ignore_index=True)[columns]
