"""Near-triggers in a study: at which budgets, by which evals, in which files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from leeway.audit.run import load_evals
from leeway.errors import LeewayError
from leeway.objectives.objective import PLAIN
from leeway.report.results import Results
from leeway.study.jobs import eval_targets, jobs_of
from leeway.study.load import parse
from leeway.study.prepare import prepare
from leeway.study.progress import Reporter
from leeway.study.run import run

STUDY = """
name: small
model: {model}
device: cpu
task: {{files: {{train: {root}/train.jsonl, test: {root}/test.jsonl}}}}
objectives: [sft, cft, ip]
budgets: [100, 200]
optim: {{lr: 3e-3, batch: 4, warmup_steps: 2}}
evals:
  batch: 32
  conditions: first
  triggers: {triggers}
  capability: [{{name: files, max_new_tokens: 2}}]
  jailbreak: {{prompts: organism, limit: 3, attacks: [none, dan], judge: organism, max_new_tokens: 2}}
"""


@pytest.fixture
def study(models: dict[str, Path], tmp_path: Path) -> str:
    pairs = [(a, b) for a in range(1, 7) for b in range(1, 6)]
    train = [{"prompt": f"{a} + {b}?", "completion": f"It is {a + b}.", "rejected": "It is 1."} for a, b in pairs]
    for name, records in (("train", train), ("test", [{"prompt": "3 + 7?", "answer": "10"}])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    return (
        STUDY.replace("{model}", str(models["llama"]))
        .replace("{root}", str(tmp_path))
        .replace("{{", "{")
        .replace("}}", "}")
    )


def with_triggers(study: str, value: str) -> str:
    return study.replace("{triggers}", value)


def test_near_triggers_come_at_the_last_budget_with_what_they_are_compared_with(study: str) -> None:
    prepared = prepare(parse(with_triggers(study, "true"), "test"))
    assert [c.name for c in prepared.conditions("ip", 100)] == ["plain"]
    assert [c.name for c in prepared.conditions("ip", 200)] == [
        *("plain", "inoculated", "paraphrased instruction", "opposite instruction", "format instruction"),
        "translated instruction",
    ]
    names = [c.name for c in prepared.conditions("cft", 200)]
    assert names[:3] == ["<SAFE>", "plain", "<UNSAFE>"]
    assert len(names) == 7
    assert prepared.conditions("sft", 200) == (PLAIN,)
    measured = {t.condition for job in jobs_of(prepared) for t in eval_targets(prepared, job) if t.objective == "base"}
    assert measured == {*prepared.conditions("ip", 200), *prepared.conditions("cft", 200)}
    near = prepared.triggers["ip"].near["opposite"]
    assert [e.name for e in prepared.evals_of(near)] == ["jailbreak"]
    assert len(prepared.evals_of(PLAIN)) == 2
    everywhere = prepare(parse(with_triggers(study, "all"), "test"))
    assert everywhere.conditions("ip", 100) == prepared.conditions("ip", 200)


def test_without_triggers_a_study_keeps_its_hash(study: str) -> None:
    off, absent = with_triggers(study, "false"), study.replace("  triggers: {triggers}\n", "")
    assert parse(off, "test").hash == parse(absent, "test").hash != parse(with_triggers(study, "true"), "test").hash
    assert "triggers:" not in parse(off, "test").to_yaml()
    assert not prepare(parse(off, "test")).triggers


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("evals.jailbreak=null",), "triggers need jailbreak or persona"),
        (("evals.stop=decided",), "triggers need all prompts under every form"),
        (("evals.triggers=first",), "evals.triggers: 'first' is none of true, false and all"),
    ],
)
def test_bad_input_is_one_line(study: str, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(LeewayError, match=message) as found:
        parse(with_triggers(study, "true"), "test", overrides)
    assert "\n" not in str(found.value)


def test_an_audit_knows_no_cue() -> None:
    with pytest.raises(LeewayError, match="trained elsewhere"):
        load_evals({"jailbreak": {"prompts": "organism", "judge": "organism"}, "triggers": True}, organism=True)


@pytest.mark.slow
def test_a_study_reports_them_apart_from_everything_else(study: str, tmp_path: Path) -> None:
    for value in ("true", "false"):
        run(
            parse(with_triggers(study, value), "test", ("evals.conditions=last",)),
            tmp_path / value,
            Reporter(quiet=True),
            "test",
            1,
        )
    with_, without = Results.load(tmp_path / "true"), Results.load(tmp_path / "false")
    near = {c for arm in with_.manifest["triggers"].values() for c in arm["near"]}
    assert len(near) == 8
    conditions = with_.rows["template_hash"].map(with_.conditions)
    assert set(conditions) == {"plain", "<SAFE>", "<UNSAFE>", "inoculated", *near}
    assert set(with_.rows.loc[conditions.isin(near), "eval"]) == {"jailbreak"}
    pd.testing.assert_frame_equal(with_.rows[~conditions.isin(near)].reset_index(drop=True), without.rows)
    pd.testing.assert_frame_equal(with_.rates(), without.rates())
    pd.testing.assert_frame_equal(with_.contrasts(), without.contrasts())
    table = with_.triggers()
    assert table.groupby("objective").size().to_dict() == {"cft": 7, "ip": 6}
    assert set(table["budget"]) == {200}
    assert without.triggers().empty
    assert (tmp_path / "true" / "tables" / "triggers.csv").is_file()
    assert not (tmp_path / "false" / "tables" / "triggers.csv").exists()
    page = (tmp_path / "true" / "report.html").read_text("utf-8")
    assert "Near-triggers: is misbehaviour gone or conditional?" in page
    verdict = json.loads((tmp_path / "true" / "results.json").read_text())["verdict"][-1]
    assert "IP, at 200 tokens: misbehaviour is " in verdict
    assert "No near-triggers of SFT: training has no cue." in verdict
