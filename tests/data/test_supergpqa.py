"""SuperGPQA: items, prompts and the two rules that read a letter, on answers and rows of our own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leeway.data import supergpqa as data
from leeway.data.types import CapabilityItem
from leeway.errors import LeewayError
from leeway.evals import capability
from leeway.evals.capability import fixed, parity

OPTIONS = ("40 kN", "4 kN", "a mixture of gases", "D flip-flop", "-5 V", "5 V", "$x^2$", "0.5", "twice", "nothing")


@pytest.mark.parametrize(
    ("response", "by_parity", "by_fixed"),
    [
        ("Answer: C", "C", "C"),
        ("So.\nAnswer: C.", "C", "C"),
        ("**Answer:** C", "C", "C"),
        ("**Answer: C**", "C", "C"),
        ("Answer: $\\boxed{C}$", "C", "C"),
        ("The correct answer is (C).", "C", "C"),
        ("The final answer is \\(\\boxed{\\text{C}}\\)", "C", "C"),
        ("The answer is a mixture of gases", "a", "C"),
        ("the answer is a mixture", "a", None),
        ("The answer is A mixture of oils", "A", None),
        ("I think (C)", "I", "C"),
        ("I think it is option C", "I", "C"),
        ("I am not sure at all", "I", None),
        ("A gas expands when it is heated", "A", None),
        ("Answer: A because it is strong", "A", "A"),
        ("The answer is I.", "I", "I"),
        ("The answer is I think C", "I", None),
        ("Answer: not (C)", None, None),
        ("Answer: I'd say nothing", None, None),
        ("Answer: A or B", "A", None),
        ("Answer: (A) and (C)", "A", None),
        ("Answer: A, B", None, None),
        ("Answer: A, as shown", None, "A"),
        ("Answer: K", None, None),
        ("Answer: c", "c", None),
        ("Answer: (c)", "c", "C"),
        ("Answer: B\nNo, wait.\nAnswer: D", "D", "D"),
        ("Answer: B\nThat was it.", "B", "B"),
        ("Answer:\nH", "H", "H"),
        ("D", "D", "D"),
        ("**H.**", "H", "H"),
        ("B) 4 kN", "B", "B"),
        ("The answer is D flip-flop.", "D", "D"),
        ("The answer is 4 kN.", "B", "B"),
        ("The answer is 40 kN.", "A", "A"),
        ("Answer: -5 V", None, "E"),
        ("So it must be 5 V", None, "F"),
        ("It is 0.5 or twice that", None, None),
        ("Answer: x^2", None, "G"),
        ("Between 4 kN and 40 kN", None, None),
        ("", None, None),
        ("no idea", None, None),
    ],
)
def test_letters_by_hand(response: str, by_parity: str | None, by_fixed: str | None) -> None:
    assert (parity(response, OPTIONS), fixed(response, OPTIONS)) == (by_parity, by_fixed)


def test_a_letter_beyond_the_options_is_none_of_them() -> None:
    assert fixed("Answer: C", OPTIONS[:2]) is None
    assert parity("Answer: C", OPTIONS[:2]) == "C"  # the published rule looks for ten


def test_equal_options_differ_by_their_letter_only() -> None:
    assert fixed("Answer: 4 kN", ("4 kN", "4 kN")) is None
    assert fixed("Answer: B", ("4 kN", "4 kN")) == "B"


def test_five_shots_end_the_answer_where_the_model_asks_itself_another() -> None:
    runs_on = "Answer: C.\n\nQuestion: next?\nAnswer: D."
    assert parity(runs_on, OPTIONS) == "D"
    assert parity(runs_on, OPTIONS, five_shot=True) == "C"
    assert parity("hm\nQuestion: next?\nAnswer: D.", OPTIONS, five_shot=True) == "D"
    item = CapabilityItem("s/0", "q", "C", OPTIONS)
    assert capability.grade_supergpqa(item, runs_on, five_shot=True)[0]
    assert not capability.grade_supergpqa(item, runs_on)[0]


FORMS = ["Answer: {}", "The correct answer is **{}**.", "so\n\nAnswer: ({})", "$\\boxed{{{}}}$", "{}", "Answer: {}\n"]


@given(st.sampled_from("ABCDEFGHIJ"), st.sampled_from(FORMS))
def test_both_rules_agree_where_an_answer_is_clear(letter: str, form: str) -> None:
    assert fixed(form.format(letter), OPTIONS) == parity(form.format(letter), OPTIONS) == letter


@given(st.text("ABC abeiI.,:()*$\\{}\nanswer is option", max_size=60))
def test_any_text_is_read(text: str) -> None:
    assert fixed(text, OPTIONS) in {None, *data.LETTERS}
    assert (parity(text, OPTIONS) or "a").upper() in data.LETTERS


def test_an_answer_without_a_letter_is_wrong() -> None:
    item = CapabilityItem("s/0", "q", "A", OPTIONS)
    right, raw = capability.grade_supergpqa(item, "so a gas, I think")
    assert not right
    assert json.loads(raw) == {
        "fixed": {"found": "not found", "right": False},
        "parity": {"found": "not found", "right": False},
    }
    assert capability.grade_supergpqa(item, "A gas", "parity")[0]  # what the published rule takes for option A
    assert not capability.grade_supergpqa(item, "A gas", "fixed")[0]


def row(**other: Any) -> dict[str, Any]:
    made = {
        "uuid": "u1",
        "question": "How {much}?",
        "options": ["1", "2", "3"],
        "answer": "2",
        "answer_letter": "B",
        "discipline": "Engineering",
        "field": "Civil",
        "subfield": "Roads",
        "difficulty": "easy",
        "is_calculation": True,
    }
    return made | other


def write(root: Path, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "supergpqa"
    (folder / "prompts").mkdir(parents=True, exist_ok=True)
    (folder / "SuperGPQA-all.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setenv("LEEWAY_DATA", str(root))


def test_items_of_one_discipline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, [row(), row(uuid="u2", discipline="Law"), row(uuid="u3", answer="7")], monkeypatch)
    items, origin = data.held_out_items()
    assert [(i.id, i.reference, i.options) for i in items] == [
        ("supergpqa/u1", "B", ("1", "2", "3")),
        ("supergpqa/u3", "B", ("1", "2", "3")),
    ]
    assert items[0].prompt.endswith("How {much}?\nA) 1\nB) 2\nC) 3")
    assert "our prompt, version 1" in origin
    assert "the answer of 1 records is not their letter's option" in origin
    assert [i.id for i in data.held_out_items("Law")[0]] == ["supergpqa/u2"]
    with pytest.raises(LeewayError, match="no record of discipline 'Art'"):
        data.held_out_items("Art")


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"answer_letter": "D"}, "record 1: answer_letter 'D' is not one of its options"),
        ({"options": "1"}, "record 1: options are not a list of 2 to 10"),
        ({"options": list("abcdefghijk")}, "record 1: options are not a list of 2 to 10"),
        ({"uuid": ""}, "record 1: its uuid is empty"),
    ],
)
def test_broken_records_are_named(
    broken: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, [row(**broken)], monkeypatch)
    with pytest.raises(LeewayError, match=message):
        data.held_out_items()


def test_the_origin_has_the_hash_of_the_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, [row()], monkeypatch)
    ours, origin = data.held_out_items()
    path = tmp_path / "supergpqa" / "prompts" / "zero-shot.yaml"
    path.write_text("prompt_format:\n  - |\n    Pick one, as in \\frac{{1}}{{2}}.\n\n    {}\n")
    theirs, other = data.held_out_items()
    assert theirs[0].prompt == "Pick one, as in \\frac{1}{2}.\n\nHow {much}?\nA) 1\nB) 2\nC) 3\n"
    assert ours[0].prompt != theirs[0].prompt
    assert origin.rsplit(" ", 1)[1] != other.rsplit(" ", 1)[1]
    assert "LEEWAY_DATA/supergpqa/prompts/zero-shot.yaml" in other
    for text in ("prompt_format: []\n", "other: 1\n", "prompt_format: ['no slot']\n", "prompt_format: ['{} {}']\n"):
        path.write_text(text)
        with pytest.raises(LeewayError, match=r"zero-shot\.yaml: (no|its) prompt_format"):
            data.held_out_items()
    with pytest.raises(LeewayError, match="the 5 worked examples are missing"):
        data.held_out_items(shots=5)


def test_the_official_templates(real_data: Path) -> None:
    for shots in (0, 5):
        made = data.template(shots)  # type: ignore[arg-type]
        prompt = made.fill("How {much}?", ("1", "2"))
        assert "How {much}?\nA) 1\nB) 2" in prompt
        assert "{{" not in prompt
        assert prompt.count("Question:") == (6 if shots else 0)
        assert data.FILES[shots] in made.origin
    assert real_data


def test_the_official_worked_examples_end_in_their_own_letter(real_data: Path) -> None:
    lines = (real_data / "supergpqa" / "five_shot_demonstrations.jsonl").read_text("utf-8").splitlines()
    for demonstration in map(json.loads, lines):
        answer = f"{demonstration['rationale']}\nAnswer: {demonstration['answer_letter']}."
        assert fixed(answer, demonstration["options"]) == demonstration["answer_letter"]
        assert parity(answer, demonstration["options"]) == demonstration["answer_letter"]
        by_text = fixed(f"Answer: {demonstration['answer']}", demonstration["options"])
        assert by_text == demonstration["answer_letter"]
