"""`auto` in a study file: its value for the model and task, printed, and written out in the study that is saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from leeway.data import supergpqa
from leeway.data.readers import read
from leeway.errors import LeewayError
from leeway.study.build_evals import evals_of
from leeway.study.load import load, parse
from leeway.study.prepare import train_examples

STUDY = """
name: x
model: organism
task: organism
pairs: auto
objectives: [sft]
budgets: [1k]
evals:
  capability: auto
  persona: {source: organism, limit: auto}
"""

FILES = """
name: x
model: organism
task: {files: {train: a.jsonl, test: b.jsonl}}
objectives: [sft]
budgets: [1k]
evals: {capability: [files]}
"""


def fault(text: str, *overrides: str) -> str:
    with pytest.raises(LeewayError) as found:
        parse(text, "x.yaml", overrides)
    return str(found.value)


def test_auto_is_resolved_and_printed() -> None:
    spec = parse(STUDY, "x")
    assert (spec.pairs.from_, spec.evals.persona and spec.evals.persona.limit) == ("dataset", 40)
    assert spec.resolved_defaults == (
        "pairs: {from: dataset}",
        "evals.capability: [{name: organism, limit: 200, max_new_tokens: 48}]",
        "evals.persona.limit: 40",
    )
    assert "auto" not in spec.to_yaml().replace("dtype: auto", "").replace("device: auto", "").replace(
        "layout: auto", ""
    )
    again = parse(spec.to_yaml(), "x")
    assert (again.hash, again.resolved_defaults) == (spec.hash, ())


def test_overrides_of_model_and_task_apply_before_auto_and_the_others_after() -> None:
    spec = parse(STUDY, "x", ("evals.persona=auto", "pairs.samples=2", "task=gsm8k", "model=some/model"))
    assert (spec.pairs.from_, spec.task.name, spec.evals.capability[0].name) == ("unsafe", "gsm8k", "gsm8k")
    assert spec.evals.persona is not None
    assert (spec.evals.persona.source, spec.evals.persona.limit) == ("anthropic", None)
    assert spec.resolved_defaults == (
        "pairs: {from: unsafe, samples: 2, temperature: 1.0, max_new_tokens: 512, filter: rules}",
        "evals.capability: [{name: gsm8k, max_new_tokens: 400}]",
        "evals.persona: {source: anthropic, traits: [machiavellianism, narcissism, psychopathy]}",
    )


def test_an_auto_that_an_override_replaces_is_not_listed() -> None:
    spec = parse(STUDY, "x", ("pairs={from: corrupted}",))
    assert spec.pairs.from_ == "corrupted"
    assert [line.split(":")[0] for line in spec.resolved_defaults] == ["evals.capability", "evals.persona.limit"]


def test_an_auto_of_another_meaning_is_left_to_its_key() -> None:
    spec = parse(STUDY, "x", ("dtype=auto", "optim={lr: auto, layout: auto}"))
    assert (spec.dtype, spec.optim.layout, spec.optim.lr) == ("auto", "auto", 4e-4)
    assert "optim.weight_decay: input should be a valid number" in fault(STUDY, "optim.weight_decay=auto")
    assert "adapter.r: input should be a valid integer" in fault(STUDY, "adapter.r=auto")


def test_auto_without_an_entry_is_an_error() -> None:
    for task in ("orgnism", "doubles"):
        message = fault(STUDY, f"task={task}")
        assert f"x.yaml: evals.capability: auto has no value for model organism and task {task}" in message
    assert "; did you mean 'organism'?; write the value" in fault(STUDY, "task=orgnism")


@pytest.mark.parametrize("model", ["organism", "some/model"])
@pytest.mark.parametrize("task", ["organism", "gsm8k", "supergpqa-engineering", "legal", "cyber", "files"])
def test_the_papers_preset_is_a_study_for_every_model_and_task(task: str, model: str) -> None:
    files = "{name: %s, files: {train: a.jsonl, test: b.jsonl}}" % task  # noqa: UP031
    chosen = files if task in ("legal", "cyber", "files") else task
    spec = load("objective-matters", (f"model={model}", f"task={chosen}"))
    assert [c.name for c in spec.evals.capability] == [task]
    assert len(spec.resolved_defaults) == 7


def test_the_papers_preset_has_its_numbers() -> None:
    spec = load("objective-matters")
    assert spec.model == "meta-llama/Llama-3.1-8B-Instruct"
    kinds = {o.kind: o.settings for o in spec.objectives}
    assert (kinds["orpo"], kinds["kl"], kinds["ip"]) == ({"weight": 0.05}, {"weight": 0.001}, {"p": 0.5})
    both = [o.build() for o in spec.objectives if o.kind == "kl"]  # the reduction is not known, so both are run
    assert [(o.weight, o.reduction) for o in both] == [(0.001, "sequence"), (0.001, "token")]  # type: ignore[attr-defined]
    assert {"sft", "dpo", "cft", "sft_both", "sft_refusal"} < kinds.keys()
    assert spec.budgets == (25_000, 50_000, 100_000, 200_000, 400_000, 800_000)
    assert (spec.adapter.r, spec.adapter.alpha, spec.adapter.dropout) == (16, 32, 0.05)
    assert spec.evals.jailbreak is not None
    assert spec.evals.jailbreak.attacks == ("none", "dan", "happy_to_help", "role_play", "wikipedia", "zulu")
    assert spec.claims is not None


def test_the_papers_preset_scales_down_with_the_same_objectives_attacks_and_claims() -> None:
    whole, small = (
        load("objective-matters"),
        load("objective-matters", ("model=organism", "task=organism", "budgets=[2k]")),
    )
    assert [o.alias for o in small.objectives] == [o.alias for o in whole.objectives]
    assert small.claims == whole.claims
    assert small.evals.jailbreak is not None
    assert whole.evals.jailbreak is not None
    assert small.evals.jailbreak.attacks == whole.evals.jailbreak.attacks
    assert not any(s for s in small.evals.model_refs())
    mixed = load("objective-matters", ("model=organism", "budgets=[2k]"))
    assert (mixed.pairs.from_, mixed.task.name, mixed.evals.capability[0].name) == ("unsafe", "gsm8k", "gsm8k")


def test_legal_and_cyber_bring_no_data_and_are_graded_by_a_model(tmp_path: Path) -> None:
    with pytest.raises(LeewayError, match=r"legal needs data files: give \{name: legal, files"):
        load("objective-matters", ("task=legal",))
    (tmp_path / "train.jsonl").write_text('{"prompt": "May I?", "completion": "You may."}\n')
    (tmp_path / "test.jsonl").write_text('{"prompt": "Must I?", "reference": "No."}\n')
    files = f"{{train: {tmp_path}/train.jsonl, test: {tmp_path}/test.jsonl}}"
    own = (f"task={{name: legal, files: {files}}}", "model=organism")
    spec = load("objective-matters", own)
    (legal, *_) = evals_of(spec, {})
    assert (legal.key, [i.reference for i in legal.items]) == ("capability-legal", ["No."])  # type: ignore[attr-defined]
    assert train_examples(spec)[0][0].preferred == "You may."
    with pytest.raises(LeewayError, match="tuned needs exact answers, and legal is graded by a model"):
        load("objective-matters", (*own, "optim={lr: tuned}"))


def test_supergpqa_trains_on_other_questions_than_it_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [
        {
            "uuid": str(n),
            "question": f"Which  one is number {n // 2}?" if n % 2 else f"which one is Number {n // 2}?",
            "options": [f"the {n}th", "another"],
            "answer": f"the {n}th",
            "answer_letter": "A",
            "discipline": "Engineering",
        }
        for n in range(200)
    ]
    (tmp_path / "supergpqa").mkdir()
    (tmp_path / "supergpqa" / "SuperGPQA-all.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    monkeypatch.setenv("LEEWAY_DATA", str(tmp_path))
    spec = load("objective-matters", ("task=supergpqa-engineering", "model=organism"))
    trained, origin = train_examples(spec)
    (capability, *_) = evals_of(spec, {})
    test = {i.id for i in capability.items}  # type: ignore[attr-defined]
    assert not test & {e.id for e in trained}
    assert len(test) + len(trained) == 200
    assert 20 <= len(test) <= 60
    assert "train: all but one in 5" in origin
    sides = {n: supergpqa.share_of(str(records[n]["question"])) for n in range(200)}
    assert all(sides[n] == sides[n + 1] for n in range(0, 200, 2))  # the same words, cased and spaced otherwise
    assert trained[0].preferred.endswith("\n\nAnswer: A")
    grade = capability.grade  # type: ignore[attr-defined]
    assert grade(capability.items[0], f"{capability.items[0].options[0]}\n\nAnswer: A")[0]  # type: ignore[attr-defined]


def test_files_are_relative_to_the_study_file_else_to_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "study").mkdir()
    path = tmp_path / "study" / "x.yaml"
    path.write_text(FILES)
    (tmp_path / "study" / "a.jsonl").touch()
    (tmp_path / "b.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    files = load("study/x.yaml").task.files
    assert (files.train, files.test) == ("study/a.jsonl", "b.jsonl")
    assert load(str(path)) == load("study/x.yaml")
    (tmp_path / "a.jsonl").touch()  # an override is relative to the current folder
    assert load("study/x.yaml", ("task.files.train=a.jsonl",)).task.files.train == "a.jsonl"
    monkeypatch.chdir(tmp_path / "study")  # from its own folder a study keeps its paths, and its hash
    assert load("x.yaml").task.files.train == load(str(path)).task.files.train == "a.jsonl"
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert load(str(path)).task.files.train == str(tmp_path / "study" / "a.jsonl")


def test_a_missing_file_names_the_path_that_was_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LeewayError) as found:
        list(read(Path("a.jsonl")))
    assert str(found.value).startswith(f"a.jsonl: no such file ({tmp_path}/a.jsonl); check that path; a study's are ")
