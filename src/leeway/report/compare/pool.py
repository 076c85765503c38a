"""Runs of one study under other training seeds, taken together as one."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pandas as pd

from leeway.errors import LeewayError
from leeway.report.compare.check import Study, not_poolable
from leeway.report.results import Results
from leeway.stats.measures import BASE

ASKED = [
    "eval",
    "attack",
    "item_id",
    "sample",
    "prompt",
    "template_hash",
    "judge",
]  # one answer of the base, in raw rows
SAME = ["response", "outcome", "score"]
SHOWN = 4  # differences that a message names before it counts the rest
CONTRAST = "leave out --pool to contrast them study by study"


def pool(studies: list[Study]) -> Results:
    """One table of rows with every study's seeds; raises LeewayError for anything else that differs.

    The base answered the same questions in each run. Its answers are taken once, and have to be the same ones.
    """
    for a, b in combinations(studies, 2):
        _same_settings(a, b)
        _other_seeds(a, b)
        _same_base(a, b)
    first = studies[0].results
    rows = [first.rows, *(s.results.rows[s.results.rows["objective"] != BASE] for s in studies[1:])]
    ledgers = [s.results.ledger for s in studies]
    name = " + ".join(s.name for s in studies)
    return replace(
        first,
        rows=pd.concat(rows, ignore_index=True),
        ledger=pd.concat(ledgers, ignore_index=True),
        study={**first.study, "name": name},
    )


def _same_settings(a: Study, b: Study) -> None:
    found = not_poolable([a, b])
    if found:
        named = "; ".join(f"{d['what']}: {d[a.name]} and {d[b.name]}" for d in found[:SHOWN])
        more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        what = f"compare --pool: {a.name} and {b.name} differ in more than their seeds ({named}{more})"
        raise LeewayError(what, fix=CONTRAST)


def _other_seeds(a: Study, b: Study) -> None:
    both = _runs(a) & _runs(b)
    if both:
        objective, seed = min(both)
        what = f"compare --pool: {a.name} and {b.name} both hold {objective} with seed {seed}"
        raise LeewayError(f"{what}: one run would count as two", fix="pool runs of different seeds")


def _runs(study: Study) -> set[tuple[str, int]]:
    rows = study.results.rows
    tuned = rows.loc[rows["objective"] != BASE, ["objective", "seed"]].drop_duplicates()
    return {(str(o), int(s)) for o, s in tuned.itertuples(index=False, name=None)}


def _same_base(a: Study, b: Study) -> None:
    one, other = (s.results.rows[s.results.rows["objective"] == BASE] for s in (a, b))
    one, other = (t[[*ASKED, *SAME]].fillna({"attack": "", "template_hash": "", "judge": ""}) for t in (one, other))
    both = one.merge(other, on=ASKED, how="outer", suffixes=("", "_b"), indicator="found")
    apart = both["found"] != "both"
    for column in SAME:
        left, right = both[column], both[f"{column}_b"]
        apart |= (left != right) & ~(left.isna() & right.isna())
    if apart.any():
        what = (
            f"compare --pool: the base answered {int(apart.sum()):,} of {len(both):,} questions otherwise in {b.name}"
        )
        raise LeewayError(f"{what} than in {a.name}: not one base under one judge", fix=CONTRAST)
