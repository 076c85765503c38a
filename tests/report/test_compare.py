"""Comparison of studies: what is left out, paired differences, meta-analysis, pooled seeds."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import synthetic

from leeway import yaml_config
from leeway.cli import main
from leeway.errors import LeewayError
from leeway.report.compare.compare import StudyComparison, compare, page, write
from leeway.report.compare.effects import _covariance, error
from leeway.report.results import Results

pytestmark = pytest.mark.slow

SIZE: dict[str, Any] = {"capability": 40, "prompts": 40, "items": 18, "attacks": ("none", "dan", "role_play")}
BUDGETS = (25_000, 100_000)


def study(folder: Path, name: str, *, draw: int = 7, table: pd.DataFrame | None = None, **change: Any) -> Path:
    """Write a synthetic run with a name; `change` sets dotted keys of its manifest (a value of None takes one out)."""
    rows = synthetic.rows(("sft", "kl"), BUDGETS, seed=draw, **SIZE) if table is None else table
    synthetic.write(folder / name, rows)
    manifest = json.loads((folder / name / "manifest.json").read_text())
    for key, value in change.items():
        *path, last = key.split("__")
        inner = manifest
        for step in path:
            inner = inner.setdefault(step, {})
        inner[last] = value
    (folder / name / "manifest.json").write_text(json.dumps(manifest))
    settings = yaml_config.load((folder / name / "study.yaml").read_text()) | {"name": name}
    (folder / name / "study.yaml").write_text(yaml_config.dump(settings))
    return folder / name


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> tuple[StudyComparison, Path, list[Path]]:
    """Three studies of the same items; the last on another base model."""
    folder = tmp_path_factory.mktemp("studies")
    runs = [study(folder, n, draw=k) for k, n in enumerate(("one", "two"))]
    other = {"name": "other/Base-2B", "hash": "bb66"}
    runs.append(study(folder, "three", draw=2, model=other, organism=False))
    found = compare(runs)
    write(found, folder / "out")
    return found, folder / "out", runs


# what is written


def test_comparison_is_complete_and_deterministic(three: tuple[StudyComparison, Path, list[Path]], tmp_path: Path):
    _, out, runs = three
    names = {p.name for p in out.iterdir()}
    assert {"compare.json", "compare.html", "compare.md", "compare-meta.csv", "compare-differences.csv"} <= names
    assert {"compare-accuracy.svg", "compare-asr.png", "compare-endorsement.pdf"} <= names
    write(compare(runs), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {p.name: p.read_bytes() for p in out.iterdir()}


def test_page_is_self_contained_and_lists_differences(three: tuple[StudyComparison, Path, list[Path]]):
    text = (three[1] / "compare.html").read_text("utf-8")
    assert "<script" not in text
    assert not re.search(r'(?:src|href)="(?!#)', text)
    assert "other/Base-2B" in text
    assert "No evidence about real models" in text
    assert ">nan<" not in text.lower()
    assert ">None<" not in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))


def test_compare_json_is_strict_and_complete(three: tuple[StudyComparison, Path, list[Path]]):
    found = json.loads((three[1] / "compare.json").read_text("utf-8"))
    assert [s["name"] for s in found["studies"]] == ["one", "two", "three"]
    assert [s["organism"] for s in found["studies"]] == [True, True, False]
    assert len(found["meta"]) == len(pd.read_csv(three[1] / "compare-meta.csv")) == 2 * 2 * 3
    assert set(found["columns"]) == {"effects", "differences", "meta", "items", "settings"}
    assert {"run.model.name", "run.model.hash"} <= {d["what"] for d in found["settings"]}


def test_effects_equal_the_studies_contrasts(three: tuple[StudyComparison, Path, list[Path]]):
    found, _, runs = three
    own = Results.load(runs[1]).contrasts()
    mine = found.tables["effects"]
    key = ["objective", "budget", "condition", "measure"]
    both = mine[mine["study"] == "two"].merge(own, on=key)
    assert len(both) == 12
    for column in ("difference", "low", "high", "p_holm"):
        assert np.allclose(both[f"{column}_x"], both[f"{column}_y"])


# laws of the numbers


def test_paired_difference_equals_difference_of_effects(
    three: tuple[StudyComparison, Path, list[Path]],
):
    table = three[0].tables["differences"]
    accuracy = table[table["measure"] == "accuracy"]
    assert len(accuracy) == 2 * 2 * 3
    assert (accuracy["n_shared"] == SIZE["capability"]).all()
    assert np.allclose(accuracy["difference"], accuracy["effect_a"] - accuracy["effect_b"])
    assert (table["low"] <= table["difference"]).all()
    assert (table["difference"] <= table["high"]).all()
    assert ((table["p"] <= 0.05) == ((table["low"] > 0) | (table["high"] < 0))).mean() > 0.95


def test_mean_is_between_the_studies(three: tuple[StudyComparison, Path, list[Path]]):
    effects, over = three[0].tables["effects"], three[0].tables["meta"]
    spans = effects.groupby(["objective", "budget", "condition", "measure"])["difference"].agg(["min", "max"])
    both = over.set_index(["objective", "budget", "condition", "measure"]).join(spans)
    assert (both["min"] - 1e-9 <= both["estimate"]).all()
    assert (both["estimate"] <= both["max"] + 1e-9).all()
    assert (over["studies"] == 3).all()
    assert over["note"].str.contains("fewer than five").all()
    assert over["predict_low"].notna().all()


def renamed(runs: Path, name: str, seed: int) -> Path:
    """Copy a run under another name and training seed."""
    copy = runs.parent / name
    shutil.copytree(runs, copy)
    rows = pd.read_parquet(copy / "rows.parquet")
    rows["seed"] = rows["seed"].where(rows["objective"] == "base", seed)
    rows.to_parquet(copy / "rows.parquet")
    ledger = pd.read_parquet(copy / "ledger.parquet").assign(seed=seed)
    ledger.to_parquet(copy / "ledger.parquet")
    settings = yaml_config.load((copy / "study.yaml").read_text()) | {"name": name, "seeds": [seed]}
    (copy / "study.yaml").write_text(yaml_config.dump(settings))
    return copy


def test_study_compared_with_its_copy(tmp_path: Path):
    one = study(tmp_path, "one")
    found = compare([one, renamed(one, "again", 1)])
    between, over = found.tables["differences"], found.tables["meta"]
    assert (between["difference"] == 0).all()
    assert (between["p"] == 1).all()
    own = found.tables["effects"]
    own = own[own["study"] == "one"].set_index(["objective", "budget", "measure"])
    for _, line in over.iterrows():
        alone = own.loc[(line["objective"], line["budget"], line["measure"])]
        assert line["estimate"] == pytest.approx(alone["difference"])
        assert line["tau2"] == 0
        if alone["n_discordant"] > 5:  # the copy's errors are the study's own: no more is known than from one
            assert line["correlation"] == pytest.approx(1)
            assert line["se"] == pytest.approx(alone["se"], rel=1e-6)
    assert over["note"].str.contains("two studies").all()
    assert any("12.7 standard errors" in s for s in found.sentences)


def test_pooling_a_copy_changes_no_estimate(tmp_path: Path):
    one = study(tmp_path, "one")
    found = compare([one, renamed(one, "again", 1)], pooling=True)
    key = ["objective", "budget", "condition", "measure"]
    both = found.tables["contrasts"].merge(Results.load(one).contrasts(), on=key)
    assert np.allclose(both["difference_x"], both["difference_y"], equal_nan=True)
    assert np.allclose(both["low_x"], both["low_y"], equal_nan=True)  # a prompt is one cluster over both seeds
    assert (both["n_x"] == 2 * both["n_y"]).all()
    assert set(found.tables["contrasts"]["seeds"]) == {"0, 1"}
    assert found.kind == "pooled"
    assert "CI with seeds" in page(found, [])


def test_errors_add_without_shared_items(tmp_path: Path):
    other = synthetic.rows(("sft", "kl"), BUDGETS, seed=3, **SIZE)
    other["prompt"] = "elsewhere: " + other["prompt"]
    found = compare([study(tmp_path, "one"), study(tmp_path, "two", table=other)])
    assert (found.tables["items"]["shared"] == 0).all()
    effects = found.tables["effects"].set_index(["study", "objective", "budget", "measure"])
    line = found.tables["differences"].iloc[0]
    where = (line["objective"], line["budget"], line["measure"])
    a, b = effects.loc[("one", *where)], effects.loc[("two", *where)]
    se = math.hypot(error(a), error(b))
    assert line["se"] == pytest.approx(se)
    assert line["difference"] == pytest.approx(a["difference"] - b["difference"])
    assert line["high"] - line["difference"] == pytest.approx(1.959964 * se)
    assert "no shared item" in line["note"]
    assert (found.tables["meta"]["correlation"] == 0).all()


def test_covariance_by_hand():
    # pulls beyond the mean: (+½, −½)/2 and the same for the shared prompts p, q; the other study's r is its own
    one = pd.DataFrame({"cluster": ["p", "q"], "stratum": "all", "delta": [1.0, 0.0]})
    other = pd.DataFrame({"cluster": ["p", "r"], "stratum": "all", "delta": [1.0, 0.0]})
    found = _covariance([0.2, 0.1], [9, 9], [one, other])
    assert found[0, 0] == pytest.approx(0.04)
    assert found[0, 1] == pytest.approx(0.5 * 0.2 * 0.1)  # ¼·¼ over √(⅛·⅛)
    assert _covariance([0.2, 0.1], [9, 3], [one, other])[0, 1] == 0


def test_error_of_few_discordant_prompts_is_the_bound():
    still = pd.Series({"se": float("nan"), "low": -0.1, "high": 0.1, "n_discordant": 0})
    assert error(still) == pytest.approx(0.2 / (2 * 1.959964))
    assert error(pd.Series({"se": 0.01, "low": -0.1, "high": 0.1, "n_discordant": 2})) == error(still)
    assert error(pd.Series({"se": 0.01, "low": -0.1, "high": 0.1, "n_discordant": 50})) == 0.01


# what must not be compared, or pooled


def test_repeated_studies_are_rejected(tmp_path: Path):
    one = study(tmp_path, "one")
    with pytest.raises(LeewayError, match="given twice"):
        compare([one, one])
    with pytest.raises(LeewayError, match="hold the same run"):
        compare([one, shutil.copytree(one, tmp_path / "copy")])
    with pytest.raises(LeewayError, match="two or more runs"):
        compare([one])


def test_different_budget_units_are_rejected(tmp_path: Path):
    runs = [study(tmp_path, "one"), study(tmp_path, "two", draw=1, matching={"count": "processed", "starts": {}})]
    with pytest.raises(LeewayError, match=r"count different things.*two: processed tokens"):
        compare(runs)


def test_attack_with_different_texts_is_left_out(tmp_path: Path):
    runs = [study(tmp_path, "one"), study(tmp_path, "two", draw=1, attacks__dan__hash="other")]
    found = compare(runs)
    assert [(d["what"], d["effect"]) for d in found.checked.left_out] == [
        ("attack dan", "left out: same name, different texts")
    ]
    attacks = {a for s in found.checked.studies for a in s.results.rows["attack"].unique()}
    assert attacks == {"", "none", "role_play"}
    assert "Left out: <bdi>attack dan</bdi>" in page(found, [])
    with pytest.raises(LeewayError, match=r"run\.attacks\.dan\.hash: dan-hash and other"):
        compare(runs, pooling=True)


def test_attack_of_one_study_is_left_out(tmp_path: Path):
    fewer = synthetic.rows(("sft", "kl"), BUDGETS, seed=1, **SIZE | {"attacks": ("none", "dan")})
    found = compare([study(tmp_path, "one"), study(tmp_path, "two", table=fewer)])
    assert [d["what"] for d in found.checked.left_out] == ["attack role_play"]
    counts = found.tables["effects"][found.tables["effects"]["measure"] == "asr"]["n"]
    assert counts.max() == SIZE["prompts"]


def test_axis_with_different_judges_is_left_out(tmp_path: Path):
    judge = {"name": "rubric", "hash": "ffff"}
    found = compare([study(tmp_path, "one"), study(tmp_path, "two", draw=1, judges={"jailbreak": judge})])
    assert [d["what"] for d in found.checked.left_out] == ["axis jailbreak"]
    assert set(found.tables["effects"]["measure"]) == {"accuracy", "endorsement"}


def test_objective_with_different_settings_is_left_out(tmp_path: Path):
    kinds = [{"sft": {"kind": "sft"}, "kl": {"kind": "kl", "weight": w}} for w in (0.001, 0.1)]
    runs = [study(tmp_path, n, draw=k, objectives=kinds[k]) for k, n in enumerate(("one", "two"))]
    found = compare(runs)
    assert [d["what"] for d in found.checked.left_out] == ["objective kl"]
    assert set(found.tables["effects"]["objective"]) == {"sft"}


def test_studies_without_shared_budget_are_rejected(tmp_path: Path):
    other = synthetic.rows(("sft", "kl"), (50_000,), seed=1, **SIZE)
    with pytest.raises(LeewayError, match="no objective was measured at the same budget"):
        compare([study(tmp_path, "one"), study(tmp_path, "two", table=other)])


def test_pooling_rejects_any_difference_but_seeds(tmp_path: Path):
    one = study(tmp_path, "one")
    with pytest.raises(LeewayError, match="both hold kl with seed 0"):
        compare([one, study(tmp_path, "two", draw=1)], pooling=True)
    other = synthetic.rows(("sft", "kl"), BUDGETS, seeds=(1,), seed=1, **SIZE)
    with pytest.raises(LeewayError, match=r"responses of the base differ"):
        compare([one, study(tmp_path, "three", table=other)], pooling=True)
    again = renamed(one, "again", 1)
    manifest = json.loads((again / "manifest.json").read_text())
    manifest["model"]["hash"] = "another"
    (again / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(LeewayError, match=r"more than their seeds \(run\.model\.hash: aa55aa55 and another\)"):
        compare([one, again], pooling=True)


def test_equal_names_become_unique(tmp_path: Path):
    runs = [study(tmp_path / side, "demo", draw=k) for k, side in enumerate("ab")]
    assert [s.name for s in compare(runs).studies] == ["demo (demo) 1", "demo (demo) 2"]


# the command


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["leeway", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_compare_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    runs = [str(study(tmp_path, n, draw=k)) for k, n in enumerate(("one", "two"))]
    out = tmp_path / "out"
    out.mkdir()
    (out / "compare-old.csv").write_text("stale")
    (out / "mine.csv").write_text("kept")
    assert run(monkeypatch, "compare", *runs, "--out", str(out)) == 0
    assert capsys.readouterr().out.strip().endswith("compare.html")
    assert not (out / "compare-old.csv").exists()
    assert (out / "mine.csv").exists()
    assert run(monkeypatch, "compare", runs[0], runs[0], "--out", str(out)) == 2
    assert "given twice" in capsys.readouterr().err
