"""Select example transcripts, and embed all rows of a run in the page for its search.

The embedded rows are gzipped lines of JSON, so that a browser can parse them step by step: `meta`, then chunks of the
columns as codes (`column`, `of`), then chunks of each column's distinct texts (`texts`, `of`). What exceeds the size
limit is left out by a fixed rule that the page states; `rows.parquet` has everything.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd

from leeway.generation.thinking import final_answer
from leeway.report import formatting
from leeway.report.formatting import TOKENS, BudgetUnit
from leeway.report.plotting import Series, key_of
from leeway.stats.metrics import BASE, DIRECT, PLAIN

N_EXAMPLES = {"capability": 2, "jailbreak": 4}
MAX_PROMPT_CHARS = 2_000
OPEN = ["refused", "deflected", "incoherent"]  # outcomes of forbidden prompts that are not collapsed
MAX_BYTES = 25_000_000  # of the embedded rows, compressed, before base64
MAX_TEXT_CHARS = 4_000  # of a text if not all texts fit in full
CHUNK = 20_000  # codes per line of JSON; lines of texts hold about 16 times as many characters
CODED = ["model", "eval", "attack", "item", "outcome", "prompt", "response", "judge", "raw"]


def transcripts(rows: pd.DataFrame, conditions: dict[str, str], lines: list[Series]) -> list[dict[str, Any]]:
    """Return, per axis, the prompts with the largest spread of scores at the largest budget, alternating attacks.

    Invisible characters are escaped; `cut` characters are left out.
    """
    tuned = rows["objective"] != BASE
    last = rows[~tuned | (rows["budget"] == rows.loc[tuned, "budget"].max())]
    last = last.assign(attack=last["attack"].fillna(""), condition=last["template_hash"].map(conditions).fillna(PLAIN))
    last = last[last["response"].fillna("") != ""]
    found = []
    for axis, n in N_EXAMPLES.items():
        own = last[last["eval"] == axis]
        for attack, item, sample in _select(own, n):
            same = own[(own["attack"] == attack) & (own["item_id"] == item) & (own["sample"] == sample)]
            found.append(_transcript(axis, attack, item, same, lines))
    return found


def _select(own: pd.DataFrame, n: int) -> list[tuple[str, str, int]]:
    if own.empty:
        return []
    responses = own.groupby(["attack", "item_id", "sample"], as_index=False)
    spread = responses.agg(spread=("score", "std"), cluster=("cluster", "first"))
    spread = spread.sort_values(["spread", "item_id", "attack", "sample"], ascending=[False, True, True, True])
    spread["turn"] = spread.groupby("attack").cumcount()
    spread = spread.sort_values(["turn", "spread"], ascending=[True, False], kind="stable")
    chosen = spread.drop_duplicates("cluster").head(n)
    return [(str(a), str(i), int(s)) for a, i, s in chosen[["attack", "item_id", "sample"]].itertuples(index=False)]


def _transcript(axis: str, attack: str, item: str, same: pd.DataFrame, lines: list[Series]) -> dict[str, Any]:
    models = [(BASE, c) for c in dict.fromkeys([PLAIN, *(s.condition for s in lines)])]
    models += [(s.objective, s.condition) for s in lines]
    responses = []
    for objective, condition in models:
        own = same[(same["objective"] == objective) & (same["condition"] == condition)].sort_values("seed").head(1)
        for row, outcome in zip(own.to_dict("records"), _outcome_labels(own), strict=True):
            text, cut = formatting.escape_invisible(_without_thought(str(row["response"])))
            shown = {"model": formatting.objective_name(objective, condition), "text": text, "cut": cut}
            shown["outcome"] = f"score {row['score']:.2f}" if outcome == "graded" else str(outcome)
            responses.append(shown | {"collapsed": axis == "jailbreak" and outcome not in OPEN})
    prompt, cut = formatting.escape_invisible(str(same["prompt"].iloc[0]), MAX_PROMPT_CHARS)
    found = {"axis": axis, "attack": formatting.attack_name(attack) if attack else "", "item": item}
    return found | {"prompt": prompt, "prompt_cut": cut, "responses": responses}


def _without_thought(response: str) -> str:
    """Return the final answer; a thought without one as it is."""
    return final_answer(response) or response


def _outcome_labels(rows: pd.DataFrame) -> pd.Series[str]:
    """Return each response's outcome; else `right`, `wrong` or `graded` by its score; else `unscored: <reason>`."""
    reason = rows["unscored_reason"].map(lambda r: f"unscored: {r}" if isinstance(r, str) and r else "unscored")
    score, outcome = rows["score"].astype(float), rows["outcome"].astype(object)
    graded = score.map({1.0: "right", 0.0: "wrong"}).fillna("graded").where(score.notna(), reason)
    return outcome.where(outcome.notna(), graded)


@dataclass(frozen=True)
class EmbeddedRows:
    """The rows as embedded in the page, and a description of what is left out."""

    data: str
    rows: int
    of: int
    left_out: str
    choices: dict[str, list[tuple[str, str]]]  # per filter: value and name


