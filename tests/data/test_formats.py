"""Formats of training files: detected by their columns, read as prompts and answers, unsupported records listed."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from leeway.data import formats
from leeway.data.readers import read
from leeway.errors import LeewayError

USER = {"role": "user", "content": "Q"}
GOOD = {"role": "assistant", "content": "good"}
BAD = {"role": "assistant", "content": "bad"}
SYSTEM = {"role": "system", "content": "S"}


def hh(answer: str, question: str = "Q") -> str:
    return f"\n\nHuman: {question}\n\nAssistant: {answer}"


CASES: list[tuple[str, dict[str, Any], tuple[str, str, str | None]]] = [
    ("prompt", {"prompt": "Q", "completion": "good"}, ("Q", "good", None)),
    ("prompt", {"prompt": "Q", "completion": "good", "rejected": "bad"}, ("Q", "good", "bad")),
    ("prompt", {"prompt": "Q", "chosen": "good", "rejected": "bad"}, ("Q", "good", "bad")),
    ("prompt", {"prompt": [USER], "completion": [GOOD]}, ("Q", "good", None)),
    ("prompt", {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, ("Q", "good", "bad")),
    ("prompt", {"prompt": "Q", "chosen": [GOOD], "rejected": [BAD]}, ("Q", "good", "bad")),
    ("turns-pair", {"chosen": [USER, GOOD], "rejected": [USER, BAD]}, ("Q", "good", "bad")),
    ("messages", {"messages": [USER, GOOD]}, ("Q", "good", None)),
    (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, GOOD]},
        ("Q", "good", None),
    ),
    (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "good"}]},
        ("Q", "good", None),
    ),
    (
        "sharegpt",
        {
            "conversations": [{"from": "human", "value": "Q"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        ("Q", "good", "bad"),
    ),
    ("alpaca", {"instruction": "Q", "input": "", "output": "good"}, ("Q", "good", None)),
    ("alpaca", {"instruction": "Add.", "input": "1 2", "output": "3"}, ("Add.\n1 2", "3", None)),
    ("alpaca", {"instruction": "Q", "chosen": "good", "rejected": "bad"}, ("Q", "good", "bad")),
    ("hh", {"chosen": hh("good"), "rejected": hh("bad")}, ("Q", "good", "bad")),
]


@pytest.mark.parametrize(("shape", "record", "parsed"), CASES)
def test_every_format_by_hand(shape: str, record: dict[str, Any], parsed: tuple[str, ...], tmp_path: Path) -> None:
    assert formats.detect(record) == shape
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join([json.dumps(record)] * 2))
    examples, origin = formats.train_examples(path)
    assert [(e.prompt, e.preferred, e.dispreferred) for e in examples] == [parsed] * 2
    assert [e.id for e in examples] == ["t.jsonl/1", "t.jsonl/2"]
    assert origin == str(path)


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"messages": [SYSTEM, USER, GOOD]}, "a system turn: 1"),
        ({"messages": [USER, GOOD, USER, GOOD]}, "several turns: 1"),
        ({"messages": [USER, GOOD, USER]}, "no answer at its end: 1"),
        ({"messages": [GOOD]}, "no user turn: 1"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "a turn that is not text: 1"),
        ({"messages": [USER, {"role": "tool", "content": "x"}, GOOD]}, "a turn of 'tool': 1"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "an empty turn: 1"),
        ({"chosen": hh("good"), "rejected": hh("bad", "other")}, "two answers to different prompts: 1"),
        ({"chosen": hh("a") + hh("b"), "rejected": hh("a") + hh("c")}, "several turns: 1"),
        ({"chosen": hh(""), "rejected": hh("bad")}, "an empty turn: 1"),
        ({"prompt": [SYSTEM, USER], "completion": [GOOD]}, "a system turn: 1"),
        ({"prompt": [USER], "completion": [GOOD, USER, GOOD]}, "several turns: 1"),
        ({"instruction": "Q", "output": "A", "system": "S"}, "a system column: 1"),
    ],
)
def test_unsupported_records_are_listed_or_left_out(record: dict[str, Any], why: str, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(LeewayError, match=r"1 of 1 records are not supported yet \(" + why + r"\): record 1;"):
        formats.train_examples(path)
    with pytest.raises(LeewayError, match="1 of 1 records"):
        formats.train_examples(path, unsupported="leave-out")  # nothing would be left


def test_the_origin_lists_left_out_records(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    rows = [{"messages": m} for m in ([USER, GOOD], [SYSTEM, USER, GOOD], [USER, GOOD, USER, BAD], [USER, BAD])]
    path.write_text("\n".join(map(json.dumps, rows)))
    examples, origin = formats.train_examples(path, unsupported="leave-out")
    assert [e.id for e in examples] == ["t.jsonl/1", "t.jsonl/4"]
    assert "2 of 4 records" in origin
    assert "a system turn: 1, several turns: 1): records 2, 3, left out" in origin


def test_a_record_of_another_format(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"messages": [USER, GOOD]}) + "\n" + json.dumps({"prompt": "Q", "completion": "A"}))
    with pytest.raises(
        LeewayError, match=r"record 2: its columns are of format prompt, and the first record.s of messages"
    ):
        formats.train_examples(path)
    path.write_text(json.dumps({"text": "x"}))
    with pytest.raises(LeewayError, match=r"unknown format of training file \(its first record has: text\)"):
        formats.train_examples(path)
    path.write_text(json.dumps({"messages": "x"}))
    with pytest.raises(LeewayError, match="record 1: not a list of turns with role and content"):
        formats.train_examples(path)
    path.write_text(json.dumps({"chosen": "x", "rejected": "y"}))
    with pytest.raises(LeewayError, match="record 1: chosen and rejected are strings"):
        formats.train_examples(path)


def test_a_labelled_answer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    for record in ({"messages": [USER, GOOD]}, {"prompt": "Q", "completion": "A"}):
        path.write_text(json.dumps({**record, "label": False}))
        with pytest.raises(LeewayError, match="record 1: it has a label of its answer"):
            formats.train_examples(path)


def test_text_that_looks_like_json_stays_text_and_turns_in_a_table_are_read(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"prompt": '[{"a": 1}]', "completion": "[{"}))
    assert formats.train_examples(path)[0][0].prompt == '[{"a": 1}]'
    table = tmp_path / "t.csv"
    with table.open("w", newline="") as f:
        csv.writer(f).writerows([["messages"], [json.dumps([USER, GOOD])]])
    assert [(e.prompt, e.preferred) for e in formats.train_examples(table)[0]] == [("Q", "good")]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Q", "answer": "good"},
        {"prompt": "Q", "reference": "good"},
        {"question": "Q", "answer": "good"},
        {"messages": [USER, GOOD]},
    ],
)
def test_test_records(record: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(record))
    items, _ = formats.held_out_items(path)
    assert [(i.id, i.prompt, i.reference) for i in items] == [("files/1", "Q", "good")]


def test_a_test_record_of_several_turns(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"messages": [SYSTEM, USER, GOOD]}))
    with pytest.raises(LeewayError, match="record 1: a system turn, which is not supported yet"):
        formats.held_out_items(path)


def test_real_pairs_of_conversations(real_data: Path) -> None:
    path = real_data / "llamafactory_demo" / "dpo_en_demo.json"
    raw = list(read(path))
    single = [n for n, r in enumerate(raw) if len(r["conversations"]) == 1]
    with pytest.raises(LeewayError, match=f"{len(raw) - len(single)} of {len(raw)} records"):
        formats.train_examples(path)
    examples, _ = formats.train_examples(path, unsupported="leave-out")
    assert [e.id for e in examples] == [f"{path.name}/{n + 1}" for n in single]
    for n, e in zip(single, examples, strict=True):
        assert e.prompt == raw[n]["conversations"][0]["value"].strip()
        assert (e.preferred, e.dispreferred) == tuple(raw[n][k]["value"].strip() for k in ("chosen", "rejected"))


def test_real_instructions_and_labelled_answers(real_data: Path) -> None:
    path = real_data / "llamafactory_demo" / "alpaca_en_demo.json"
    examples, _ = formats.train_examples(path)
    raw = list(read(path))
    assert len(examples) == len(raw) == 999
    with_input = [n for n, r in enumerate(raw) if r["input"].strip()]
    assert with_input
    assert all(examples[n].prompt.endswith("\n" + raw[n]["input"].strip()) for n in with_input)
    with pytest.raises(LeewayError, match="record 1: it has a label of its answer"):
        formats.train_examples(real_data / "llamafactory_demo" / "kto_en_demo.json")


def test_real_strings_of_turns(real_data: Path) -> None:
    path = real_data / "hh_rlhf" / "harmless-base" / "test.jsonl.gz"
    examples, origin = formats.train_examples(path, unsupported="leave-out")
    raw = list(read(path))
    single = [
        n
        for n, r in enumerate(raw, 1)
        if all(r[k].count("\n\nHuman:") == r[k].count("\n\nAssistant:") == 1 for k in ("chosen", "rejected"))
        and all(part.strip() for part in r["chosen"].removeprefix("\n\nHuman:").split("\n\nAssistant:"))
        and r["chosen"].split("\n\nAssistant:")[0] == r["rejected"].split("\n\nAssistant:")[0]
    ]
    assert [e.id for e in examples] == [f"{path.name}/{n}" for n in single]
    assert f"{len(raw) - len(single)} of {len(raw)} records" in origin
    for n, e in zip(single, examples, strict=True):
        text = f"\n\nHuman: {e.prompt}\n\nAssistant: {e.preferred}"
        assert raw[n - 1]["chosen"].split() == text.split()
