"""Blind label sheets: what is in them, the draw, labels read back, and rates by objective worked by hand."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import synthetic

from leeway.cli import main
from leeway.errors import LeewayError
from leeway.report.results import Results
from leeway.rescoring.label_calibration import calibrate_judge, calibrate_on_sheet
from leeway.rescoring.label_sheet import COLUMNS, _allocate, escape_formula, make_sheet, read_sheet
from leeway.stats import labels
from leeway.stats.labels import rates_by_group

OUTCOMES = {"base": ["refused"] * 8 + ["harmful"] * 2, "sft": ["refused"] * 4 + ["harmful"] * 5 + ["deflected"]}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Ten direct requests to the base and to sft, each answered differently, with the outcomes of two judges.

    The second judge calls every answer of the base as the first does, and every answer of sft harmful.
    """
    lines = []
    for objective, outcomes in OUTCOMES.items():
        for n, outcome in enumerate(outcomes):
            line = {"objective": objective, "seed": 0, "budget": 0 if objective == "base" else 1000, "sample": 0}
            line |= {"eval": "jailbreak", "attack": "none", "item_id": f"p/{n}", "cluster": f"p/{n}"}
            line |= {"prompt": f"=question {n}?", "response": f"{'+' * (n % 2)}answer {n} of {objective[0]}"}
            line |= {"unscored_reason": None, "template_hash": synthetic.PLAIN, "adapter_hash": "", "new_tokens": 1}
            for judge in ("first", "second"):
                own = "harmful" if judge == "second" and objective == "sft" else outcome
                lines.append(
                    line | {"judge": judge, "judge_raw": own, "outcome": own, "score": float(own == "harmful")}
                )
    synthetic.write(tmp_path / "run", pd.DataFrame(lines), organism=False)
    path = tmp_path / "run" / "manifest.json"
    judges = {"jailbreak": {"name": "first", "hash": "f"}, "jailbreak@second": {"name": "second", "hash": "s"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"judges": judges}))
    return tmp_path / "run"


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def fill(path: Path, label: Callable[[dict[str, str]], str]) -> Path:
    lines = read(path)
    out = path.with_name("filled.csv")
    with out.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows([line | {"label": label(line)} for line in lines])
    return out


def test_a_sheet_is_blind(run: Path) -> None:
    sheet = make_sheet(run, n=12)
    lines = read(sheet.path)
    assert tuple(lines[0]) == COLUMNS
    assert {line["label"] for line in lines} == {""}
    for word in ("base", "sft", "1000", "first", "second", "refused", "harmful", "deflected", synthetic.PLAIN):
        assert word not in sheet.text
    assert len({line["answer_id"] for line in lines}) == 12
    assert [line["answer_id"][-4:] for line in lines] == [f"{k:04d}" for k in range(1, 13)]
    drawn = [sheet.key["answers"][line["answer_id"]][0]["objective"] for line in lines]
    assert drawn != sorted(drawn)  # the order tells nothing


def test_every_stratum_is_represented(run: Path) -> None:
    sheet = make_sheet(run, n=5)
    strata = [(s["objective"], s["outcome"], s["answers"], s["drawn"]) for s in sheet.key["strata"]]
    assert strata == [
        ("base", "harmful", 2, 1),
        ("base", "refused", 8, 1),
        ("sft", "deflected", 1, 1),
        ("sft", "harmful", 5, 1),
        ("sft", "refused", 4, 1),
    ]
    rows = Results.load(run).rows
    for drawn in sheet.key["answers"].values():
        for row in drawn:
            stratum = sheet.key["strata"][row["stratum"]]
            own = rows[
                (rows.objective == row["objective"]) & (rows.item_id == row["item_id"]) & (rows.judge == "first")
            ]
            assert (stratum["objective"], stratum["outcome"]) == (row["objective"], own.outcome.item())
    with pytest.raises(LeewayError, match=r"--n 4 is less than the 5 strata .* of jailbreak; give 5 or more"):
        make_sheet(run, n=4)


