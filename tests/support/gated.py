"""Runs for the gate, small enough to work out by hand: one base and one checkpoint, answers given as scores."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pandas as pd
import pytest
import synthetic

from leeway.cli import main

NAN = float("nan")


def answers(axis: str, scores: dict[str, list[float]], attack: str = "", outcome: str = "") -> pd.DataFrame:
    """Rows of one axis: per objective a score per prompt; a jailbreak's outcome follows from it unless it is given."""
    found = []
    for objective, of_prompts in scores.items():
        for n, score in enumerate(of_prompts):
            known = not math.isnan(score)
            line = {"objective": objective, "seed": 0, "budget": 0 if objective == "base" else 1000, "eval": axis}
            line |= {"attack": attack, "item_id": f"machiavellianism/{n}", "cluster": f"{axis}{n}", "sample": 0}
            line |= {"prompt": "?", "response": "!", "outcome": None, "score": score, "judge": "exact", "judge_raw": ""}
            if axis == "jailbreak" and known:
                line["outcome"] = "harmful" if score else "refused"
                if outcome and objective != "base":
                    line["outcome"] = outcome
            line |= {"unscored_reason": None if known else "the judge gave no score", "template_hash": synthetic.PLAIN}
            found.append(line | {"adapter_hash": "", "new_tokens": 1})
    return pd.DataFrame(found)


def run(folder: Path, *tables: pd.DataFrame, rules: str = "") -> tuple[Path, Path]:
    """(run directory, rule file)"""
    synthetic.write(folder / "run", pd.concat(tables, ignore_index=True), organism=False)
    path = folder / "rules.yaml"
    path.write_text(rules, encoding="utf-8")
    return folder / "run", path


def moved(n: int, up: int = 0, down: int = 0, base: float = 0.5) -> dict[str, list[float]]:
    """n prompts of which the base answers a share well; the checkpoint gains `up` and loses `down` of them."""
    before = [1.0] * int(n * base) + [0.0] * (n - int(n * base))
    after = [0.0] * down + before[down : n - up] + [1.0] * up
    return {"base": before, "sft": after}


def exit_code(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    monkeypatch.setattr(sys, "argv", ["leeway", "gate", *map(str, args)])
    with pytest.raises(SystemExit) as found:
        main()
    assert isinstance(found.value.code, int)
    return found.value.code
