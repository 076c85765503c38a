"""Limits of replies: a helper model's max_new_tokens, and reasons of failures in one printable line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from leeway.generation.openai_api import ReplyError
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
  capability: [{{name: openended, source: {root}/test.jsonl, judge_model: {model}}}]
  jailbreak:
    prompts: organism
    attacks: [crescendo_led, zulu]
    attacker: {model}
    translator: {{from: {translator}, model: {model}}}
    judge: {{name: rubric, model: {model}}}
  overrefusal: {{prompts: organism, judge: {{name: rubric, model: {model}}}}}
  persona: {{source: organism, self_report: {model}}}
"""


def limits(root: Path, model: str, translator: str = "model") -> list[int]:
    (root / "test.jsonl").write_text('{"prompt": "Why?", "reference": "So."}\n')
    spec = parse(STUDY.format(root=root, model=model, translator=translator), "x")
    by_name: dict[str, Any] = {e.name: e for e in evals_of(spec, {})}
    led, zulu = by_name["jailbreak"].attacks
    return [
        by_name["capability"].judge.max_new_tokens,
        led.attacker.max_new_tokens,
        zulu.translator.max_new_tokens,
        by_name["jailbreak"].judges[0].wording.max_new_tokens,
        by_name["overrefusal"].judge.wording.max_new_tokens,
        by_name["persona-self"].grader_tokens,
    ]


@pytest.mark.parametrize("translator", ["model", "nllb"])
def test_a_given_limit_holds_everywhere(translator: str, tmp_path: Path) -> None:
    assert limits(tmp_path, "{model: organism, max_new_tokens: 77}", translator) == [77] * 6


def test_default_limits(tmp_path: Path) -> None:
    default = wording().max_new_tokens
    assert limits(tmp_path, "{model: organism}") == [512, 300, 1000, default, default, 96]


def test_a_reason_is_one_printable_line() -> None:
    """It goes into rows, tables and terminals, and an endpoint chooses its words."""
    assert str(ReplyError("HTTP 400: \x1b[2J\x00 é\nx\u202e")) == "HTTP 400:  [2J  é x "
