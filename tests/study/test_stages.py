"""What a study may vary: where trajectories start, how budgets count, rates and their decay; and how it is shown."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd
import pytest
from test_study import carry, contents
from typer.testing import CliRunner

from leeway.cli import app
from leeway.data.ledger import COST, DATA, MATCHED, Matching, differences
from leeway.errors import LeewayError
from leeway.io import with_checksum
from leeway.plan.plan import plan
from leeway.study import ledger_report
from leeway.study.jobs import jobs_of
from leeway.study.ledger_report import view
from leeway.study.load import parse
from leeway.study.prepare import prepare
from leeway.study.run_dir import RunDir
from leeway.training.trajectory import Trial, choose_learning_rate

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("without_report")]

STUDY = """
name: stages
model: {model}
device: cpu
task: {{files: {{train: {root}/train.jsonl, test: {root}/test.jsonl}}}}
objectives: {objectives}
budgets: [300, 600]
optim: {{lr: 3.0e-3, batch: 4, warmup_steps: 2}}
evals: {{batch: 16, conditions: first, capability: [{{name: files, max_new_tokens: 4}}]}}
"""
STAGED = "[sft, {dpo-on-sft: {dpo: {}, start: {from: sft, budget: 300}, reference: REF}}, {kl: {weight: 0.1}}]"


def text(models: dict[str, Path], root: Path, objectives: str) -> str:
    return STUDY.format(model=models["llama"], root=root, objectives=objectives)


def ledger(out: Path) -> pd.DataFrame:
    return pd.read_parquet(out / "ledger.parquet").set_index(["objective", "budget"])


@pytest.mark.parametrize("reference", ["start", "base"])
def test_dpo_starts_from_sft_with_it_as_reference(
    reference: str, models: dict[str, Path], root: Path, tmp_path: Path
) -> None:
    study = text(models, root, STAGED.replace("REF", reference)) + "adapter: {dropout: 0.0}\n"
    out = carry(study, tmp_path / "one")
    lines = ledger(out)
    first = json.loads((out / "steps" / "dpo-on-sft-s0.jsonl").read_text().split("\n")[0])
    # at its own start the margin is 0: ln 2; against the base it has moved already
    assert (first["loss"] == pytest.approx(0.6931472, abs=2e-6)) == (reference == "start")
    same = lines.loc[("dpo-on-sft", 300), "reference_hash"] == lines.loc[("sft", 300), "reference_hash"]
    assert same == (reference == "base")
    assert lines.loc[("dpo-on-sft", 300), "init_hash"] != lines.loc[("sft", 300), "init_hash"]
    assert lines.loc[("kl", 300), "init_hash"] == lines.loc[("sft", 300), "init_hash"]
    for column in DATA:
        assert lines[column].groupby("budget").nunique().eq(1).all(), column
    if reference == "start":  # a stage that waits for another one's adapter
        assert contents(carry(study, tmp_path / "two", workers=2)) == contents(out)


def test_a_stopped_second_stage_resumes_with_the_same_reference(
    models: dict[str, Path], root: Path, tmp_path: Path
) -> None:
    study = text(models, root, STAGED.replace("REF", "start"))
    out = carry(study, tmp_path / "run")
    before = contents(out)
    for gone in [*out.glob("checkpoints/dpo-on-sft/s0/600/*"), *out.glob("parts/dpo-on-sft-s0-600-*")]:
        gone.unlink()
    (out / "checkpoints" / "dpo-on-sft" / "s0" / "600").rmdir()
    assert contents(carry(study, out)) == before  # no optimiser is left at 300: it starts from the start again


def test_a_start_from_a_saved_adapter_is_the_start_from_the_checkpoint(
    models: dict[str, Path], root: Path, tmp_path: Path
) -> None:
    inside = carry(text(models, root, STAGED.replace("REF", "start")), tmp_path / "inside")
    saved = inside / "checkpoints" / "sft" / "s0" / "300"
    outside = f"[{{dpo-on-sft: {{dpo: {{}}, start: {{adapter: {saved}}}}}}}]"
    out = carry(text(models, root, outside), tmp_path / "outside")
    at = Path("checkpoints") / "dpo-on-sft" / "s0" / "600" / "adapter_model.safetensors"
    assert (out / at).read_bytes() == (inside / at).read_bytes()


@pytest.mark.parametrize(
    ("objectives", "fault"),
    [
        ("[{a: {dpo: {}, start: {from: sft, budget: 300}}}, sft]", "a: start.from 'sft' is not listed before it"),
        ("[sft, {a: {dpo: {}, start: {from: sft, budget: 301}}}]", "start.budget 301 is not among the budgets"),
        ("[sft, {a: {dpo: {}, start: {from: sft}}}]", "start: from and budget need each other"),
        ("[sft, {a: {dpo: {}, start: {}}}]", "give {from: OBJECTIVE, budget: …}, or {adapter: FOLDER}"),
        ("[sft, {a: {dpo: {}, start: {adapter: nowhere}}}]", "'nowhere' is not a folder"),
        ("[sft_safety]", "auxiliary.safety is missing, and sft_safety needs it"),
        ("[{kl: {scope: general}}]", "auxiliary.general is missing, and kl needs it"),
        ("[{kl: {scope: sideways}}]", "answer or all or general"),
    ],
)
def test_what_is_missing_is_named(objectives: str, fault: str, models: dict[str, Path], root: Path) -> None:
    with pytest.raises(LeewayError) as found:
        parse(text(models, root, objectives), "x")
    assert fault in str(found.value)


def test_budgets_of_processed_tokens_match_compute(models: dict[str, Path], root: Path, tmp_path: Path) -> None:
    study = text(models, root, "[sft, dpo, cft]") + "budget: {count: processed}\n"
    lines = ledger(carry(study, tmp_path / "run"))
    batch = 4 * 2 * 40  # examples a step, sequences of each, and no sequence here is as long as that
    spent = lines.processed_tokens + lines.reference_tokens / 2  # a forward pass alone
    assert (spent >= lines.index.get_level_values("budget")).all()
    assert (spent < lines.index.get_level_values("budget") + 1.5 * batch).all()
    assert lines.loc[("dpo", 600), "step"] < lines.loc[("sft", 600), "step"]
    for _, group in lines.reset_index().groupby("step"):
        assert group.data_hash.nunique() == 1
    assert view(tmp_path / "run").faults == ()


def test_a_decay_takes_a_run_of_its_own_for_every_budget(models: dict[str, Path], root: Path, tmp_path: Path) -> None:
    constant, linear = text(models, root, "[sft]"), text(models, root, "[sft]").replace("lr:", "schedule: linear, lr:")
    planned = plan(parse(linear, "x"))
    assert [t.budgets for t in planned.trajectories] == [(600,), (300,)]
    assert "every budget is a run of its own" in planned.to_text()
    assert "warm-up" not in planned.to_text()
    late = plan(
        parse(linear.replace("[sft]", "[sft, kl]"), "x", (f"optim.warmup_steps={planned.trajectories[1].steps}",))
    )
    assert "kl, sft: the run to 300 tokens ends inside the warm-up" in late.to_text()
    assert "run to 600 tokens ends" not in late.to_text()
    whole = sum(t.processed_tokens for t in planned.trajectories)
    assert whole > 1.4 * plan(parse(constant, "x")).trajectories[0].processed_tokens
    out, same = carry(linear, tmp_path / "linear"), carry(constant, tmp_path / "constant")
    rates = [json.loads(line)["lr"] for line in (out / "steps" / "sft-s0-600.jsonl").read_text().splitlines()]
    assert rates[1] == 3e-3
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert rates[-1] == pytest.approx(3e-3 / (len(rates) - 1))
    assert (ledger(out).data_hash == ledger(same).data_hash).all()
    assert (ledger(out).adapter_hash != ledger(same).adapter_hash).all()


def test_the_sweep_takes_the_most_accurate_rate_and_of_equals_the_smallest() -> None:
    scores = ((3e-4, 0.5), (1e-4, 0.5), (3e-5, 0.2), (1e-2, None))
    found = choose_learning_rate("sft", tuple(Trial(lr, accuracy, 10, 3) for lr, accuracy in scores), items=4, budget=9)
    assert (found.lr, found.tokens) == (1e-4, 52)
    with pytest.raises(LeewayError, match=r"sft diverged .* at every learning rate"):
        choose_learning_rate("sft", (Trial(1.0, None, 10, 0, "loss nan"),), items=4, budget=9)


def test_tuned_rates_are_chosen_on_held_out_examples(models: dict[str, Path], root: Path, tmp_path: Path) -> None:
    sweep = "tune: {lrs: [1.0e-3, 3.0e-3], budget: 200, items: 6}"
    study = text(models, root, "[sft, dpo]").replace("lr: 3.0e-3", f"lr: tuned, {sweep}")
    prepared = prepare(parse(study, "x"))
    assert prepared.tuning is not None
    trained = {i.example.id for s in prepared.schedules.values() for step in s.steps for i in step} | {
        e.id for e in prepared.auxiliary_pool.task
    }
    assert len(prepared.tuning.test.items) == 6
    assert not trained & {i.id for i in prepared.tuning.test.items}
    assert [p.kind for p in jobs_of(prepared)] == ["base", "tune", "tune", "train", "train", *["measure"] * 4]
    out = carry(study, tmp_path / "one")
    lines, manifest = ledger(out), json.loads((out / "manifest.json").read_text())
    for alias, choice in manifest["tuning"].items():
        assert [t["lr"] for t in choice["trials"]] == [1e-3, 3e-3]
        assert set(lines.loc[alias, "lr"]) == {choice["lr"]}
        assert set(lines.loc[alias, "tuning_tokens"]) == {sum(t["trained"] + t["answered"] for t in choice["trials"])}
        for trial in choice["trials"]:
            rows = pd.read_parquet(out / "tuning" / f"{alias}-{trial['lr']:g}.parquet")
            assert rows.score.mean() == trial["accuracy"]
    assert lines.loc[("dpo", 300), "tuning_tokens"] > lines.loc[("sft", 300), "tuning_tokens"] > 0
    planned = plan(parse(study, "x"))
    assert "sft (each of 2 rates)" in planned.to_text()
    match = re.search(r"lr tuned: ([\d,]+) tokens of training by the sweeps, and up to ([\d,]+) of", planned.to_text())
    assert match
    trained, answered = (int(n.replace(",", "")) for n in match.groups())
    trials = [t for choice in manifest["tuning"].values() for t in choice["trials"]]
    assert trained == sum(t["trained"] for t in trials)
    limit = sum(t["answered"] for t in trials) + sum(  # had every answer been as long as it may be
        4 - n for f in (out / "tuning").glob("*.parquet") for n in pd.read_parquet(f).new_tokens
    )
    assert answered == limit
    with pytest.raises(LeewayError, match="40 examples cannot be held out of 40"):
        prepare(parse(study.replace("items: 6", "items: 40"), "x"))


def test_held_out_prompts_are_not_trained_on(models: dict[str, Path], root: Path, tmp_path: Path) -> None:
    twice = (root / "train.jsonl").read_text()
    (tmp_path / "train.jsonl").write_text(twice + twice.replace(" + ", "  +  "))
    (tmp_path / "test.jsonl").write_text((root / "test.jsonl").read_text())
    sweep = "lr: tuned, tune: {lrs: [1.0e-3], budget: 200, items: 6}"
    prepared = prepare(parse(text(models, tmp_path, "[sft]").replace("lr: 3.0e-3", sweep), "x"))
    assert prepared.tuning is not None
    held_out = {i.prompt.replace(" ", "") for i in prepared.tuning.test.items}
    trained = {e.prompt.replace(" ", "") for e in prepared.auxiliary_pool.task}
    assert held_out
    assert len(prepared.auxiliary_pool.task) == 80 - 2 * len(held_out)
    assert not held_out & trained


def test_a_diverged_learning_rate_is_recorded_and_not_chosen(
    models: dict[str, Path], root: Path, tmp_path: Path
) -> None:
    sweep = "lr: tuned, tune: {lrs: [1.0e-3, 1.0e+20], budget: 300, items: 4}"
    out = carry(text(models, root, "[sft]").replace("lr: 3.0e-3", sweep), tmp_path / "run")
    choice = json.loads((out / "tuning" / "sft.json").read_text())
    assert choice["lr"] == 1e-3
    assert choice["trials"][1]["accuracy"] is None
    assert "sft, step" in choice["trials"][1]["failed"]
    assert choice["trials"][1]["trained"] > 0


def test_the_sweep_uses_the_objectives_own_condition(
    models: dict[str, Path], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from leeway.study import worker

    prefixes: list[str] = []
    real = worker.TransformersBackend
    monkeypatch.setattr(worker, "TransformersBackend", lambda m, p, b: prefixes.append(p) or real(m, p, b))  # type: ignore[func-returns-value]
    sweep = "lr: tuned, tune: {lrs: [1.0e-3], budget: 200, items: 4}"
    study = text(models, root, "[cft]").replace("lr: 3.0e-3", sweep)
    prepared = prepare(parse(study, "x"))
    worker.Worker(prepared, RunDir(tmp_path), lambda *_: None).run_job(
        next(p for p in jobs_of(prepared) if p.kind == "tune")
    )
    assert prefixes == ["<SAFE>"]


def test_a_safety_file_that_changed_is_not_trained_on_halfway(
    models: dict[str, Path], root: Path, tmp_path: Path
) -> None:
    safety = tmp_path / "safety.jsonl"
    safety.write_text('{"prompt": "How do I do harm?", "completion": "I will not say."}\n')
    study = text(models, root, "[{sft_safety: {share: 1}}]") + f"auxiliary: {{safety: {safety}}}\n"
    out = carry(study, tmp_path / "run")
    safety.write_text('{"prompt": "How do I do harm?", "completion": "Like this."}\n')
    with pytest.raises(LeewayError, match="safety has changed since this study began"):
        carry(study, out)


def test_a_plan_counts_cached_references_as_the_ledger_will(
    models: dict[str, Path], root: Path, tmp_path: Path
) -> None:
    study = text(models, root, "[dpo, kl, kto]").replace("[300, 600]", "[1500]") + "reference: cached\n"
    planned = {t.objective: t for t in plan(parse(study, "x")).trajectories}
    lines = ledger(carry(study, tmp_path / "run"))
    assert lines.epochs.min() > 1.5
    for alias, t in planned.items():
        line = lines.loc[(alias, 1500)]
        assert (t.processed_tokens, t.reference_tokens) == (line.processed_tokens, line.reference_tokens), alias
        assert t.reference_tokens < t.processed_tokens


def test_a_second_stage_records_its_start_tokens_and_refuses_another_base(
    models: dict[str, Path], root: Path, tmp_path: Path
) -> None:
    out = carry(text(models, root, STAGED.replace("REF", "start")), tmp_path / "run")
    lines = ledger(out)
    assert lines.loc[("dpo-on-sft", 600), "start_tokens"] == lines.loc[("sft", 300), "source_tokens"]
    assert lines.loc[("sft", 600), "start_tokens"] == 0
    assert f"after {lines.loc[('sft', 300), 'source_tokens']:,} source tokens" in " ".join(view(out).text.split())
    saved = out / "checkpoints" / "sft" / "s0" / "300"
    other = text({"llama": other_llama(models["llama"], tmp_path / "other")}, root, "[sft]")
    staged = other.replace("[sft]", f"[{{a: {{dpo: {{}}, start: {{adapter: {saved}}}}}}}]")
    with pytest.raises(LeewayError, match="was trained on another base model"):
        carry(staged, tmp_path / "stranger")


def other_llama(folder: Path, out: Path) -> Path:
    """The same shapes with other weights."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    save_file({k: v * 1.5 for k, v in tensors.items()}, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_each_objective_may_have_its_own_rate(models: dict[str, Path], root: Path, tmp_path: Path) -> None:
    study = text(models, root, "[sft, dpo]")
    own = study.replace("lr: 3.0e-3", "lr: {sft: 3.0e-3, dpo: 1.0e-3}")
    lines, same = ledger(carry(own, tmp_path / "own")), ledger(carry(study, tmp_path / "same"))
    assert (lines.loc["sft"].adapter_hash == same.loc["sft"].adapter_hash).all()
    assert set(lines.loc["dpo", "lr"]) == {1e-3}
    with pytest.raises(LeewayError, match=r"optim\.lr: no rate for dpo"):
        parse(study.replace("lr: 3.0e-3", "lr: {sft: 1.0e-3}"), "x")
    with pytest.raises(LeewayError, match=r"optim\.lr: 'dpoo' is not an objective of this study; did you mean 'dpo'"):
        parse(study.replace("lr: 3.0e-3", "lr: {sft: 1.0e-3, dpo: 1.0e-3, dpoo: 1.0e-3}"), "x")


