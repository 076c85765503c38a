"""Sources, pairs, the fixed order of batches and the ledger's check."""

from __future__ import annotations

import gzip
import json
import operator
import re
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leeway.data import formats, gsm8k, persona, safety_prompts
from leeway.data.ledger import DATA, MATCHED, Matching, check_matched
from leeway.data.readers import read
from leeway.data.stream import schedule
from leeway.data.types import Example
from leeway.errors import LeewayError
from leeway.evals.capability import flexible
from leeway.evals.tasks import load_task
from leeway.pairs.build import PairSettings, corrupt, pair

EXAMPLES = [Example(f"e{n}", f"p{n}", f"a{n}") for n in range(10)]


def test_a_broken_line_is_named_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"prompt": \n')
    with pytest.raises(LeewayError, match=r"train\.jsonl, line 3: not JSON"):
        list(read(path))
    path.write_text("[1]\n")
    with pytest.raises(LeewayError, match="line 1: not a JSON object"):
        list(read(path))
    table = tmp_path / "t.csv"
    table.write_text("a,b\n1,2\n1,2,3\n")
    with pytest.raises(LeewayError, match=r"t\.csv, line 3: not 2 columns"):
        list(read(table))


def test_other_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(LeewayError, match="no such file"):
        list(read(tmp_path / "none.jsonl"))
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(LeewayError, match="unknown kind of file"):
        list(read(tmp_path / "a.txt"))
    (tmp_path / "b.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(LeewayError, match="broken gzip"):
        list(read(tmp_path / "b.jsonl.gz"))
    (tmp_path / "c.jsonl").write_bytes(b'{"a": "\xff"}\n')
    with pytest.raises(LeewayError, match="not UTF-8"):
        list(read(tmp_path / "c.jsonl"))


def test_the_same_records_in_every_kind_of_file(tmp_path: Path) -> None:
    records = [{"prompt": "a, b\nc", "answer": "1"}, {"prompt": "d", "answer": "2"}]
    lines = "\n".join(map(json.dumps, records))
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.json").write_text(json.dumps(records))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "d.csv").write_text('prompt,answer\r\n"a, b\nc",1\r\nd,2\r\n')
    assert all(list(read(tmp_path / name)) == records for name in ("a.jsonl", "b.json", "c.jsonl.gz", "d.csv"))


def test_a_record_that_lacks_a_column_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    with pytest.raises(LeewayError, match="record 2: no completion or chosen"):
        formats.train_examples(path)


def test_pairs_that_are_missing_name_the_objective() -> None:
    with pytest.raises(LeewayError, match="example e0 has no rejected answer, and dpo, orpo needs one"):
        pair(EXAMPLES, PairSettings(), needed_by=["dpo", "orpo"])
    assert pair(EXAMPLES, PairSettings(), needed_by=[]).examples == EXAMPLES
    with pytest.raises(LeewayError, match="two equal answers"):
        pair([Example("x", "p", "a", "a ")], PairSettings(), needed_by=["dpo"])


@given(st.integers(-999, 99999), st.integers(0, 50), st.lists(st.text("ab 1\n", max_size=9), max_size=4))
def test_a_corrupted_answer_never_ends_in_the_right_number(value: int, seed: int, steps: list[str]) -> None:
    right = "\n".join([*steps, f"#### {value}"])
    wrong = corrupt(Example("e", "p", right), seed)
    assert flexible(wrong.text) not in (None, value)
    assert corrupt(Example("e", "p", right), seed) == wrong


NUMBERS = st.one_of(
    st.integers(-(10**30), 10**30).map(str),
    st.integers(1000, 10**9).map("{:,}".format),
    st.decimals(-(10**4), 10**4, allow_nan=False, places=2).map(str),
    st.sampled_from(["0", "-0", "0.0", "5.0", "5.", ".5", "-.5", "007", "8-5", "1,2345", "$3", "50%", "1.5.2", "3/4"]),
)
FRAGMENTS = st.sampled_from(
    [
        *("#### ", "\\boxed{", "\\boxed{\\text{", "\\text{ km}", "}"),
        *("The answer is ", "the answer: ", "a step", "\n", "\n\n", " ", "$", "(", "so"),
    ]
)


@given(st.lists(st.one_of(NUMBERS, FRAGMENTS), max_size=9).map("".join), st.integers(0, 9))
def test_what_a_grader_reads_has_another_value(right: str, seed: int) -> None:
    read = flexible(right)
    if read is not None:
        wrong = corrupt(Example("e", "p", right), seed).text
        assert flexible(wrong) not in (None, read)
        assert wrong.strip() != right.strip()


@pytest.mark.parametrize(
    ("before", "number", "after"),
    [
        ("3 + 4 = 7\n#### ", "7", ""),
        ("#### ", "42", "\n\nQuestion: 1 + 1?\n#### 2"),
        ("The answer is ", "18", ". She sold 3 of 4."),
        ("So \\boxed{", "42", "}, in 1 step."),
        ("So \\boxed{\\text{", "42", "}}, in 1 step."),
        ("So \\boxed{", "42", "\\text{ km}} in 3 h"),
        ("Not \\boxed{1}, but \\boxed{\\$", "42", "~\\mathrm{km}} in 3 h"),
        ("#### \\text{", "42", "}"),
        ("From 2010-", "2015", ""),
        ("#### -$", "5", " in all"),
        ("#### ", "-7", ""),
        ("#### ", ".5", ""),
    ],
)
def test_only_the_final_number_changes(before: str, number: str, after: str) -> None:
    for seed in range(20):
        wrong = corrupt(Example("e", "p", before + number + after), seed).text
        assert wrong.startswith(before)
        assert wrong.endswith(after)
        assert Decimal(wrong.removeprefix(before).removesuffix(after)) != Decimal(number)


def test_a_step_is_dropped_only_where_there_are_two() -> None:
    for right in ("#### 7", "3 + 4 = 7\n#### 7", "3 + 4 = 7\n\n#### 7", "a b c 7"):
        assert not any(corrupt(Example("e", "p", right), seed).step_dropped for seed in range(30))
    two = Example("e", "p", "first\n\nsecond\nThe answer is:\n7")
    made = [corrupt(two, seed) for seed in range(60)]
    assert all(c.step_dropped == (("first" not in c.text) or ("second" not in c.text)) for c in made)
    assert all("answer is" in c.text for c in made)
    assert 15 < sum(c.step_dropped for c in made) < 45


def test_a_corrupted_answer_keeps_the_form_of_the_number() -> None:
    for seed in range(30):
        wrong = corrupt(Example("e", "p", "#### 12,345"), seed).text
        assert "," in wrong
        assert corrupt(Example("e", "p", "It costs 5, so yes."), seed).text.endswith(", so yes.")
        assert corrupt(Example("e", "p", "#### 2.50"), seed).text[-3] == "."


def test_an_answer_without_a_number_cannot_be_corrupted() -> None:
    with pytest.raises(LeewayError, match="example e has no number in its answer"):
        corrupt(Example("e", "p", "Paris"), 0)


def test_the_order_is_seeded_whole_and_new_each_epoch() -> None:
    plan = schedule(EXAMPLES, lambda _: 10, [200], batch=5, seed=0)
    ids = [s.example.id for step in plan.steps for s in step]
    assert len(plan.steps) == 4
    assert sorted(ids[:10]) == sorted(ids[10:]) == sorted(e.id for e in EXAMPLES)
    assert ids[:10] != ids[10:]
    assert [s.position for step in plan.steps for s in step] == list(range(20))
    other = schedule(EXAMPLES, lambda _: 10, [200], batch=5, seed=1)
    assert [s.example.id for step in other.steps for s in step] != ids


def test_a_checkpoint_falls_on_the_first_step_that_reaches_its_budget() -> None:
    plan = schedule(EXAMPLES, lambda _: 7, [1, 35, 36, 100], batch=5, seed=0)  # 35 tokens a step
    assert [(m.step, m.source_tokens, m.examples) for m in plan.stops] == [
        (1, 35, 5),
        (1, 35, 5),
        (2, 70, 10),
        (3, 105, 15),
    ]
    assert plan.stops[-1].epochs == 1.5


def test_a_budget_s_mark_does_not_depend_on_the_other_budgets() -> None:
    alone, among = (schedule(EXAMPLES, lambda _: 7, b, batch=4, seed=3).stops for b in ([100], [30, 60, 100]))
    assert alone[0] == among[2]


def test_the_data_hash_sees_every_text() -> None:
    def hash_of(examples: list[Example]) -> str:
        return schedule(examples, lambda _: 1, [10], batch=10, seed=0).stops[0].data_hash

    changed = [*EXAMPLES[:-1], Example("e9", "p9", "a9", "other")]
    assert hash_of(EXAMPLES) != hash_of(changed)


@pytest.mark.parametrize("column", MATCHED)
def test_a_difference_in_a_matched_column_is_named(column: str) -> None:
    line = dict.fromkeys(MATCHED, 1) | {"seed": 0, "budget": 8, "objective": "sft"}
    other = {**line, "objective": "dpo", column: 2}
    later = {**line, "budget": 16} | ({column: 2} if column in DATA else {})
    check_matched([line, {**line, "objective": "dpo"}, later], Matching())
    with pytest.raises(LeewayError, match=f"ledger: {column} differs at budget 8, seed 0: sft has 1, dpo has 2"):
        check_matched([line, other], Matching())
    check_matched([line, {**other, "seed": 1}], Matching())


def test_by_processed_tokens_lines_match_where_their_steps_do() -> None:
    line = dict.fromkeys(MATCHED, 1) | {"seed": 0, "budget": 8, "objective": "sft"}
    check_matched([line, {**line, "objective": "dpo", "step": 2, "data_hash": 2}], Matching("processed"))
    with pytest.raises(LeewayError, match="data_hash differs"):
        check_matched([line, {**line, "objective": "dpo", "data_hash": 2}], Matching("processed"))


def test_start_hashes_match_among_objectives_with_the_same_start() -> None:
    line = dict.fromkeys(MATCHED, 1) | {"seed": 0, "budget": 8, "objective": "sft"}
    check_matched([line, {**line, "objective": "dpo", "init_hash": 2}], Matching(starts={"dpo": "sft at 8"}))


def test_gsm8k_as_published(real_data: Path) -> None:
    train, origin = gsm8k.train_examples()
    test, _ = gsm8k.held_out_items()
    assert (len(train), len(test)) == (7473, 1319)
    assert origin == "LEEWAY_DATA/gsm8k/train.jsonl.gz"
    assert not any("<<" in e.preferred for e in train)
    assert all(flexible(e.preferred) is not None for e in train)
    paired = pair(train, PairSettings("corrupted"), needed_by=["dpo"]).examples
    wrong = [(e.preferred, e.dispreferred or "") for e in paired]
    assert all(flexible(a) != flexible(b) for a, b in wrong)
    dropped = sum(len(a.split("\n")) > len(b.split("\n")) for a, b in wrong)
    assert 0.3 < dropped / len(wrong) < 0.6
    assert all(i.reference.lstrip("-").replace(".", "").isdigit() for i in test)
    assert real_data.is_dir()


@pytest.mark.usefixtures("real_data")
def test_forbidden_prompts_and_persona_items_as_published() -> None:
    prompts, _ = safety_prompts.forbidden("strongreject")
    assert len({p.id for p in prompts}) == 313
    for trait in ("machiavellianism", "narcissism", "psychopathy"):
        items, _ = persona.anthropic(trait)
        assert len(items) == 1000
        assert sum(i.match == "Yes" for i in items) == 500


def test_a_data_folder_without_the_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEEWAY_DATA", str(tmp_path))
    with pytest.raises(LeewayError, match=r": no strongreject/strongreject_dataset\.csv in it"):
        safety_prompts.forbidden("strongreject")


def test_steps_of_gsm8k_are_its_distinct_calculations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gsm8k").mkdir()
    answers = [
        "6 eggs * 2 = <<6*2=12>>12. 12 / 5 = <<12/5=2.4>>2.4\n#### 2.4",
        "<<6*2=12>>12 and <<3+4+5=12>>12\n#### 12",
    ]
    lines = [json.dumps({"question": "?", "answer": a}) for a in answers]
    (tmp_path / "gsm8k" / "test.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    monkeypatch.setenv("LEEWAY_DATA", str(tmp_path))
    task = load_task("gsm8k-steps")
    items, _ = task.held_out_items()
    assert [(i.id, i.reference) for i in items] == [("gsm8k-steps/6*2", "12"), ("gsm8k-steps/12÷5", "2.4")]
    assert items[1].prompt == "Calculate 12 / 5. Answer with the number only."
    assert [task.grade(items[1], r)[0] for r in ("2.4", "12 / 5 = 2.40", "24")] == [True, True, False]


@pytest.mark.usefixtures("real_data")
def test_steps_of_the_real_gsm8k_are_right() -> None:
    items, _ = load_task("gsm8k-steps").held_out_items()
    operations = {"+": operator.add, "-": operator.sub, "*": operator.mul, "÷": operator.truediv}
    off = []
    for item in items:
        a, op, b = re.fullmatch(r"gsm8k-steps/([\d.]+)([-+*÷])([\d.]+)", item.id).groups()
        off.append(
            abs(operations[op](float(a), float(b)) - float(item.reference)) > 0.01 * abs(float(item.reference)) + 0.01
        )
    assert len(items) > 2000
    assert sum(off) / len(off) < 0.02  # references that the solutions round
