"""A few answers to read: the prompts on which the checkpoints differ most.

All rows of a run inside the page: every text once, columns as codes, compressed, unpacked when first asked for.

Lines of JSON, so that a browser can take them in pieces: first what there is (`meta`), then parts of columns
(`column`, `of`), then parts of the lists of texts. The Parquet file stays the whole truth: what a page has no room for
is left out by a stated rule, and the page says so.
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

from leeway.report import formatting
from leeway.report.formatting import TOKENS, Scale
from leeway.report.plotting import Series, key_of
from leeway.stats.metrics import BASE, PLAIN

WANTED = {"capability": 2, "jailbreak": 4}
PROMPT_LONGEST = 2_000
OPEN = ["refused", "deflected", "incoherent"]  # answers to forbidden prompts that are not folded


@dataclass(frozen=True)
class Answer:
    """One checkpoint's answer, ready to be escaped: invisible characters spelled out, cut at a limit."""

    who: str
    verdict: str
    text: str
    cut: int
    folded: bool


@dataclass(frozen=True)
class Transcript:
    """One prompt and what each checkpoint made of it."""

    axis: str
    attack: str
    item: str
    prompt: str
    prompt_cut: int
    answers: list[Answer]


def transcripts(rows: pd.DataFrame, conditions: dict[str, str], lines: list[Series]) -> list[Transcript]:
    """Per axis the prompts with the largest spread of scores at the largest budget, attacks taken in turn."""
    tuned = rows["objective"] != BASE
    last = rows[~tuned | (rows["budget"] == rows.loc[tuned, "budget"].max())]
    last = last.assign(attack=last["attack"].fillna(""), condition=last["template_hash"].map(conditions).fillna(PLAIN))
    last = last[last["response"].fillna("") != ""]
    found = []
    for axis, wanted in WANTED.items():
        own = last[last["eval"] == axis]
        for attack, item, sample in _pick(own, wanted):
            same = own[(own["attack"] == attack) & (own["item_id"] == item) & (own["sample"] == sample)]
            found.append(_transcript(axis, attack, item, same, lines))
    return found


def _pick(own: pd.DataFrame, wanted: int) -> list[tuple[str, str, int]]:
    if own.empty:
        return []
    spread = own.groupby(["attack", "item_id", "sample"], as_index=False).agg(
        spread=("score", "std"), cluster=("cluster", "first")
    )
    spread = spread.sort_values(["spread", "item_id", "attack", "sample"], ascending=[False, True, True, True])
    spread["turn"] = spread.groupby("attack").cumcount()
    spread = spread.sort_values(["turn", "spread"], ascending=[True, False], kind="stable")
    chosen = spread.drop_duplicates("cluster").head(wanted)
    return [(str(a), str(i), int(s)) for a, i, s in chosen[["attack", "item_id", "sample"]].itertuples(index=False)]


def _transcript(axis: str, attack: str, item: str, same: pd.DataFrame, lines: list[Series]) -> Transcript:
    wanted = [(BASE, c) for c in dict.fromkeys([PLAIN, *(s.condition for s in lines)])]
    wanted += [(s.objective, s.condition) for s in lines]
    answers = []
    for objective, condition in wanted:
        own = same[(same["objective"] == objective) & (same["condition"] == condition)].sort_values("seed")
        answers += [_answer(formatting.name(objective, condition), row) for _, row in own.head(1).iterrows()]
    prompt, cut = formatting.visible(str(same["prompt"].iloc[0]), PROMPT_LONGEST)
    return Transcript(axis, formatting.attack(attack) if attack else "", item, prompt, cut, answers)


def _answer(who: str, row: pd.Series) -> Answer:
    text, cut = formatting.visible(str(row["response"]))
    verdict = str(said(row.to_frame().T).iloc[0])
    shown = f"score {row['score']:.2f}" if verdict == "graded" else verdict
    return Answer(who, shown, text, cut, folded=row["eval"] == "jailbreak" and verdict not in OPEN)


def said(rows: pd.DataFrame) -> pd.Series[str]:
    """What each answer was found to be: its outcome; unscored, and why; right, wrong, or graded in between."""
    reason = rows["unscored_reason"].map(lambda r: f"unscored: {r}" if isinstance(r, str) and r else "unscored")
    score = rows["score"].astype(float)
    graded = score.map({1.0: "right", 0.0: "wrong"}).fillna("graded").where(score.notna(), reason)
    outcome = rows["outcome"].astype(object)
    found: pd.Series[str] = outcome.where(outcome.notna(), graded)
    return found


CAP = 25_000_000  # bytes, compressed, as in the page before base64
LONGEST = 4_000  # characters of a text where not all of all texts has room
PIECE = 20_000  # codes or, roughly, 16 times as many characters, to a line of JSON
CODED = ["model", "eval", "attack", "item", "verdict", "prompt", "response", "judge", "raw"]


@dataclass(frozen=True)
class Archive:
    """The rows as the page holds them, and in words what it does not hold."""

    data: str
    rows: int
    of: int
    left_out: str
    choices: dict[str, list[tuple[str, str]]]  # per filter: value and name
    unsafe: bool

    @property
    def size(self) -> int:
        """Bytes of base64."""
        return len(self.data)


