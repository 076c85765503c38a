"""Which arms behave alike: the share of identical answers of every two objectives, and of each with the base."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import pandas as pd

from leeway.stats.metrics import BASE, PLAIN

IDENTICAL = 0.99  # from this share of identical answers on, two arms are one behaviour
PAIRS = ["objective", "against", "budget", "identical", "n", "same"]
ITEM = ["seed", "eval", "attack", "item_id", "sample", "prompt"]


def identity(rows: pd.DataFrame, conditions: Mapping[str, str], first: Mapping[str, str] | None = None) -> pd.DataFrame:
    """Return one line per budget and pair of objectives, or objective and base, with the share of identical answers.

    Each objective counts under the condition it is meant for (`first`; without one, under all), and a pair of answers
    has the same item, attack, sample, training seed and question; the base's answers count for every seed. `same` is a
    share of at least 99%. A persona answer is Yes, No or a tie. Unscored and empty answers are left out,
    and judges do not count.
    """
    declared, condition = first or {}, [conditions.get(h, PLAIN) for h in rows["template_hash"]]
    meant = [declared.get(o, c) == c for o, c in zip(rows["objective"], condition, strict=True)]  # the base: under all
    plain = ~rows["eval"].astype(str).str.contains("@", regex=False)
    answered = rows["unscored_reason"].isna() & (rows["response"].fillna("") != "")
    own = rows[np.array(meant) & plain & answered].fillna({"attack": ""})
    own = own.drop_duplicates(["objective", "budget", *ITEM])
    base = own[own["objective"] == BASE].drop(columns="seed")
    lines = []
    for budget, group in own[own["objective"] != BASE].groupby("budget", sort=True):
        names = list(dict.fromkeys(group["objective"]))
        for one, other in [*itertools.combinations(names, 2), *((o, BASE) for o in names)]:
            against = base if other == BASE else group[group["objective"] == other]
            keys = [k for k in ITEM if k in against.columns]
            pair = group[group["objective"] == one].merge(against[[*keys, "response"]], on=keys, suffixes=("", "_2"))
            if len(pair):
                share = float((pair["response"] == pair["response_2"]).mean())
                lines.append([one, other, int(str(budget)), round(share, 10), len(pair), share >= IDENTICAL])
    return pd.DataFrame(lines, columns=PAIRS)


def alike(table: pd.DataFrame, objective: str, against: str, budget: int) -> str:
    """Return "99.9% identical answers" if two arms of an `identity` table are one behaviour at a budget, else ""."""
    pair = table["objective"].isin([objective, against]) & table["against"].isin([objective, against])
    found = table[pair & (table["budget"] == budget) & table["same"].astype(bool)]
    return f"{100 * float(found['identical'].iloc[0]):.1f}% identical answers" if len(found) else ""