def embed_rows(
    rows: pd.DataFrame,
    conditions: dict[str, str],
    lines: list[Series],
    unit: BudgetUnit = TOKENS,
    *,
    max_bytes: int = MAX_BYTES,
) -> EmbeddedRows:
    """Pack the rows of every judge into at most `max_bytes`, compressed; deterministic."""
    table, models = _table(rows, conditions, lines, unit)
    left, packed = [], _pack(table, models)
    if len(packed) > max_bytes:
        left.append("judge outputs (judge_raw)")
        table = table.assign(raw="")
        packed = _pack(table, models)
    if len(packed) > max_bytes:
        left.append(f"texts beyond {MAX_TEXT_CHARS:,} characters")
        for column in ("prompt", "response"):
            texts, more = table[column], table[column].str.len() - MAX_TEXT_CHARS
            cut = texts.str.slice(0, MAX_TEXT_CHARS) + " […" + more.astype(str)
            table[column] = texts.where(more <= 0, cut + " more characters are in rows.parquet]")
        packed = _pack(table, models)
    step, included = 1, table
    items = table["item"].drop_duplicates()
    while len(packed) > max_bytes and step < len(items):
        step *= 2
        included = table[table["item"].isin(items.iloc[::step])]
        packed = _pack(included, models)
    if step > 1:
        left.append(f"{len(table) - len(included):,} of {len(table):,} rows (all but every {step}th item)")
    data = base64.b64encode(packed).decode("ascii")
    return EmbeddedRows(data, len(included), len(rows), formatting.join_and(left), _choices(included, models))


def _table(
    rows: pd.DataFrame, conditions: dict[str, str], lines: list[Series], unit: BudgetUnit
) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """Return the rows by prompt, with models in the figures' order, and the models."""
    table = rows[["objective", "seed", "budget", "eval", "sample", "prompt", "response", "score"]].copy()
    table["attack"] = rows["attack"].fillna("")
    table["item"] = rows["item_id"]
    table["judge"], table["raw"] = rows["judge"].fillna(""), rows["judge_raw"].fillna("")
    table["condition"] = rows["template_hash"].map(conditions).fillna(PLAIN)
    table["outcome"] = _outcome_labels(rows)
    rank = {(s.objective, s.condition): n for n, s in enumerate(lines)}
    pairs = zip(table["objective"], table["condition"], strict=True)
    table["rank"] = [-1 if o == BASE else rank.get((o, c), len(rank)) for o, c in pairs]
    keys = ["rank", "objective", "condition", "budget", "seed"]
    distinct = table[keys].drop_duplicates().assign(other=lambda t: t["condition"] != PLAIN)
    distinct = distinct.sort_values(["rank", "objective", "other", *keys[2:]])
    distinct = distinct.drop(columns="other").reset_index(drop=True)
    several = distinct.loc[distinct["objective"] != BASE, "seed"].nunique() > 1
    models = [_model(checkpoint, unit, several=several) for checkpoint in distinct.to_dict("records")]
    table = table.merge(distinct.assign(model=range(len(distinct))), on=keys, how="left")
    table = table.sort_values(["eval", "item", "attack", "sample", "model", "judge"], kind="stable")
    return table.fillna({"prompt": "", "response": ""}), models


def _model(checkpoint: dict[Any, Any], unit: BudgetUnit, *, several: bool) -> dict[str, Any]:
    objective, condition, budget = str(checkpoint["objective"]), str(checkpoint["condition"]), int(checkpoint["budget"])
    name = formatting.objective_name(objective, condition)
    if objective == BASE:
        return {"name": name, "line": f"{BASE}|{condition}", "budget": -1, "key": key_of(objective, condition)}
    shown = f"{name} {unit.at(budget)}" + (f", seed {checkpoint['seed']}" if several else "")
    return {"name": shown, "line": key_of(objective, condition), "budget": budget, "of": name}


def _pack(table: pd.DataFrame, models: list[dict[str, Any]]) -> bytes:
    lines = "\n".join(json.dumps(line, ensure_ascii=True, separators=(",", ":")) for line in _lines(table, models))
    return gzip.compress(lines.encode("ascii"), compresslevel=6, mtime=0)


def _lines(table: pd.DataFrame, models: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    yield {"meta": {"rows": len(table), "models": models, "open": OPEN}}
    for name in CODED:
        codes, texts = pd.factorize(table[name])
        if name == "model":
            codes, texts = table[name].to_numpy(), texts[:0]
        yield from _chunks(name, codes.tolist())
        yield from _texts(name, [str(text) for text in texts])
    yield from _chunks("sample", table["sample"].tolist())
    yield from _chunks("score", [None if math.isnan(s) else round(float(s), 4) for s in table["score"]])


def _chunks(name: str, values: list[Any]) -> Iterator[dict[str, Any]]:
    for at in range(0, len(values), CHUNK):
        yield {"column": name, "of": values[at : at + CHUNK]}


def _texts(name: str, values: list[str]) -> Iterator[dict[str, Any]]:
    """Yield chunks that a browser can parse without a noticeable pause."""
    start = size = 0
    for n, value in enumerate(values, 1):
        size += len(value)
        if size > 16 * CHUNK or n == len(values):
            yield {"texts": name, "of": values[start:n]}
            start, size = n, 0


def _choices(table: pd.DataFrame, models: list[dict[str, Any]]) -> dict[str, list[tuple[str, str]]]:
    lines = {m["line"]: m.get("of", m["name"]) for m in models}
    choices = {"line": list(lines.items())}
    labels = {"attack": formatting.attack_name, "eval": formatting.eval_name}
    choices["model"] = [(str(n), m["name"]) for n, m in enumerate(models)]
    for name in ("eval", "attack", "outcome", "judge"):
        texts = map(str, table[name].unique())
        values = sorted({t.partition(":")[0] if name == "outcome" else t for t in texts} - {""})
        label = labels.get(name, str)
        named = [(v, label(v)) for v in values]
        choices[name] = sorted(named, key=lambda c: c[0] != DIRECT) if name == "attack" else named
    return choices