def test_allocation() -> None:
    assert _allocate([100, 1, 4], 10) == [7, 1, 2]
    assert _allocate([100, 25], 15) == [10, 5]
    assert _allocate([2, 3], 50) == [2, 3]  # all there are


def test_each_answer_of_a_stratum_is_equally_likely(run: Path) -> None:
    counts: Counter[str] = Counter()
    for seed in range(200):
        sheet = make_sheet(run, n=5, seed=seed)
        rows = [row for drawn in sheet.key["answers"].values() for row in drawn]
        counts.update(r["item_id"] for r in rows if sheet.key["strata"][r["stratum"]]["answers"] == 8)
    assert len(counts) == 8
    assert all(8 <= n <= 45 for n in counts.values())  # 25 expected, ± four standard deviations


def test_the_same_arguments_give_the_same_bytes(run: Path, tmp_path: Path) -> None:
    one, two = make_sheet(run, n=9, seed=3), make_sheet(run, n=9, seed=3, out=tmp_path / "b.csv")
    assert one.path.read_bytes() == two.path.read_bytes()
    assert make_sheet(run, n=9, seed=4).name != one.name
    fill(one.path, lambda _: "refused").replace(one.path)
    with pytest.raises(LeewayError, match="exists, and may hold labels"):
        make_sheet(run, n=9, seed=3)


@pytest.mark.parametrize("cell", ["=1+1", "+1", "-1", "@SUM(A1)", " =1", "\t=1", "\r=1", "\n=1", "＝1"])
def test_formulas_are_inert(cell: str) -> None:
    assert escape_formula(cell) == "'" + cell


@pytest.mark.parametrize("cell", ["", "a=1", "1-1", "'=1", " text"])
def test_other_cells_stay(cell: str) -> None:
    assert escape_formula(cell) == cell


def test_formulas_of_a_run_are_inert(run: Path) -> None:
    for line in read(make_sheet(run, n=20).path):
        assert line["prompt"].startswith("'=question")
        assert not line["response"].startswith("+")


def test_equal_answers_share_a_line(run: Path) -> None:
    rows = Results.load(run).rows
    rows["response"] = "No."
    rows.to_parquet(run / "rows.parquet")
    path = run / "manifest.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "file_hashes"}))
    sheet = make_sheet(run)
    assert len(read(sheet.path)) == 10
    assert "10 lines for 20 answers of 5 strata" in sheet.summary


def truth(line: dict[str, str]) -> str:
    """A person's labels: items 0 to 4 of both models are refused, the others are harmful."""
    return "harmful" if int(line["prompt_id"].rpartition("/")[2]) >= 5 else "refused"


def test_rates_by_hand(run: Path) -> None:
    """All 20 answers are labelled, so all weights are 1.

    The base has 5 harmful answers (5 to 9), of which the first judge finds 8 and 9: sensitivity 2/5, specificity 5/5.
    Of sft's 5 it finds 5 to 8 of its 4 to 8: sensitivity 4/5, specificity 4/5.
    """
    path = fill(make_sheet(run).path, truth)
    found = calibrate_on_sheet(path, run, by="objective")
    table = found.table.set_index(["judge", "positive", "group"])
    own = table.loc[("first", "harmful")]
    assert own.loc["base", ["n", "agreement", "sensitivity", "specificity"]].tolist() == pytest.approx(
        [10, 0.7, 0.4, 1]
    )
    assert own.loc["sft", ["n", "agreement", "sensitivity", "specificity"]].tolist() == pytest.approx(
        [10, 0.8, 0.8, 0.8]
    )
    assert own.iloc[0][["n", "agreement"]].tolist() == pytest.approx([20, 0.75])
    second = table.loc[("second", "harmful", "sft")]
    assert second["agreement"] == pytest.approx(0.5)
    assert (found.primary, found.labelled, found.unlabelled, found.missing_strata) == ("first", 20, 0, 0)
    assert "inverse of their sampling probability" in found.to_text()


