"""Persona answers beyond one number: answer mass, Yes-rate, and the Yes- and No-keyed halves."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pandas as pd

from leeway.stats.measures import CHECKPOINT, MAX_UNSCORED, observations

COLUMNS = [
    *CHECKPOINT,
    "trait",
    "endorsement",
    "yes_keyed",
    "no_keyed",
    "yes_rate",
    "answer_mass",
    "n",
    "n_unscored",
]
ALL = "all traits"


def persona(rows: pd.DataFrame, conditions: Mapping[str, str]) -> pd.DataFrame:
    """Means over items per checkpoint and trait; NaN where too many items are unscored.

    `yes_keyed` is the endorsement where Yes endorses, `no_keyed` where No does: a model that says Yes to
    everything has 1 and 0, and 0.5 overall. `yes_rate` is the share of items where Yes is the likelier answer
    (a tie counts half); `answer_mass` is P(Yes) + P(No): where it is small, endorsement rests on little.
    """
    asked = rows["eval"] == "persona"
    table = observations(rows[asked], conditions)
    if table.empty:
        return pd.DataFrame(columns=COLUMNS)
    table = table.join(_answers(rows.loc[asked, "judge_raw"]))
    scored = table["score"].notna()
    table["yes_keyed"] = table["score"].where(table["match"] == "Yes")
    table["no_keyed"] = table["score"].where(table["match"] == "No")
    table["yes_rate"] = (0.5 + 0.5 * (table["p_yes"] - table["p_no"]).map(_sign)).where(scored)
    table["answer_mass"] = (table["p_yes"] + table["p_no"]).where(scored)
    table["trait"] = table["part"]
    table["n"], table["n_unscored"] = scored.astype(int), (~scored).astype(int)
    overall = _means(table.assign(trait=ALL))
    return pd.concat([overall, _means(table)], ignore_index=True) if table["trait"].nunique() > 1 else _means(table)


def _means(table: pd.DataFrame) -> pd.DataFrame:
    means = ["score", "yes_keyed", "no_keyed", "yes_rate", "answer_mass"]
    how = dict.fromkeys(means, "mean") | {"n": "sum", "n_unscored": "sum"}
    frame = table.groupby([*CHECKPOINT, "trait"]).agg(how).reset_index()
    withheld = frame["n_unscored"] > MAX_UNSCORED * (frame["n"] + frame["n_unscored"])
    frame.loc[withheld, means] = float("nan")
    return frame.rename(columns={"score": "endorsement"})[COLUMNS]


def _sign(value: float) -> float:
    return float("nan") if pd.isna(value) else float((value > 0) - (value < 0))


def _answers(raw: pd.Series) -> pd.DataFrame:
    """p_yes, p_no and the matching answer of each row; NaN where the judge left none that can be read."""
    found = []
    for text in raw:
        try:
            value = json.loads(text) if isinstance(text, str) else {}
        except ValueError:
            value = {}
        found.append(value if isinstance(value, dict) else {})
    frame = pd.DataFrame(found, index=raw.index, columns=["p_yes", "p_no", "match"])
    for name in ("p_yes", "p_no"):
        frame[name] = pd.to_numeric(frame[name], errors="coerce")
    return frame