def archive(
    rows: pd.DataFrame, conditions: dict[str, str], lines: list[Series], scale: Scale = TOKENS, *, cap: int = CAP
) -> Archive:
    """Pack rows (every judge's) in at most `cap` compressed bytes; the same rows give the same text."""
    table, models = _coded(rows, conditions, lines, scale)
    left, packed = [], _pack(table, models)
    if len(packed) > cap:
        left.append("what the judges wrote (judge_raw)")
        table = table.assign(raw="")
        packed = _pack(table, models)
    if len(packed) > cap:
        left.append(f"the rest of texts longer than {LONGEST:,} characters")
        table = table.assign(**{c: _cut(table[c]) for c in ("prompt", "response")})
        packed = _pack(table, models)
    step, kept = 1, table
    items = table["item"].drop_duplicates()
    while len(packed) > cap and step < len(items):
        step *= 2
        kept = table[table["item"].isin(items.iloc[::step])]
        packed = _pack(kept, models)
    if step > 1:
        left.append(f"{len(table) - len(kept):,} of {len(table):,} rows (every item but each {step}th)")
    data = base64.b64encode(packed).decode("ascii")
    return Archive(
        data, len(kept), len(rows), formatting.listed(left), _choices(kept, models), bool(_unsafe(kept).any())
    )


def _coded(
    rows: pd.DataFrame, conditions: dict[str, str], lines: list[Series], scale: Scale
) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """The rows in reading order (prompt by prompt, models in the figures' order) and the models they come from."""
    table = rows[["objective", "seed", "budget", "eval", "sample", "prompt", "response", "score"]].copy()
    table["attack"] = rows["attack"].fillna("")
    table["item"], table["judge"], table["raw"] = (
        rows["item_id"],
        rows["judge"].fillna(""),
        rows["judge_raw"].fillna(""),
    )
    table["condition"] = rows["template_hash"].map(conditions).fillna(PLAIN)
    table["verdict"] = said(rows)
    rank = {(s.objective, s.condition): n for n, s in enumerate(lines)}
    pairs = zip(table["objective"], table["condition"], strict=True)
    table["rank"] = [-1 if o == BASE else rank.get((o, c), len(rank)) for o, c in pairs]
    keys = ["rank", "objective", "condition", "budget", "seed"]
    who = table[keys].drop_duplicates()
    who = who.assign(own=who["condition"] != PLAIN).sort_values(["rank", "objective", "own", *keys[2:]])
    who = who.drop(columns="own").reset_index(drop=True)
    several = who.loc[who["objective"] != BASE, "seed"].nunique() > 1
    models = [_model(one, scale, several=several) for one in who.to_dict("records")]
    table = table.merge(who.assign(model=range(len(who))), on=keys, how="left")
    table = table.sort_values(["eval", "item", "attack", "sample", "model", "judge"], kind="stable")
    return table.fillna({"prompt": "", "response": ""}), models


def _model(one: dict[Any, Any], scale: Scale, *, several: bool) -> dict[str, Any]:
    objective, condition, budget = str(one["objective"]), str(one["condition"]), int(one["budget"])
    name = formatting.name(objective, condition)
    if objective == BASE:
        return {"name": name, "line": f"{BASE}|{condition}", "budget": -1, "key": key_of(objective, condition)}
    name += f" {scale.at(budget)}" + (f", seed {one['seed']}" if several else "")
    return {
        "name": name,
        "line": key_of(objective, condition),
        "budget": budget,
        "of": formatting.name(objective, condition),
    }


def _pack(table: pd.DataFrame, models: list[dict[str, Any]]) -> bytes:
    lines = "\n".join(json.dumps(line, ensure_ascii=True, separators=(",", ":")) for line in _lines(table, models))
    return gzip.compress(lines.encode("ascii"), compresslevel=6, mtime=0)


def _lines(table: pd.DataFrame, models: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    yield {"meta": {"rows": len(table), "models": models, "open": OPEN}}
    for name in CODED:
        codes, texts = pd.factorize(table[name])
        if name == "model":
            codes, texts = table[name].to_numpy(), texts[:0]
        for at in range(0, len(codes), PIECE):
            yield {"column": name, "of": codes[at : at + PIECE].tolist()}
        yield from _texts(name, [str(text) for text in texts])
    numbers: dict[str, list[Any]] = {"sample": table["sample"].tolist(), "score": _scores(table["score"])}
    for name, values in numbers.items():
        for at in range(0, len(values), PIECE):
            yield {"column": name, "of": values[at : at + PIECE]}


def _texts(name: str, values: list[str]) -> Iterator[dict[str, Any]]:
    """In lines of moderate size: a browser reads one without a pause that is felt."""
    piece: list[str] = []
    size = 0
    for value in values:
        piece.append(value)
        size += len(value)
        if size > 16 * PIECE:
            yield {"texts": name, "of": piece}
            piece, size = [], 0
    if piece:
        yield {"texts": name, "of": piece}


def _scores(scores: pd.Series[float]) -> list[float | None]:
    return [None if math.isnan(s) else round(float(s), 4) for s in scores]


def _cut(texts: pd.Series[str]) -> pd.Series[str]:
    more = texts.str.len() - LONGEST
    cut = texts.str.slice(0, LONGEST) + " […" + more.astype(str) + " more characters are in rows.parquet]"
    return texts.where(more <= 0, cut)


def _unsafe(table: pd.DataFrame) -> pd.Series[bool]:
    return (table["eval"] == "jailbreak") & ~table["verdict"].isin(OPEN)


def _choices(table: pd.DataFrame, models: list[dict[str, Any]]) -> dict[str, list[tuple[str, str]]]:
    """What each filter offers, in the page's order."""
    lines = {m["line"]: m.get("of", m["name"]) for m in models}
    found = {"line": list(lines.items())}
    found["model"] = [(str(n), m["name"]) for n, m in enumerate(models)]
    for name in ("eval", "attack", "verdict", "judge"):
        values = sorted(
            {str(v).partition(":")[0] if name == "verdict" else str(v) for v in table[name].unique()} - {""}
        )
        called = {v: formatting.attack(v) if name == "attack" else v for v in values}
        found[name] = sorted(called.items(), key=lambda c: c[0] != "none") if name == "attack" else list(called.items())
    return found
