"""Logs of another tool that were edited or broken: one line each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from leeway.errors import LeewayError
from leeway.integrations import lm_eval_logs
from leeway.integrations.logs import read_checkpoints

LINE: dict[str, Any] = {"doc_id": 0, "doc": {"q": "a"}, "target": "b", "acc": 1.0, "metrics": ["acc"]}


def read(folder: Path, content: str) -> Any:
    path = folder / "samples_x.jsonl"
    path.write_text(content, "utf-8")
    return read_checkpoints([str(path)])


@pytest.mark.parametrize(
    "content",
    [
        json.dumps({**LINE, "metrics": 3}),
        json.dumps({**LINE, "metrics": [["acc"]]}),
        json.dumps({**LINE, "doc": "\ud800"}),
        "[" * 100_000,
        json.dumps({"doc": "x"}),
    ],
)
def test_one_line(content: str, tmp_path: Path) -> None:
    with pytest.raises(LeewayError, match=r"samples_x\.jsonl") as found:
        read(tmp_path, content)
    assert "\n" not in str(found.value)


def test_a_score_that_no_float_holds_is_unscored(tmp_path: Path) -> None:
    (checkpoint,) = read(tmp_path, json.dumps({**LINE, "acc": 10**400}))
    (answer,) = checkpoint.tasks["x"].answers
    assert (answer.scores, answer.reasons) == ({}, {"acc": "not a finite number"})


def test_a_text_may_hold_other_line_ends(tmp_path: Path) -> None:
    (checkpoint,) = read(tmp_path, json.dumps({**LINE, "target": "a\u2028b\x85c"}, ensure_ascii=False))
    assert len(checkpoint.tasks["x"].answers) == 1


@pytest.mark.parametrize(("target", "words"), [("/dev/null", "not a regular file"), ("..", "cannot be read")])
def test_a_device_or_a_folder_is_no_log(target: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "samples_x.jsonl").symlink_to(target)
    with pytest.raises(LeewayError, match=rf"samples_x\.jsonl: {words}"):
        lm_eval_logs.read(tmp_path / "samples_x.jsonl")
