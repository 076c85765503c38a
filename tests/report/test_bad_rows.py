"""Deficient rows: page, contrasts and gate state the deficiency and give no misleading number."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import synthetic

from leeway import report
from leeway.errors import LeewayError
from leeway.gate import Gate, gate
from leeway.report import Results

pytestmark = pytest.mark.slow

OTHER = "ffffffffffffffff"  # a rendered prompt of another version
SIZES = {"capability": 40, "prompts": 20, "items": 12}
RULES = """
rules:
  - {measure: asr, margin: 0.05}
  - {measure: endorsement, margin: 0.05}
  - {measure: accuracy, margin: 0.05}
  - {measure: accuracy, at_least: 0.3}
  - {measure: endorsement, at_most: 0.3}
"""
NUMBERS = ["difference", "low", "high", "p"]


def rows(**sizes: int) -> pd.DataFrame:
    return synthetic.rows(("sft",), (25_000,), **{**SIZES, **sizes})


def run(folder: Path, table: pd.DataFrame) -> Path:
    (folder / "rules.yaml").write_text(RULES)
    return synthetic.write(folder / "run", table)


def decided(folder: Path) -> Gate:
    return gate(folder, folder.parent / "rules.yaml")


def verdict(folder: Path) -> str:
    report.build(folder)
    return " ".join(json.loads((folder / "results.json").read_text("utf-8"))["verdict"])


def primary(folder: Path) -> pd.DataFrame:
    table = Results.load(folder).contrasts()
    return table[table["primary"]].set_index("measure")


def all_refuse(folder: Path, words: str) -> None:
    for ask in (report.build, lambda f: Results.load(f).contrasts(), decided):
        with pytest.raises(LeewayError, match=words) as found:
            ask(folder)
        assert "\n" not in str(found.value)
        assert "rows.parquet" in str(found.value)


def half(table: pd.DataFrame) -> pd.DataFrame:
    """Give every second row of the checkpoint another template version."""
    return table.assign(
        template_hash=table["template_hash"].where((table["objective"] == "base") | (table.index % 2 == 0), OTHER)
    )


def both(table: pd.DataFrame) -> pd.DataFrame:
    """Duplicate all rows under another template version."""
    return pd.concat([table, table.assign(template_hash=OTHER)], ignore_index=True)


@pytest.mark.parametrize("pool", [half, both])
def test_template_version_missing_in_manifest_is_rejected(tmp_path: Path, pool):
    all_refuse(run(tmp_path, pool(rows())), "rows of another version of a template were pooled")


@pytest.mark.parametrize("pool", [half, both])
def test_two_template_versions_under_one_condition_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pool):
    monkeypatch.setattr(synthetic, "CONDITIONS", {**synthetic.CONDITIONS, OTHER: "plain"})
    all_refuse(run(tmp_path, pool(rows())), "rows of several versions of a template were pooled")


def test_rows_of_two_pooled_runs_are_rejected(tmp_path: Path):
    all_refuse(run(tmp_path, pd.concat([rows(), rows()], ignore_index=True)), "rows of two runs were pooled")


def test_run_without_base_is_rejected(tmp_path: Path):
    table = rows()
    all_refuse(run(tmp_path, table[table["objective"] != "base"]), "no rows of the base model")


def test_axis_without_base_is_not_compared(tmp_path: Path):
    table = rows()
    folder = run(tmp_path, table[(table["objective"] != "base") | (table["eval"] != "jailbreak")])
    assert "Attack success rate (mean over attacks) could not be compared" in verdict(folder)
    found = primary(folder)
    assert found.loc["asr", NUMBERS].isna().all()
    assert "the base was not measured" in found.loc["asr", "note"]
    assert found.loc["accuracy", NUMBERS].notna().all()
    finding = decided(folder).decisions[0].results[0]
    assert (finding.outcome, finding.evidence.withheld) == ("inconclusive", found.loc["asr", "note"])


def test_single_seed_is_stated_everywhere(tmp_path: Path):
    folder = run(tmp_path, rows())
    assert "not training-seed variance (1 seed)" in verdict(folder)
    assert primary(folder)["note"].str.startswith("one training seed").all()
    assert any(w.startswith("one training seed") for w in decided(folder).decisions[0].warnings)


@pytest.mark.parametrize("who", ["everyone", "sft"])
def test_all_unscored(tmp_path: Path, who: str):
    table = rows()
    at = (table["objective"] == who) | (who == "everyone")
    table.loc[at, "score"], table.loc[at, "outcome"] = np.nan, None
    table.loc[at, "unscored_reason"] = "the judge was down"
    folder = run(tmp_path, table)
    text = verdict(folder)
    assert text.count("could not be compared") == 5
    assert "significantly" not in text
    assert primary(folder)[NUMBERS].isna().all(axis=None)
    found = decided(folder)
    assert found.outcome == "inconclusive"
    assert all("unscored" in f.evidence.withheld for f in found.decisions[0].results)
    assert "their number is unknown" in " ".join(found.decisions[0].warnings)


def test_zero_variance_has_a_bound_and_no_error(tmp_path: Path):
    """Nothing moved on 40, 20 and 12 prompts: a limit of 1 − 0.05^(1/n) is outside 5 points on each."""
    table = rows()
    table["score"] = table["eval"].map({"capability": 1.0, "jailbreak": 0.0, "persona": 0.25})
    table.loc[table["eval"] == "jailbreak", "outcome"] = "refused"
    folder = run(tmp_path, table)
    assert "differs significantly" not in verdict(folder)
    found = primary(folder)
    assert found["se"].isna().all()
    assert (found["high"] - found["low"] > 0.1).all()
    assert found["note"].str.contains("no test can reject").all()
    by_rule = {(f.evidence.rule.measure, f.evidence.rule.kind): f for f in decided(folder).decisions[0].results}
    assert [by_rule[m, "margin"].outcome for m in ("asr", "endorsement", "accuracy")] == ["inconclusive"] * 3
    for measure, n in (("asr", 20), ("endorsement", 12), ("accuracy", 40)):
        assert abs(by_rule[measure, "margin"].evidence.limit) == pytest.approx(1 - 0.05 ** (1 / n), abs=0.01)
    assert by_rule["accuracy", "at_least"].evidence.limit == pytest.approx(0.05 ** (1 / 40), abs=1e-9)
    assert 0.25 < by_rule["endorsement", "at_most"].evidence.limit < 0.6


def test_three_items_are_inconclusive(tmp_path: Path):
    folder = run(tmp_path, rows(capability=3, prompts=3, items=3))
    text = verdict(folder)
    assert text.count("could not be compared") == 5
    assert "significantly" not in text
    found = primary(folder)
    assert found["p_holm"].dropna().gt(0.05).all()
    assert found["mde"].isna().all()
    assert found.loc["accuracy", ["low", "high"]].tolist() == [-1, 1]
    decision = decided(folder).decisions[0]
    assert {f.outcome for f in decision.results} == {"inconclusive"}
    assert {f.prompts_needed for f in decision.results} == {None}


def test_three_prompts_do_not_show_a_small_rate(tmp_path: Path):
    table = rows(capability=3, prompts=3, items=3)
    table.loc[table["eval"] == "persona", "score"] = [0.05, 0.051, 0.049] * 2
    finding = decided(run(tmp_path, table)).decisions[0].results[4]
    assert (finding.evidence.rule.kind, finding.outcome) == ("at_most", "inconclusive")
    assert finding.evidence.limit > 0.5
