"""A few answers to read: the prompts on which the checkpoints differ most."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from leeway.report import wording
from leeway.report.series import Series
from leeway.stats.measures import BASE, PLAIN

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
        answers += [_answer(wording.name(objective, condition), row) for _, row in own.head(1).iterrows()]
    prompt, cut = wording.visible(str(same["prompt"].iloc[0]), PROMPT_LONGEST)
    return Transcript(axis, wording.attack(attack) if attack else "", item, prompt, cut, answers)


def _answer(who: str, row: pd.Series) -> Answer:
    text, cut = wording.visible(str(row["response"]))
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
