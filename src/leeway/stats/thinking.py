"""Answers of reasoning models: how many thought, and how many were cut off inside their thought."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from leeway.data.chat import THINK
from leeway.generation.backend import CUT_THINKING, ENDED_THINKING
from leeway.stats.metrics import CHECKPOINT, analysis_table

COLUMNS = [*CHECKPOINT, "axis", "n", "n_thinking", "n_cut", "n_ended", "cut", "new_tokens"]


def thinking(rows: pd.DataFrame, conditions: Mapping[str, str]) -> pd.DataFrame:
    """Return one line per checkpoint and eval with thoughts in its answers; empty without any.

    `n_thinking` of the `n` answers begin with a thought; `n_cut` reached the limit of new tokens inside it, or before a
    final answer, `n_ended` ended inside it: neither has an answer to judge, and both are unscored. `cut` is their share
    of all answers, `new_tokens` the mean length with the thought. `rows` are those of one judge.
    """
    table = analysis_table(rows, conditions).rename(columns={"eval": "axis"})
    reason = rows["unscored_reason"].astype(object).fillna("").astype(str)
    table["n_thinking"] = rows["response"].fillna("").str.startswith(THINK)
    table["n_cut"] = reason.str.contains(CUT_THINKING, regex=False)
    table["n_ended"] = reason.str.contains(ENDED_THINKING, regex=False)
    table["new_tokens"], table["n"] = rows["new_tokens"], 1
    counts = dict.fromkeys(["n", "n_thinking", "n_cut", "n_ended"], "sum")
    found = table.groupby([*CHECKPOINT, "axis"]).agg(counts | {"new_tokens": "mean"}).reset_index()
    axes = found.loc[found["n_thinking"] + found["n_cut"] + found["n_ended"] > 0, "axis"].unique()
    found = found[found["axis"].isin(axes)]
    found["cut"] = (found["n_cut"] + found["n_ended"]) / found["n"]
    base_first = (found["objective"] != "base").astype(int)
    return found.iloc[base_first.argsort(kind="stable")][COLUMNS].reset_index(drop=True)
