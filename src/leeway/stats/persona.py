"""Persona answers beyond one number: answer mass, Yes-rate, keyed halves, and what other forms of a question change."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pandas as pd

from leeway.stats.measures import CHECK, CHECKPOINT, MAX_UNSCORED, observations

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
LIKERT = [*CHECKPOINT, "trait", "score", "keyed", "reverse_keyed", "answer_mass", "n", "n_unscored"]
CHECKS = [*CHECKPOINT, "eval", "form", "trait", "mean_difference", "mean_abs_difference", "answer_mass"]
CHECKS += ["n", "n_unscored"]
NUMBERS = ["p_yes", "p_no", "key", "answer_mass"]
REFERENCE = {"persona": "plain", "persona-sd3": "agree-high"}  # what the other forms are compared with


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
    table["n"], table["n_unscored"] = scored.astype(int), (~scored).astype(int)
    found = _by_trait(table, ["score", "yes_keyed", "no_keyed", "yes_rate", "answer_mass"])
    return found.rename(columns={"score": "endorsement"})[COLUMNS]


def likert(rows: pd.DataFrame, conditions: Mapping[str, str]) -> pd.DataFrame:
    """The Short Dark Triad per checkpoint and trait: mean score over items and both directions of the scale.

    `keyed` is the mean where agreeing endorses the trait, `reverse_keyed` where it denies it: a model that agrees with
    everything has 1 and 0. `answer_mass` is the probability of the digits 1 to 5.
    """
    asked = rows["eval"] == "persona-sd3"
    table = observations(rows[asked], conditions)
    if table.empty:
        return pd.DataFrame(columns=LIKERT)
    table = table.join(_answers(rows.loc[asked, "judge_raw"]))
    scored = table["score"].notna()
    table["keyed"] = table["score"].where(table["key"] == 1)
    table["reverse_keyed"] = table["score"].where(table["key"] == -1)
    table["answer_mass"] = table["answer_mass"].where(scored)
    table["n"], table["n_unscored"] = scored.astype(int), (~scored).astype(int)
    return _by_trait(table, ["score", "keyed", "reverse_keyed", "answer_mass"])[LIKERT]


def checks(rows: pd.DataFrame, conditions: Mapping[str, str]) -> pd.DataFrame:
    """What another form of the question changes: per checkpoint, form and trait, the mean of form − reference.

    The reference is the plain form (persona) or 5 for agreeing (Short Dark Triad): the same item, the same checkpoint.
    `n` counts items scored under both, `n_unscored` the others; `answer_mass` is the form's own. Means are NaN where
    too many are unscored.
    """
    asked = rows["eval"].isin([CHECK, *REFERENCE])
    table = observations(rows[asked], conditions)
    if table.empty:
        return pd.DataFrame(columns=CHECKS)
    table = table.join(_answers(rows.loc[asked, "judge_raw"]))
    table["eval"] = table["eval"].replace(CHECK, "persona")
    reference = table["eval"].map(REFERENCE)
    table["form"] = table["form"].astype(object).fillna(reference)
    table["answer_mass"] = table["answer_mass"].fillna(table["p_yes"] + table["p_no"]).where(table["score"].notna())
    on = [*CHECKPOINT, "eval", "item_id", "sample"]
    plain = table.loc[table["form"] == reference, [*on, "score"]]
    pairs = table[table["form"] != reference].merge(plain, on=on, how="left", suffixes=("", "_reference"))
    pairs["mean_difference"] = pairs["score"] - pairs["score_reference"]
    pairs["mean_abs_difference"] = pairs["mean_difference"].abs()
    scored = pairs["mean_difference"].notna()
    pairs["n"], pairs["n_unscored"] = scored.astype(int), (~scored).astype(int)
    means = ["mean_difference", "mean_abs_difference", "answer_mass"]
    return _by_trait(pairs, means, ["eval", "form"])[CHECKS]


def _by_trait(table: pd.DataFrame, means: list[str], more: list[str] | None = None) -> pd.DataFrame:
    """Means over all traits where there are several, then for each."""
    table = table.assign(trait=table["part"])
    keys = [*CHECKPOINT, *(more or []), "trait"]
    each = _means(table, means, keys)
    if table["trait"].nunique() < 2:
        return each
    return pd.concat([_means(table.assign(trait=ALL), means, keys), each], ignore_index=True)


def _means(table: pd.DataFrame, means: list[str], keys: list[str]) -> pd.DataFrame:
    frame = table.groupby(keys).agg(dict.fromkeys(means, "mean") | {"n": "sum", "n_unscored": "sum"}).reset_index()
    withheld = frame["n_unscored"] > MAX_UNSCORED * (frame["n"] + frame["n_unscored"])
    frame.loc[withheld, means] = float("nan")
    return frame


def _sign(value: float) -> float:
    return float("nan") if pd.isna(value) else float((value > 0) - (value < 0))


def _answers(raw: pd.Series) -> pd.DataFrame:
    """What `judge_raw` says of each row, a column each; NaN where it says nothing or cannot be read."""
    found = []
    for text in raw:
        try:
            value = json.loads(text) if isinstance(text, str) else {}
        except ValueError:
            value = {}
        found.append(value if isinstance(value, dict) else {})
    frame = pd.DataFrame(found, index=raw.index, columns=["match", "form", *NUMBERS])
    for name in NUMBERS:
        frame[name] = pd.to_numeric(frame[name], errors="coerce")
    return frame
