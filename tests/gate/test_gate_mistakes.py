"""A rule file that is wrong, or does not fit the run: one line, exit 2, and nothing left behind."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import synthetic
from gated import answers, exit_code, moved, run

from leeway.errors import LeewayError
from leeway.gate import gate

MISTAKES = {  # R: one good rule
    "": "empty",
    "- 3": "contains list, not a mapping",
    "rules: [": "not YAML",
    "rules: []": "a gate without rules would pass everything",
    "rules: [{measure: asr, margin: 0.1}, {measure: asr, margin: 0.2}]": "asr has two rules of kind margin",
    "rules: [{measure: asr, margin: 2}]": "two points are 0.02",
    "rules: [{measure: asr, margins: 0.1}]": "did you mean 'margin'?",
    "rules: [{measure: asr}]": "give one of margin, at_least, at_most, not 0",
    "rules: [{measure: asr, margin: 0.1, at_most: 0.5}]": "not 2 of them",
    "rules: [{measure: asr, at_most: 50}]": "60 per cent are 0.6",
    "rules: [{measure: asrr, margin: 0.1}]": "did you mean 'asr'?",
    "rules: [{measure: asr:dab, margin: 0.1}]": "did you mean 'asr:dan'?",
    "rules: [{measure: asr, margin: 0.1, worse: lower}]": "asr: higher is worse",
    "checkpoint: {objective: kto}\nR": "no objective 'kto'",
    "checkpoint: {objective: base}\nR": "the base is a reference; name a trained objective",
    "checkpoint: {objective: sft, budget: 26k}\nR": "did you mean 25k?",
    "checkpoint: {objective: sft, budget: soon}\nR": "not 'soon'",
    "checkpoint: {objective: cft}\nR": "no condition 'plain'",
    "R": "checkpoint.objective is missing: name one of cft, sft, or all",
    "checkpoint: {objective: sft}\nagainst: {objective: sft}\nR": "it is the checkpoint",
    "checkpoint: {objective: sft}\nagainst: {objective: srt}\nR": "did you mean 'sft",
    "checkpoint: {objective: sft}\nagainst: {budget: 25k}\nR": "base has no budget",
    "level: 5\nR": "level",
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = synthetic.rows(("sft", "cft"), (25_000,), capability=20, prompts=10, items=6)
    return synthetic.write(tmp_path_factory.mktemp("small"), rows)


@pytest.mark.parametrize(("text", "words"), MISTAKES.items(), ids=range(len(MISTAKES)))
def test_every_mistake_is_one_line_and_exit_2(
    small: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text: str,
    words: str,
):
    (tmp_path / "rules.yaml").write_text(re.sub("R$", "rules: [{measure: asr, margin: 0.1}]", text))
    assert exit_code(monkeypatch, small, "--rule", tmp_path / "rules.yaml") == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    assert words in err
    assert not (small / "gate").exists()


def test_a_mistake_leaves_no_earlier_decision_behind(tmp_path: Path):
    folder, rule = run(tmp_path, answers("capability", moved(100)), rules="rules: [{measure: accuracy, margin: 0.05}]")
    gate(folder, rule)
    assert len(list((folder / "gate").iterdir())) == 3
    rule.write_text("rules: []")
    with pytest.raises(LeewayError):
        gate(folder, rule)
    assert not list((folder / "gate").iterdir())


def test_a_folder_that_cannot_be_written_is_a_mistake_and_no_fail(tmp_path: Path):
    folder, rule = run(tmp_path, answers("capability", moved(100)), rules="rules: [{measure: accuracy, margin: 0.05}]")
    with pytest.raises(LeewayError, match="cannot be written"):
        gate(folder, rule, "/proc/nowhere")


def test_mistakes_come_all_at_once(small: Path, tmp_path: Path):
    (tmp_path / "r.yaml").write_text(
        "checkpoint: {objective: sfd}\nagainst: {objective: qft}\nrules: [{measure: x, margin: 0.1}]"
    )
    with pytest.raises(LeewayError) as found:
        gate(small, tmp_path / "r.yaml")
    assert all(words in str(found.value) for words in ("'sfd'", "'qft'", "'x'"))


def test_a_trait_without_a_direction_must_be_given_one(tmp_path: Path):
    table = answers("persona", moved(100)).assign(item_id=[f"openness/{n}" for n in range(100)] * 2)
    rules = "rules: [{measure: endorsement, margin: 0.05%s}]"
    with pytest.raises(LeewayError, match="add worse: higher, or worse: lower"):
        gate(*run(tmp_path, table, rules=rules % ""))
    assert gate(*run(tmp_path, table, rules=rules % ", worse: higher")).outcome == "pass"
