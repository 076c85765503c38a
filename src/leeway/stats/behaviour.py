"""What stands behind the rates of free-form answers: ratings and outcomes, and answers with and without an opinion."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pandas as pd

from leeway.stats.intervals import NAN
from leeway.stats.metrics import CHECKPOINT, MAX_UNSCORED, analysis_table

FREE_FORM = ["aligned", "misaligned", "incoherent"]
ALIGNMENT = [*CHECKPOINT, "alignment", "coherence", *FREE_FORM, "n", "n_unscored"]
SYCOPHANCY = [*CHECKPOINT, "changed", "right_alone", "right_with_opinion", "n", "n_unscored"]
READ = ("right", "wrong", "other")


def alignment(rows: pd.DataFrame, conditions: Mapping[str, str]) -> pd.DataFrame:
    """Return mean ratings and shares of outcomes of free-form answers per checkpoint, over all questions.

    `alignment` is the mean over coherent answers, `coherence` that over all rated ones (NaN if judged exactly), both in
    [0, 1]. Shares are of the `n` answers with an outcome; all are NaN if more than a fifth has none.
    """
    own = rows[rows["eval"] == "alignment"]
    if own.empty:
        return pd.DataFrame(columns=ALIGNMENT)
    raw = own["judge_raw"].map(_loads)
    table = analysis_table(own, conditions).assign(alignment=own["score"], n=own["outcome"].notna())
    table["coherence"] = pd.to_numeric(raw.map(lambda r: _rating(r.get("coherence"))), errors="coerce") / 100
    for outcome in FREE_FORM:
        table[outcome] = (own["outcome"] == outcome).astype(float).where(own["outcome"].notna())
    return _means(table, ["alignment", "coherence", *FREE_FORM])[ALIGNMENT]


def sycophancy(rows: pd.DataFrame, conditions: Mapping[str, str]) -> pd.DataFrame:
    """Return how often answers change to the user's wrong opinion, and are right without and with it, per checkpoint.

    `changed` is the rate of the measure; the other two are shares of the questions with two readable answers, whether
    or not they count in it. All are NaN if more than a fifth of the questions is unscored.
    """
    own = rows[rows["eval"] == "sycophancy"]
    if own.empty:
        return pd.DataFrame(columns=SYCOPHANCY)
    raw = own["judge_raw"].map(_loads)
    alone, opinion = raw.map(lambda r: r.get("without_opinion")), raw.map(lambda r: r.get("with_opinion"))
    read = alone.isin(READ) & opinion.isin(READ)
    table = analysis_table(own, conditions).assign(changed=own["score"], n=own["score"].notna())
    table["right_alone"] = (alone == "right").astype(float).where(read)
    table["right_with_opinion"] = (opinion == "right").astype(float).where(read)
    return _means(table, ["changed", "right_alone", "right_with_opinion"])[SYCOPHANCY]


def _means(table: pd.DataFrame, means: list[str]) -> pd.DataFrame:
    """Return means per checkpoint; `n` says which rows count as scored."""
    table = table.assign(n_unscored=~table["n"])
    frame = (
        table.groupby(CHECKPOINT).agg(dict.fromkeys(means, "mean") | {"n": "sum", "n_unscored": "sum"}).reset_index()
    )
    frame.loc[frame["n_unscored"] > MAX_UNSCORED * (frame["n"] + frame["n_unscored"]), means] = NAN
    return frame


def _loads(text: object) -> dict[str, object]:
    try:
        value = json.loads(text) if isinstance(text, str) else {}
    except (ValueError, RecursionError):  # text of a judge, which may be anything
        return {}
    return value if isinstance(value, dict) else {}


def _rating(value: object) -> object:
    return value.get("rating") if isinstance(value, dict) else None
