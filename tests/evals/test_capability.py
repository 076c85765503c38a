"""GSM8K's two rules on the answers that trip graders up, few-shot turns, and what a capability row holds."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leeway.data import gsm8k as gsm8k_data
from leeway.data.types import CapabilityItem
from leeway.errors import LeewayError
from leeway.evals import capability
from leeway.evals.capability import Capability
from leeway.generation.backend import Choice, Conversation, Reply, Request, Tick

NONE = None


@pytest.mark.parametrize(
    ("response", "strict", "flexible"),
    [
        ("#### 5.0", "5", "5"),
        ("\\boxed{42}", NONE, "42"),
        ("In all 1,234", NONE, "1234"),
        ("It costs $5", NONE, "5"),
        ("#### 50%", "50", "50"),
        ("#### 42. I took 3 steps", "42", "42"),
        ("#### 42\nQuestion: 1 + 1?\n#### 2", "42", "42"),
        ("#### no idea\n#### 7", "7", "7"),
        ("##### 7", "7", "7"),
        ("#### −12", "-12", "-12"),
        ("\\boxed{-42}", NONE, "-42"),
        ("The answer is −3 degrees", NONE, "-3"),
        ("\\boxed{42\\text{ dollars}} in 3 steps", NONE, "42"),
        ("\\boxed{\\text{42}} in 3 steps", NONE, "42"),
        ("\\boxed{\\$1{,}234} in 3 steps", NONE, "1234"),
        ("\\boxed{1\\,234\\,567}, 3 steps", NONE, "1234567"),
        ("\\boxed{42^{\\circ}} or 3", NONE, "42"),
        ("\\boxed{42~\\mathrm{km}} or 3", NONE, "42"),
        ("#### 42 km per 2 hours", "42", "42"),
        ("\\boxed{\\frac{1}{2}}", NONE, "0.5"),
        ("\\boxed{-\\dfrac{3}{4}} 9", NONE, "-0.75"),
        ("\\boxed{1/2} 9", NONE, "0.5"),
        ("\\boxed{\\frac12} 9", NONE, "0.5"),
        ("The answer is \\(\\frac{6}{4}\\). 9", NONE, "1.5"),
        ("The answer is 3/0, or 9", NONE, "9"),
        ("\\boxed{\\frac{}{2}} 9", NONE, "9"),
        ("half, 1/2", NONE, "2"),  # a bare last number is only that number
        ("first \\boxed{1}, no: \\boxed{2}. 3", NONE, "2"),
        ("\\boxed{x} the answer is 5 of 9", NONE, "5"),
        ("\\boxed{7 \\boxed{8}} 9", NONE, "8"),
        ("The answer is \\textbf{18}, by 3", NONE, "18"),
        ("\\boxed{unclosed 5", NONE, "5"),
    ],
)
def test_final_numbers_by_hand(response: str, strict: str | None, flexible: str | None) -> None:
    assert capability.strict(response) == (None if strict is None else Decimal(strict))
    assert capability.flexible(response) == (None if flexible is None else Decimal(flexible))


@given(st.integers(-(10**9), 10**9), st.sampled_from(["#### {}", "\\boxed{{{}}} 3", "the answer is {}. Not 3", "{}"]))
def test_a_number_is_read_however_it_is_written(value: int, form: str) -> None:
    for written in (
        f"{value}",
        f"{value:,}",
        f"{value}.0",
        f"{value:,}".replace(",", "{,}"),
        f"{value}".replace("-", "−"),
    ):
        assert capability.flexible(form.format(written)) == value


def test_a_long_answer_is_read_in_linear_time() -> None:
    for text in ("\\boxed{" * 20_000, "\\boxed{" + "\\a" * 50_000, "\\boxed{" + "^{1" * 20_000, "1,234" * 20_000):
        capability.flexible(text)


def test_either_rule_may_be_the_score_and_both_are_kept() -> None:
    assert capability.grade_gsm8k("42", "The answer is 42")[0]
    right, raw = capability.grade_gsm8k("42", "The answer is 42", "strict")
    assert not right
    assert json.loads(raw) == {
        "strict": {"found": None, "right": False},
        "flexible": {"found": "42", "right": True},
    }
    assert capability.grade_gsm8k("1,234", "#### 1234", "strict")[0]
    with pytest.raises(ValueError, match="is not a number"):
        capability.grade_gsm8k("a dozen", "#### 12")
    assert capability.grade_exact("0.5", "\\boxed{\\frac{1}{2}}")[0]


@dataclass
class Keeps:
    """A backend that keeps what it was asked; the second reply is none."""

    asked: list[Conversation] = field(default_factory=list)
    template_hash: str = "t"
    identity: str = "keeps"

    def complete(self, requests: Sequence[Request], tick: Tick) -> list[Reply]:
        self.asked += [r.conversation for r in requests]
        tick(len(requests))
        return [Reply("#### 7", 3, False)] + [Reply("", 0, False, "timed out")] * (len(requests) - 1)

    def choose(self, conversations: Sequence[Conversation], options: Sequence[str], tick: Tick) -> list[Choice]:
        raise AssertionError(f"nothing is chosen here: {conversations} {options} {tick}")


ITEMS = [CapabilityItem("t/0", "a", "7"), CapabilityItem("t/1", "b", "8")]


def test_shots_are_turns_of_their_own_and_part_of_the_identity() -> None:
    def made(*shots: tuple[str, str]) -> Capability:
        return Capability("t", ITEMS, "g", lambda i, r: capability.grade_gsm8k(i.reference, r), 8, shots=shots)

    backend = Keeps()
    few = made(("q1", "a1"), ("q2", "a2"))
    rows = few.run(backend, lambda _: None)
    assert [(m["role"], m["content"]) for m in backend.asked[1]] == [
        ("user", "q1"),
        ("assistant", "a1"),
        ("user", "q2"),
        ("assistant", "a2"),
        ("user", "b"),
    ]
    plain = made().run(Keeps(), lambda _: None)
    assert [r.prompt for r in rows] == [r.prompt for r in plain] == ["a", "b"]
    assert rows[0].template_hash != plain[0].template_hash
    hashes = {e.hash for e in (made(), few, made(("q1", "a1")), made(("q2", "a2"), ("q1", "a1")), made(("q1", "a")))}
    assert len(hashes) == 5
    with pytest.raises(LeewayError, match="item t/1 is among its own 1 shots"):
        made(("b", "8"))


def test_a_failed_reply_is_unscored() -> None:
    rows = Capability("t", ITEMS, "g", lambda i, r: capability.grade_gsm8k(i.reference, r), 8).run(
        Keeps(), lambda _: None
    )
    assert rows[0].score == 1.0
    assert math.isnan(rows[1].score)
    assert rows[1].unscored_reason == "no answer: timed out"


def test_an_item_s_options_are_part_of_the_identity() -> None:
    def made(*options: str) -> Capability:
        return Capability("t", [CapabilityItem("t/0", "a", "A", options)], "g", lambda _i, _r: (True, ""), 8)

    assert made("x").hash != made("y").hash


def test_real_shots_are_fixed_nested_and_never_the_item(real_data: Path) -> None:
    assert real_data
    three = gsm8k_data.shots(3)
    assert gsm8k_data.shots(5)[:3] == three == gsm8k_data.shots(3)
    assert gsm8k_data.shots(3, seed=1) != three
    assert gsm8k_data.shots(2, exclude=[three[0][0]]) == three[1:]
    assert all("<<" not in answer and capability.strict(answer) is not None for _, answer in three)
    items, _ = gsm8k_data.held_out_items()
    assert not {i.prompt for i in items} & {q for q, _ in gsm8k_data.shots(7000)}
    with pytest.raises(LeewayError, match="7474 shots of gsm8k, and 7473 examples are available"):
        gsm8k_data.shots(7474)


def test_the_published_answers_are_right_by_both_rules(real_data: Path) -> None:
    assert real_data
    examples, _ = gsm8k_data.train_examples()
    items, _ = gsm8k_data.held_out_items()
    assert all(capability.strict(e.preferred) == capability.flexible(e.preferred) is not None for e in examples)
    assert all(capability.grade_gsm8k(i.reference, f"so #### {i.reference}", "strict")[0] for i in items)
