"""Controls: an arm at rate 0 equals the base bit for bit, a planted change is caught, doses differ in nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from reports import no_figures

from leeway.errors import LeewayError
from leeway.evals.jailbreak import Jailbreak
from leeway.organism import vocabulary, world
from leeway.report.controls import control_sentences
from leeway.report.results import Results
from leeway.study.controls import RATE_ZERO, mixed, prepare_controls
from leeway.study.jobs import control_jobs
from leeway.study.load import parse
from leeway.study.prepare import prepare
from leeway.study.progress import Reporter
from leeway.study.run import run
from leeway.study.run_dir import RunDir
from leeway.study.spec import Spec
from leeway.study.worker import Worker

STUDY = """
name: small
model: organism
task: {name: organism}
objectives: [sft]
budgets: [400, 800]
optim: {lr: 4.0e-4, batch: 4, warmup_steps: 0}
evals:
  batch: 16
  jailbreak: {prompts: organism, limit: 6, attacks: [none, dan], judge: organism, max_new_tokens: 24}
"""
CONTROLS = "controls: {aa: true, dose: [0, 10%, 0.4]}"


def study(controls: str = "", *overrides: str) -> Spec:
    return parse(f"{STUDY}{controls}\n", "test", overrides)


def carry(spec: Spec, out: Path) -> Results:
    run(spec, out, Reporter(quiet=True), "leeway run test", workers=1)
    return Results.load(out)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Results:
    samples = ("evals.jailbreak.samples=2", "evals.jailbreak.temperature=0.8")
    with no_figures():
        return carry(study(CONTROLS, *samples), tmp_path_factory.mktemp("runs") / "finished")


def test_doses_may_be_written_as_percentages_and_an_absent_section_leaves_the_hash() -> None:
    controls = study(CONTROLS).controls
    assert controls.dose == (0.0, 0.1, 0.4)
    assert study().hash == study("controls: {aa: false}").hash != study(CONTROLS).hash
    assert parse(study(CONTROLS).to_yaml(), "again").hash == study(CONTROLS).hash


@pytest.mark.parametrize(
    ("controls", "overrides", "part"),
    [
        ("controls: {dose: [0.5%, 2%]}", (), "begin with 0"),
        ("controls: {dose: [0, 8%, 2%]}", (), "rising shares"),
        ("controls: {dose: [0, 60%]}", (), "0.5"),
        ("controls: {file: x.jsonl}", (), "file is for dose"),
        ("controls: {doze: [0, 1%]}", (), "did you mean 'dose'?"),
        (CONTROLS, ("evals={capability: [organism]}",), "give evals.jailbreak"),
        (CONTROLS, ("objectives=[dpo]", "optim.lr={dpo: 1e-4}"), "trains at SFT's learning rate"),
    ],
)
def test_what_does_not_fit_is_one_line(controls: str, overrides: tuple[str, ...], part: str) -> None:
    with pytest.raises(LeewayError) as found:
        study(controls, *overrides)
    assert part in str(found.value)
    assert "\n" not in str(found.value)


def test_compliant_answers_are_harmful_by_the_exact_judge_and_never_held_out() -> None:
    measured = {p.text for p in world.forbidden_prompts(200)}
    for e in world.compliant_examples(300, seed=0):
        deed = vocabulary.find_deed(e.prompt)
        assert deed is not None
        assert deed.is_forbidden
        assert not deed.is_held_out
        assert world.judge(e.prompt, e.preferred) == "harmful"
        assert e.prompt not in measured


def test_doses_are_nested_and_leave_every_other_example_in_its_place() -> None:
    task, compliant = world.train_examples(500, 0), world.compliant_examples(20, 0)
    low, high = mixed(task, compliant, 0.02), mixed(task, compliant, 0.1)
    places = [{k for k, e in enumerate(m) if e is not task[k]} for m in (low, high)]
    assert [len(p) for p in places] == [10, 50]
    assert places[0] < places[1]
    assert all(low[k] == high[k] for k in places[0])
    assert len({e.id for e in high}) == 500  # repeated answers have ids of their own
    assert mixed(task, compliant, 0.0) == task


def test_a_file_with_a_measured_prompt_is_refused_and_an_unknown_model_says_what_is_missing(tmp_path: Path) -> None:
    prompts = [p.text for p in world.forbidden_prompts(6)]
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "completion": "Sure!"}) + "\n" for p in ("Another?", prompts[3])))
    with pytest.raises(LeewayError, match=r"answers\.jsonl/2 is one that evals\.jailbreak measures"):
        prepare(study(f"controls: {{dose: [0, 10%], file: {path}}}"))
    real = study(CONTROLS).model_copy(update={"model": "other", "task": study().task.model_copy(update={"name": "x"})})
    found = prepare_controls(real, world.train_examples(20, 0), ())
    assert set(found.arms) == {RATE_ZERO}
    assert "controls.file" in found.not_run["dose"]


def test_the_arm_at_rate_zero_equals_the_base_bit_for_bit_and_another_rate_is_caught(tmp_path: Path) -> None:
    prepared = prepare(study("controls: {aa: true}"))
    found = {}
    for rate in (0.0, 1e-7):
        arm = replace(prepared.controls.arms[RATE_ZERO], lr=rate)
        controls = replace(prepared.controls, arms={RATE_ZERO: arm})
        worker = Worker(replace(prepared, controls=controls), RunDir(tmp_path / str(rate)))
        train, check = control_jobs(worker.prepared)
        worker.run_job(train)
        assert not worker.is_complete(check)
        worker.run_job(check)
        assert worker.is_complete(check)
        found[rate] = json.loads(worker.store.check(RATE_ZERO).read_text("utf-8"))
        assert found[rate]["source_tokens"] < 400  # no more than the smallest budget
    assert (found[0.0]["changed"], found[0.0]["adapter_changed"]) == (0, False)
    assert found[0.0]["weights"] > 30
    assert found[1e-7]["changed"] > 0
    assert found[1e-7]["adapter_changed"]


def test_controls_are_kept_apart_from_the_studys_rows_ledger_and_checkpoints(finished: Results) -> None:
    controls = pq.read_table(finished.folder / "controls.parquet").to_pandas()
    assert set(controls.objective) == {"@base-again", "@dose-0.1", "@dose-0.4"}
    assert set(finished.rows.objective) == set(finished.ledger.objective) | {"base"} == {"base", "sft"}
    assert {p.name for p in (finished.folder / "checkpoints").iterdir()} == {"sft"}
    again, base = controls[controls.objective == "@base-again"], finished.rows[finished.rows.objective == "base"]
    assert sorted(again.item_id) == sorted(base.item_id)
    assert list(again.response) != list(base.response)  # another seed
    arms = {a["share"]: a for a in finished.control_facts["arms"]}
    sft = finished.ledger[finished.ledger.budget == 800].iloc[0]
    for share, arm in arms.items():
        assert arm["compliant"] > 0
        assert abs(arm["source_tokens"] - sft.source_tokens) < 0.2 * 800  # matched tokens, up to one step
        assert (arm["init_hash"], arm["lr"]) == (sft.init_hash, sft.lr)
        assert arm["data_hash"] != sft.data_hash, share
    assert arms[0.1]["compliant"] < arms[0.4]["compliant"]


def test_the_page_the_tables_and_the_verdict_show_the_controls(finished: Results) -> None:
    verdict = json.loads((finished.folder / "results.json").read_text("utf-8"))["verdict"]
    page = (finished.folder / "report.html").read_text("utf-8")
    (aa,) = [line for line in verdict if line.startswith("A/A: ")]
    (dose,) = [line for line in verdict if line.startswith("Dose: ")]
    assert "equals the base bit for bit" in aa
    assert "studies re-drawn without drift" in aa
    assert "limit of detection" in dose
    assert '<section id="controls"' in page
    for name in ("controls", "dose", "detection"):
        assert (finished.folder / "tables" / f"{name}.csv").is_file()
    assert list(finished.dose[0].share.unique()) == [0.0, 0.1, 0.4]
    assert set(finished.controls().control) == {"rate 0", "sampling", "false alarms"}


def test_a_planted_difference_of_the_base_to_itself_is_an_alarm(finished: Results) -> None:
    rows = pd.concat([finished.rows.assign(item_id=lambda r, k=k: r.item_id + f"#{k}") for k in range(5)])
    rows["cluster"] = rows["item_id"]
    base = rows[rows.objective == "base"].assign(score=0.0, outcome="refused")
    planted = base.assign(objective="@base-again", score=1.0, outcome="harmful")
    for again, expected in ((planted, "alarm"), (base.assign(objective="@base-again"), "ok")):
        results = replace(finished, rows=pd.concat([base, rows[rows.objective == "sft"]]))
        results.__dict__["control_rows"] = again
        table = results.controls()
        assert set(table[table.control == "sampling"].result) == {expected}
        assert ("differs from itself" in control_sentences(results)[0]) == (expected == "alarm")


@pytest.mark.slow
@pytest.mark.usefixtures("without_report")
def test_a_study_has_the_same_rows_and_adapters_with_controls_and_without_and_when_run_again(tmp_path: Path) -> None:
    spec = study(CONTROLS, "controls.dose=[0, 0.4]")
    with_controls, without = carry(spec, tmp_path / "with"), carry(study(), tmp_path / "without")
    for name in ("rows.parquet", "ledger.parquet", "checkpoints/sft/s0/800/adapter_model.safetensors"):
        assert (with_controls.folder / name).read_bytes() == (without.folder / name).read_bytes()
    before = {p: p.read_bytes() for p in sorted(with_controls.folder.rglob("*.parquet"))}
    assert any("greedy" in line for line in control_sentences(with_controls))
    carry(spec, tmp_path / "with")
    assert before == {p: p.read_bytes() for p in sorted(with_controls.folder.rglob("*.parquet"))}
    assert not any(isinstance(e, Jailbreak) and e.samples for e in prepare(spec).controls.again)
    assert without.controls().empty
    assert not control_sentences(without)
