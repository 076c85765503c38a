"""A speaker's max_new_tokens: its own wherever it is given, and otherwise that of whoever asks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from leeway.judges.rubric import wording
from leeway.study.build_evals import evals_of
from leeway.study.load import parse

STUDY = """
name: x
model: organism
task: organism
objectives: [sft]
budgets: [1k]
evals:
  capability: [{{name: openended, source: {root}/test.jsonl, judge_model: {who}}}]
  jailbreak:
    prompts: organism
    attacks: [crescendo_led, zulu]
    attacker: {who}
    translator: {{from: {translator}, model: {who}}}
    judge: {{name: rubric, model: {who}}}
  overrefusal: {{prompts: organism, judge: {{name: rubric, model: {who}}}}}
  persona: {{source: organism, self_report: {who}}}
"""


def limits(root: Path, who: str, translator: str = "model") -> list[int]:
    (root / "test.jsonl").write_text('{"prompt": "Why?", "reference": "So."}\n')
    spec = parse(STUDY.format(root=root, who=who, translator=translator), "x")
    found: dict[str, Any] = {e.name: e for e in evals_of(spec, {})}
    led, zulu = found["jailbreak"].attacks
    return [
        found["capability"].judge.max_new_tokens,
        led.attacker.max_new_tokens,
        zulu.translator.max_new_tokens,
        found["jailbreak"].judges[0].wording.max_new_tokens,
        found["overrefusal"].judge.wording.max_new_tokens,
        found["persona-self"].grader_tokens,
    ]


@pytest.mark.parametrize("translator", ["model", "nllb"])
def test_a_limit_that_is_given_holds_everywhere(translator: str, tmp_path: Path) -> None:
    assert limits(tmp_path, "{model: organism, max_new_tokens: 77}", translator) == [77] * 6


def test_otherwise_each_has_its_own(tmp_path: Path) -> None:
    own = wording().max_new_tokens
    assert limits(tmp_path, "{model: organism}") == [512, 300, 1000, own, own, 96]
