from pathlib import Path

import pandas as pd
import pytest
import synthetic

from leeway.errors import LeewayError
from leeway.report import ReportError, Results

TINY = {"budgets": (25_000,), "capability": 8, "prompts": 8, "items": 6}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return synthetic.write(tmp_path / "run", synthetic.rows(("sft", "cft"), **TINY))


def test_load(run: Path):
    results = Results.load(run)
    assert len(results.rows) == 4 * (8 + 48 + 6)
    assert set(results.ledger["objective"]) == {"sft", "cft"}
    assert results.conditions == synthetic.CONDITIONS
    assert results.seeds == [0]
    rates, contrasts = results.rates(), results.contrasts()
    assert set(rates["measure"]) >= {"accuracy", "asr", "asr:none", "endorsement", "refusal", "coherence"}
    cft = contrasts[contrasts["objective"] == "cft"]
    assert set(cft["condition"]) == {"<SAFE>"}
    assert (cft["n_unpaired"] == 0).all()
    assert results.frontier()["on_frontier"].any()
    contrasts["p"] = 0.0  # a reader's own copy
    assert (results.contrasts()["p"] > 0).any()


def test_other_references_and_margins(run: Path):
    results = Results.load(run)
    against = results.contrasts(("sft", None))
    assert set(against["objective"]) == {"cft"}
    tested = against[against["difference"].notna()]  # three statements a half: the trait is withheld
    assert tested["note"].str.contains("each under its own test prompt: <SAFE> against plain").all()
    assert against.loc[~against.index.isin(tested.index), "measure"].isin(["trait", "acquiescence"]).all()
    assert set(results.contrasts(("sft", 25_000))["objective"]) == {"cft"}
    table = results.equivalence({"asr": 0.9, "accuracy": 0.05})
    assert table.set_index(["objective", "measure"])["equivalent"].to_dict() == {
        ("cft", "accuracy"): False,
        ("cft", "asr"): True,
        ("sft", "accuracy"): False,
        ("sft", "asr"): True,
    }
    assert set(results.one_sided({"asr": 0.5})["worse"]) == {"higher"}
    with pytest.raises(ReportError, match="no measure asrr"):
        results.equivalence({"asrr": 0.1})


def test_first_conditions_come_from_the_manifest(run: Path):
    results = Results.load(run)
    assert results.contrasts()["first"].all()  # each measured under one condition: no doubt
    results = Results.load(run)
    results.manifest["first_conditions"] = {"cft": "plain", "sft": "plain"}
    expected = results.contrasts().groupby("objective")["first"].first()
    assert expected.to_dict() == {"cft": False, "sft": True}


def test_row_order_does_not_matter(run: Path):
    before = Results.load(run)
    rows = before.rows.sample(frac=1, random_state=1)
    rows.to_parquet(run / "rows.parquet")
    after = Results.load(run)
    pd.testing.assert_frame_equal(before.contrasts(), after.contrasts())
    pd.testing.assert_frame_equal(before.rates(), after.rates())


def spoil(run: Path, how: str) -> Path:
    rows = run / "rows.parquet"
    if how == "nowhere":
        return run / "nothing"
    if how == "no rows":
        rows.unlink()
    elif how == "broken rows":
        rows.write_bytes(b"PAR1 not really")
    elif how == "foreign rows":
        pd.DataFrame({"a": [1]}).to_parquet(rows)
    elif how == "empty rows":
        pd.read_parquet(rows).iloc[:0].to_parquet(rows)
    elif how == "no base":
        table = pd.read_parquet(rows)
        table[table["objective"] != "base"].to_parquet(rows)
    elif how == "no ledger":
        (run / "ledger.parquet").unlink()
    elif how == "broken manifest":
        (run / "manifest.json").write_text("{", encoding="utf-8")
    elif how == "broken study":
        (run / "study.yaml").write_text("a: [", encoding="utf-8")
    return run


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("nowhere", "is not a directory"),
        ("no rows", "has no rows.parquet"),
        ("broken rows", "cannot be read as Parquet"),
        ("foreign rows", "lacks the columns objective, seed"),
        ("empty rows", "holds no rows"),
        ("no base", "no rows of the base model"),
        ("no ledger", "has no ledger.parquet"),
        ("broken manifest", "is not valid JSON"),
        ("broken study", "is not readable YAML"),
    ],
)
def test_broken_runs_are_rejected_in_one_line(run: Path, how: str, words: str):
    with pytest.raises(ReportError, match=words) as caught:
        Results.load(spoil(run, how))
    assert isinstance(caught.value, LeewayError)
    assert "\n" not in str(caught.value)
    assert caught.value.fix


def test_rows_of_two_runs_are_rejected(run: Path):
    table = pd.read_parquet(run / "rows.parquet")
    pd.concat([table, table]).to_parquet(run / "rows.parquet")
    with pytest.raises(ReportError, match="rows of two runs were pooled"):
        Results.load(run).contrasts()


def test_rows_as_a_dataset_have_types_and_hide_forbidden_texts_on_request(tmp_path: Path) -> None:
    rows = synthetic.rows(("sft",), (25_000,), capability=10, prompts=10, items=10)
    results = Results.load(synthetic.write(tmp_path / "run", rows))
    whole, redacted = results.dataset(), results.dataset(redacted=True)
    assert len(whole) == len(redacted) == len(rows)
    assert {name: whole.features[name].dtype for name in ("objective", "seed", "score", "new_tokens", "outcome")} == {
        "objective": "string",
        "seed": "int64",
        "score": "float64",
        "new_tokens": "int64",
        "outcome": "string",
    }
    assert redacted.features == whole.features
    unscored = rows["score"].isna().to_numpy()
    assert [s is None for s in whole["score"]] == list(unscored)
    assert list(whole["response"]) == list(rows["response"])
    attacked = rows.query("eval == 'jailbreak'")
    forbidden = {*attacked["prompt"], *attacked["response"]}
    assert forbidden.isdisjoint([*redacted["prompt"], *redacted["response"]])
    assert list(redacted["outcome"]) == list(whole["outcome"])
    sums = [p for p, e in zip(redacted["prompt"], redacted["eval"], strict=True) if e == "capability"]
    assert sums == list(rows.query("eval == 'capability'")["prompt"])
    bare = results.dataset(redacted=True, no_prompts=True)
    assert all(p.startswith("[prompt ") for p in bare["prompt"])