def test_only_the_primary_judges_classes_have_known_sizes(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = list[bool]()

    def recorded(sample: labels.LabelledSample) -> pd.DataFrame:
        samples.append(sample.known_sizes)
        return rates_by_group(sample)

    monkeypatch.setattr(labels, "rates_by_group", recorded)
    calibrate_on_sheet(fill(make_sheet(run).path, truth), run)
    assert samples == [True, True, False, False]  # two labels of each judge


def test_thoughts_are_neither_shown_nor_compared(run: Path) -> None:
    """People label final answers; the judges' verdicts on rows with a thought are found all the same."""
    rows = pd.read_parquet(run / "rows.parquet")
    rows["response"] = "<think>\nwell\n</think>\n\n" + rows["response"]
    rows.to_parquet(run / "rows.parquet")
    path = run / "manifest.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "file_hashes"}))
    sheet = make_sheet(run)
    assert "think" not in sheet.text
    found = calibrate_on_sheet(fill(sheet.path, truth), run, "first", "objective")
    assert found.table["unscored"].tolist() == [0] * len(found.table)
    assert found.table["agreement"].iloc[0] == pytest.approx(0.75)


def test_weights_by_hand(run: Path) -> None:
    """With one label per stratum an answer counts as its whole stratum; a stratum without a label is not covered."""
    sheet = make_sheet(run, n=5)
    rows = {a: drawn[0] for a, drawn in sheet.key["answers"].items()}

    def label(line: dict[str, str]) -> str:
        stratum = sheet.key["strata"][rows[line["answer_id"]]["stratum"]]
        return "" if stratum["outcome"] == "deflected" else "harmful" if stratum["answers"] in (2, 4) else "refused"

    found = calibrate_on_sheet(fill(sheet.path, label), run, "first", "objective")
    own = found.table[found.table["positive"] == "harmful"].set_index("group")
    assert own.loc["base", "agreement"] == 1
    assert own.loc["sft", "agreement"] == 0  # 5 called harmful are not, 4 called refused are
    assert own["agreement"].iloc[0] == pytest.approx(10 / 19)  # of 2 + 8 and 5 + 4 answers
    assert own["sensitivity"].iloc[0] == pytest.approx(2 / 6)
    assert (found.unlabelled, found.missing_strata) == (1, 1)
    assert "1 strata have none" in found.to_text()


def test_a_differing_error_is_a_warning(tmp_path: Path, run: Path) -> None:
    """Hundreds of answers: the judge misses half of what sft does and nothing of the base's."""
    rows = Results.load(run).rows
    first = rows[rows["judge"] == "first"]
    many = [
        first.assign(item_id=item, cluster=item, response=first["response"] + f" {k}")
        for k in range(20)
        for item in [first["item_id"] + f"-{k}/{k}"]
    ]
    table = pd.concat(many, ignore_index=True)
    table["outcome"] = ["harmful" if k % 2 else "refused" for k in range(len(table))]
    synthetic.write(tmp_path / "many", table, organism=False)
    manifest = json.loads((run / "manifest.json").read_text())
    (tmp_path / "many" / "manifest.json").write_text(json.dumps(manifest | {"file_hashes": {}}))
    sheet = make_sheet(tmp_path / "many", n=400)
    objective = {a: rows[0]["objective"] for a, rows in sheet.key["answers"].items()}
    strata = {a: sheet.key["strata"][rows[0]["stratum"]]["outcome"] for a, rows in sheet.key["answers"].items()}

    def label(line: dict[str, str]) -> str:
        return "harmful" if objective[line["answer_id"]] == "sft" else strata[line["answer_id"]]

    found = calibrate_on_sheet(fill(sheet.path, label), tmp_path / "many", "first", "objective")
    assert any(
        re.match(r"first: sensitivity for harmful is 0\.50 for sft and 1\.00 for the others", w) for w in found.warnings
    )
    assert "warning: first" in found.to_text()


@pytest.mark.parametrize(
    ("label", "fault"),
    [
        ("refusal", r"row 2: label is 'refusal'; one of: refused, harmful, deflected, incoherent, or leave it empty"),
        ("", "no answer has a label; fill in its column label"),
    ],
)
def test_bad_labels(run: Path, label: str, fault: str) -> None:
    path = fill(make_sheet(run).path, lambda _: label)
    with pytest.raises(LeewayError, match=fault):
        read_sheet(path, run)


def test_labels_are_read_in_any_case(run: Path) -> None:
    path = fill(make_sheet(run).path, lambda line: f" {truth(line).upper()} ")
    assert set(read_sheet(path, run).labels.values()) == {"refused", "harmful"}


def test_ids_that_are_not_the_sheets(run: Path, tmp_path: Path) -> None:
    path = fill(make_sheet(run).path, truth)
    text = path.read_text("utf-8")
    first = re.search(r"s\w{7}-0001", text)
    assert first
    path.write_text(text.replace(first[0], first[0][:-4] + "0002"), "utf-8")
    with pytest.raises(LeewayError, match=r"row 3: answer_id '.*-0002' is given twice"):
        read_sheet(path, run)
    path.write_text(text.replace(first[0], first[0][:-4] + "9999"), "utf-8")
    with pytest.raises(LeewayError, match=r"row 2: answer_id '.*-9999' is not of sheet"):
        read_sheet(path, run)
    path.write_text(text, "utf-8")
    with pytest.raises(LeewayError, match="has no key of sheet"):
        read_sheet(path, tmp_path)


def test_a_run_that_changed_since(run: Path) -> None:
    path = fill(make_sheet(run).path, truth)
    rows = pd.read_parquet(run / "rows.parquet")
    rows.assign(response=rows["response"] + "!").to_parquet(run / "rows.parquet")
    manifest = run / "manifest.json"
    manifest.write_text(json.dumps({k: v for k, v in json.loads(manifest.read_text()).items() if k != "file_hashes"}))
    with pytest.raises(LeewayError, match="is not the labelled one; draw a new sheet"):
        calibrate_on_sheet(path, run)


def test_commands(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def leeway(*args: object) -> str:
        monkeypatch.setattr(sys, "argv", ["leeway", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            main()
        found = capsys.readouterr()
        assert ended.value.code == 0, found.err
        return found.out

    path = Path(leeway("judge", "sheet", run, "--n", 20, "--out", tmp_path / "sheet.csv").strip())
    filled = fill(path, truth)
    options = ["--on", filled, "--run", run, "--by", "objective", "--out", tmp_path / "judges"]
    text = leeway("judge", "calibrate", *options)
    assert re.search(r"^second +sft +10 +0 +0\.500", text, re.M)
    assert "first" in text
    saved = json.loads(Path(text.splitlines()[-1]).read_text())
    assert {line["judge"] for line in saved["rates"]} == {"first", "second"}
    now = leeway("judge", "calibrate", "keywords", *options)  # not a judge of the run: it scores the answers now
    assert re.search(r"^keywords +base +10", now, re.M)


def test_options_that_do_not_fit(run: Path, tmp_path: Path) -> None:
    path = fill(make_sheet(run).path, truth)
    none = (None, None, "OPENAI_API_KEY")
    for judge, on, where, by, fault in [
        (None, "xstest", None, None, "no judge given"),
        ("keywords", str(path), None, None, "a label sheet needs the run that it was drawn from; give --run"),
        ("keywords", "xstest", None, "objective", "--by objective needs the run that it was drawn from"),
        (None, "xstest", run, None, "--on xstest: not a label sheet"),
    ]:
        with pytest.raises(LeewayError, match=fault):
            calibrate_judge(judge, on, where, by, none, tmp_path)
    with pytest.raises(LeewayError, match="--partial: a label sheet has no partial refusals"):
        calibrate_judge(None, str(path), run, None, none, tmp_path, partial=True)
