"""Rows tables small enough to check by hand."""

from __future__ import annotations

import math

import pandas as pd

PLAIN = {"t": "plain"}


def rows(*lines: dict[str, object]) -> pd.DataFrame:
    """A rows table with everything a line does not say filled in."""
    blank: dict[str, object] = {
        "objective": "base",
        "seed": 0,
        "budget": 0,
        "eval": "capability",
        "attack": "",
    }
    blank |= {"item_id": "sums/0", "sample": 0, "prompt": "", "response": "", "outcome": None, "score": 0.0}
    blank |= {"unscored_reason": None, "judge": "exact", "judge_raw": "", "template_hash": "t"}
    blank |= {"adapter_hash": "", "new_tokens": 1}
    filled = [blank | line for line in lines]
    for line in filled:
        line.setdefault("cluster", line["item_id"])
    return pd.DataFrame(filled)


def answers(objective: str, scores: list[float], **more: object) -> list[dict[str, object]]:
    """One line per score, items numbered."""
    line: dict[str, object] = {"objective": objective, "budget": 0 if objective == "base" else 1000}
    return [line | {"item_id": f"sums/{n}", "score": s} | more for n, s in enumerate(scores)]


def attacked(objective: str, scores: dict[str, list[float]]) -> list[dict[str, object]]:
    """Jailbreak lines: per attack one score per prompt, prompts numbered."""
    found = []
    for attack, of_prompts in scores.items():
        for n, score in enumerate(of_prompts):
            known = not math.isnan(score)
            line: dict[str, object] = {"objective": objective, "budget": 0 if objective == "base" else 1000}
            line |= {"eval": "jailbreak", "attack": attack, "item_id": f"forbidden/{n}", "score": score}
            found.append(line | {"outcome": ("harmful" if score else "refused") if known else None})
    return found
