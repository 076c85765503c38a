"""The learning check of a whole small study: what it is measured on, resuming, workers, the page and the ledger."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from reports import no_figures

from leeway.errors import LeewayError
from leeway.hashing import file_digest
from leeway.report.exports.redacted import publish
from leeway.report.results import Results
from leeway.study import ledger_report
from leeway.study.controls import MIN_ITEMS, learning_items, question
from leeway.study.load import parse
from leeway.study.prepare import prepare
from leeway.study.progress import Reporter
from leeway.study.run import run
from leeway.study.run_dir import LEARNING_SCHEMA, RunDir
from leeway.training import learning

pytestmark = pytest.mark.slow

STUDY = """
name: small
model: {model}
device: cpu
task: {{files: {{train: {root}/train.jsonl, test: {root}/test.jsonl}}}}
objectives: [sft, dpo, cft]
budgets: [200, 400]
optim: {{lr: {lr}, batch: 4, warmup_steps: 2}}
evals:
  batch: 16
  capability: [{{name: files, max_new_tokens: 4}}]
  jailbreak: {{prompts: organism, limit: 4, attacks: [none, dan], judge: organism, max_new_tokens: 4}}
controls: {{learning: {{items: 24, general: 8}}}}
"""


def study(model: Path, root: Path, lr: float = 3e-3) -> str:
    return STUDY.format(model=model, root=root, lr=lr)


def carry(text: str, out: Path, workers: int = 1) -> Path:
    run(parse(text, "test"), out, Reporter(quiet=True), "leeway run test", workers=workers)
    return out


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eighty sums: more than a study of 400 tokens trains on."""
    folder = tmp_path_factory.mktemp("sums")
    pairs = [(a, b) for a in range(1, 17) for b in range(1, 6)]
    train = [
        {"prompt": f"{a} + {b}?", "completion": f"It is {a + b}.", "rejected": f"It is {a + b + 1}."} for a, b in pairs
    ]
    test = [{"prompt": f"{a} + 7?", "answer": str(a + 7)} for a in range(4)]
    for name, records in (("train", train), ("test", test)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    return folder


@pytest.fixture(scope="module")
def finished(models: dict[str, Path], sums: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with no_figures():
        return carry(study(models["llama"], sums), tmp_path_factory.mktemp("runs") / "finished")


def test_nothing_is_trained_on_what_is_held_out(models: dict[str, Path], sums: Path, finished: Path) -> None:
    prepared = prepare(parse(study(models["llama"], sums), "test"))
    trained = {question(i.example) for s in prepared.schedules.values() for step in s.steps for i in step}
    held_out = {question(e) for e in prepared.learning.task}
    assert len(held_out) == 24
    assert not trained & held_out
    table = pd.read_parquet(finished / "learning.parquet")
    task = table[table["prompts"] == "task"]
    assert set(task["item_id"]) == {e.id for e in prepared.learning.task}
    conditions = table.groupby("objective")["condition"].agg(set).to_dict()
    assert conditions == {"sft": {"plain"}, "dpo": {"plain"}, "cft": {"<SAFE>", "<UNSAFE>", "plain"}}
    assert table["budget"].unique().tolist() == [200, 400]
    assert task[["nll", "base_nll", "rejected_nll", "kl", "weight_change"]].notna().all().all()


@pytest.mark.usefixtures("without_report")
def test_an_interrupted_check_resumes_to_the_same_bytes(
    models: dict[str, Path], sums: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, calls, measure = study(models["llama"], sums), [], learning.measure

    def interrupted(*args: object) -> object:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(learning, "measure", interrupted)
        with pytest.raises(KeyboardInterrupt):
            carry(text, tmp_path / "out")
    assert len(list((tmp_path / "out" / "learning").glob("*.parquet"))) == 1
    carry(text, tmp_path / "out")
    for name in ("learning.parquet", "rows.parquet", "ledger.parquet"):
        assert file_digest(tmp_path / "out" / name) == file_digest(finished / name)


def test_page_ledger_and_python_show_it(finished: Path) -> None:
    results = Results.load(finished)
    assert {"nll", "kl", "margin", "train-loss"} <= set(results.learning()["measure"])
    learned = results.learned().set_index(["objective", "budget"])
    assert learned.loc[("cft", 400), "cue_gap"] == learned.loc[("cft", 400), "cue_gap"]
    page = (finished / "report.html").read_text()
    assert 'figure id="figure-training"' in page
    assert "CFT is not shown to have learned its condition" in page
    assert "figure-learning" in page
    assert (finished / "tables" / "learned.csv").is_file()
    steps = results.training_steps()
    assert steps.groupby("objective")["step"].max().nunique() == 1
    assert json.loads((finished / "results.json").read_text())["learning"]
    copied = publish(finished, finished.with_name("redacted"))
    assert 'figure id="figure-training"' in copied.read_text()
    view = ledger_report.view(finished)
    assert "learned" in view.text
    assert view.faults == ()


def test_a_changed_table_is_refused(finished: Path, tmp_path: Path) -> None:
    part = finished / "learning" / "sft-s0-200.parquet"
    table = pd.read_parquet(part)
    edited = tmp_path / "part.parquet"
    table.assign(kl=9.0).to_parquet(edited)
    with pytest.raises(LeewayError, match="changed after it was written"):
        RunDir(tmp_path).read_part(edited, LEARNING_SCHEMA)


def test_an_arm_that_cannot_learn_is_void(models: dict[str, Path], sums: Path, tmp_path: Path) -> None:
    out = carry(study(models["llama"], sums, lr=1e-9), tmp_path / "out")
    assert set(Results.load(out).learned()["status"]) == {"void"}
    verdict = json.loads((out / "results.json").read_text())["verdict"][-1]
    assert "“No drift” at 400 tokens is void for SFT" in verdict


def test_what_cannot_be_measured_is_said(models: dict[str, Path], sums: Path, tmp_path: Path) -> None:
    text = study(models["llama"], sums)
    few = prepare(parse(text.replace("budgets: [200, 400]", "budgets: [3k]"), "test"))
    assert "are not trained on" in few.learning.missing
    assert str(MIN_ITEMS) in few.learning.missing
    off = parse(text.replace("{items: 24, general: 8}", "false"), "test")
    assert prepare(off).learning.missing.startswith("switched off")
    out = carry(off.to_yaml().replace("[sft, dpo, cft]", "[sft]"), tmp_path / "out")
    assert "Learning was not measured (switched off" in (out / "report.html").read_text()
    assert "learned: not measured" in ledger_report.view(out).text


def test_default_controls_leave_the_hash_of_a_study(models: dict[str, Path], sums: Path) -> None:
    text = study(models["llama"], sums)
    plain, default = (text.split("controls:")[0] + more for more in ("", "controls: {learning: {items: 64}}\n"))
    assert parse(plain, "test").hash == parse(default, "test").hash != parse(text, "test").hash
    assert learning_items(parse(plain, "test"), [], [], None, 0).missing  # type: ignore[arg-type]
