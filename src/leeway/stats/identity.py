"""Which arms behave identically: the share of identical answers of every two objectives, and of each with the base."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pandas as pd

from leeway.stats.metrics import BASE, PLAIN
from leeway.stats.pairing import first_conditions

IDENTICAL = 0.99  # from this share of identical answers in every eval on, two arms are one behaviour
MIN_ITEMS = 30  # over all evals; fewer cannot show that two arms are one
PAIRS = ["objective", "against", "budget", "identical", "n", "same"]
ITEM = ["seed", "eval", "attack", "item_id", "sample", "prompt"]


def identity(rows: pd.DataFrame, conditions: Mapping[str, str], first: Mapping[str, str] | None = None) -> pd.DataFrame:
    """Return one line per budget and pair of objectives, or objective and base, with the share of identical answers.

    `identical` is the smallest share over the evals, so that an eval with many items cannot hide another; `same` is a
    share of at least 99% in every eval, over at least 30 items in all; `n` is the number of pairs of answers. A pair
    has the same item, attack, sample, training seed and question. Each objective counts under the condition it is
    meant for (`first`, or `pairing.first_conditions`), and the base under the same template, for every seed; an
    objective without such a condition is paired under the same template. A persona answer is Yes, No or a tie.
    Unscored and empty answers are left out, and judges do not count.
    """
    table = rows.copy()
    for name in ("attack", "template_hash"):  # a column with nothing in it is one of floats
        table[name] = table[name].astype(object).fillna("")
    table["condition"] = [conditions.get(h, PLAIN) for h in table["template_hash"]]
    meant = first_conditions(table, first)
    wanted = table["objective"].map(meant.get)
    intended = wanted.isna() | (wanted == table["condition"])  # the base: all
    plain = ~table["eval"].astype(str).str.contains("@", regex=False)
    answered = table["unscored_reason"].isna() & (table["response"].fillna("") != "")
    own = table[intended & plain & answered].drop_duplicates(["objective", "budget", "template_hash", *ITEM])
    own = _coded(own)
    base = own[own["objective"] == BASE].drop(columns="seed")
    lines = []
    for budget, group in own[own["objective"] != BASE].groupby("budget", sort=True):
        names = list(dict.fromkeys(group["objective"]))
        for one, other in [*itertools.combinations(names, 2), *((o, BASE) for o in names)]:
            against = base if other == BASE else group[group["objective"] == other]
            keys = ["question", *(["seed"] if other != BASE else [])]
            keys += [] if one in meant and other in meant else ["template_hash"]
            pair = group[group["objective"] == one].merge(against[[*keys, "response"]], on=keys, suffixes=("", "_2"))
            if len(pair):
                share = float((pair["response"] == pair["response_2"]).groupby(pair["eval"]).mean().min())
                enough = pair["item"].nunique() >= MIN_ITEMS
                same = enough and share >= IDENTICAL
                lines.append([one, other, int(str(budget)), round(share, 10), len(pair), same])
    return pd.DataFrame(lines, columns=PAIRS)


def _coded(own: pd.DataFrame) -> pd.DataFrame:
    """Return the answers with a number for each distinct text: a hundred merges on long texts take seconds."""
    question = [name for name in ITEM if name != "seed"]
    codes = {"question": question, "item": ["eval", "item_id"], "response": ["response"], "eval": ["eval"]}
    codes |= {"template_hash": ["template_hash"]}
    made = {name: own.groupby(columns, sort=False, dropna=False).ngroup() for name, columns in codes.items()}
    return own[["objective", "budget", "seed"]].assign(**made)


def same_behaviour(table: pd.DataFrame, objective: str, against: str, budget: int) -> str:
    """Return "99.9% identical answers" if two arms of an `identity` table are one behaviour at a budget, else ""."""
    pair = table["objective"].isin([objective, against]) & table["against"].isin([objective, against])
    found = table[pair & (table["budget"] == budget) & table["same"].astype(bool)]
    return f"{100 * float(found['identical'].iloc[0]):.1f}% identical answers" if len(found) else ""