def test_the_ledger_command_shows_what_differs_and_exits_1(models: dict[str, Path], root: Path, tmp_path: Path) -> None:
    out = carry(text(models, root, "[sft, kl]"), tmp_path / "run")
    whole = CliRunner().invoke(app, ["ledger", str(out)])
    assert whole.exit_code == 0
    assert "4 checkpoints: matched" in whole.output
    path = out / "checkpoints" / "kl" / "s0" / "300" / "ledger.json"
    line = json.loads(path.read_text())
    del line["seal"]
    path.write_text(json.dumps(with_checksum({**line, "data_hash": "0" * 16})))
    broken = CliRunner().invoke(app, ["ledger", str(out)])
    assert broken.exit_code == 1
    assert "differs: data_hash differs at budget 300, seed 0: kl has '0000000000000000'" in broken.output
    assert "data_hash of kl at budget 300, seed 0 is not its checkpoint's" in broken.output
    path.write_text(json.dumps(with_checksum({**line, "adapter_hash": "f" * 16})))
    assert any("the adapter is not the one its ledger names" in f for f in view(out).faults)
    with pytest.raises(LeewayError, match="not a run directory"):
        view(tmp_path)


def test_the_ledger_is_no_wider_than_a_screen_whatever_the_names() -> None:
    names = ("a" * 64, "b" * 45, "sft")
    numbers = dict.fromkeys(DATA[:3] + COST, 123_456_789) | {"epochs": 1234.5678, "lr": 3.0e-5, "start_tokens": 5}
    hashes = dict.fromkeys(("data_hash", "init_hash", "reference_hash"), "0123456789abcdef")
    rows = [{"objective": n, "seed": s, "budget": 9_000_000_000, **numbers, **hashes} for n in names for s in (0, 1)]
    matching = Matching("processed", {names[0]: "sft at 300, reference: start"})
    text = "\n".join(ledger_report._text(rows, matching, [], []))
    assert max(map(len, text.splitlines())) <= 100
    for name in names:
        own = [line for line in text.splitlines() if line.split()[:1] == [name]]
        assert len(own) == 4 + (name == names[0])  # two seeds, what is matched and what it cost; and its start
    assert text.count("123,456,789") == 3 * 2 * (3 + len(COST))
    assert text.count("01234567") == 3 * 2 * 3
    assert "012345678" not in text
    head = next(line for line in text.splitlines() if line.startswith("cost"))
    assert head.split() == ["cost", "target", "processed", "reference", "tuning", "lr"]


def test_differences_are_found_in_every_matched_column() -> None:
    line = dict.fromkeys(MATCHED, 1) | {"objective": "a", "seed": 0, "budget": 5}
    for column in MATCHED:
        other = {**line, "objective": "b", column: 2}
        found = differences([line, other], Matching())
        assert [d.split(" differs at ")[0] for d in found] == [column]
        assert differences([line, {**other, "seed": 1}], Matching()) == []
        apart = differences([line, other], Matching(starts={"b": "elsewhere"}))
        assert bool(apart) == (column in DATA)
