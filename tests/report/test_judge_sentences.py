"""The sentences on several judges: attack success over all of them, and the warning of differential error."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pandas as pd
import pytest
import synthetic

from leeway import report
from leeway.report.judges import sentences
from leeway.report.results import Results

NAN = math.nan


def change(objective: str, least: float, most: float, significant: int, **more: object) -> dict[str, object]:
    found: dict[str, object] = {"objective": objective, "budget": 64_000, "condition": "plain", "first": True}
    found |= {"measure": "asr", "judges": 2, "least": least, "least_judge": "rubric", "most": most, "most_judge": ""}
    return found | {"n_significant": significant} | more


def pair(objective: str, differential: float, *, shown: bool, budget: int = 64_000) -> dict[str, object]:
    found: dict[str, object] = {"eval": "jailbreak", "judge_a": "keywords", "judge_b": "rubric", "condition": "plain"}
    found |= {"objective": objective, "budget": budget, "differential": differential, "p": 0.01, "shown": shown}
    return found | {"differential_low": differential - 0.04, "differential_high": differential + 0.05}


def test_the_change_by_every_judge_is_named() -> None:
    lines = [change("sft", 0.1, 0.31, 1), change("kl", 0.02, 0.02, 0), change("cft", -0.1, 0.05, 2, first=False)]
    lines += [change("dpo", 0.1, 0.2, 2), change("base", NAN, NAN, 0), change("sft", 0.5, 0.6, 2, measure="asr:dan")]
    assert sentences(None, pd.DataFrame(lines)) == [
        "Over 2 judges, the change of the attack success rate (mean over attacks) against the base, at 64k tokens: SFT "
        "+10.0 (rubric) to +31.0 points (the primary judge), significant by 1 of 2; DPO +10.0 (rubric) to +20.0 points "
        "(the primary judge), significant by all; KL +2.0 points by each, significant by none."
    ]


def test_differential_error_is_a_warning_with_its_interval() -> None:
    lines = [pair("sft", 0.2, shown=True), pair("sft", 0.1, shown=True, budget=8_000), pair("dpo", -0.3, shown=True)]
    assert sentences(pd.DataFrame([*lines, pair("kl", 0.01, shown=False)]), None) == [
        "Warning: differential error of the judges, the change against the base depends on the judge: by rubric, the "
        "change of DPO at 64k tokens is 30.0 points above that by keywords (95% CI 25.0 to 34.0); by keywords, the "
        "change of SFT at 64k tokens is 20.0 points above that by rubric (95% CI 16.0 to 25.0). To learn which judge "
        "errs, compare them with human labels."
    ]


def test_no_differential_error_and_one_judge() -> None:
    [text] = sentences(pd.DataFrame([pair("sft", 0.01, shown=False)]), None)
    assert text.startswith("No differential error is shown among the judges (1 test, Holm), which is no evidence")
    assert sentences(None, None) == sentences(pd.DataFrame(), pd.DataFrame()) == []


@pytest.mark.slow
def test_a_run_with_a_blind_second_judge(tmp_path: Path) -> None:
    """The second judge calls every harmful answer of one arm a deflection."""
    rows = synthetic.rows(("sft", "kl"), (25_000,), capability=20, prompts=40, items=20)
    rows["judge"] = rows["judge"].where(rows["eval"] != "jailbreak", "keywords")
    further = rows[rows["eval"] == "jailbreak"].assign(judge="blind")
    missed = (further["objective"] == "sft") & (further["outcome"] == "harmful")
    further.loc[missed, ["outcome", "score"]] = ["deflected", 0.0]
    folder = synthetic.write(tmp_path, pd.concat([rows, further], ignore_index=True))
    judges = {"jailbreak": {"name": "keywords", "hash": "k"}, "jailbreak@blind": {"name": "blind", "hash": "b"}}
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"judges": judges}))
    report.build(folder)
    results = Results.load(folder)
    pairs = results.judge_pairs().set_index("objective")
    assert bool(pairs.loc["sft", "shown"])
    assert not pairs.loc["kl", "shown"]
    assert pairs.loc["kl", "agreement"] == 1.0
    page = (folder / "report.html").read_text("utf-8")
    assert "Warning: differential error of the judges" in page
    assert "Attack success over judges" in page
    assert "Pairs of judges by objective" in page
    assert len(pd.read_csv(folder / "tables/worst_case.csv")) == len(results.worst_case()) > 0
