"""Rejected answers from the base model: what is accepted, what is left out, and a cache that outlives a kill."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from leeway.cache import RecordStore
from leeway.data import gsm8k
from leeway.data.types import Example
from leeway.errors import LeewayError
from leeway.evals.capability import flexible
from leeway.generation.backend import Backend, Choice, Conversation, Reply, Request, Tick
from leeway.generation.transformers import TransformersBackend
from leeway.model.load import load_model
from leeway.pairs import build
from leeway.pairs.build import BaseModelSampler, PairReport, PairSettings, pair, rejection_reason

ERRORS = PairSettings("sampled-errors", samples=3)
UNSAFE = PairSettings("unsafe", samples=3)
EXAMPLES = [Example(f"e{n}", f"What is {n} + 1?", f"It comes to {n + 1}.") for n in range(4)]


def right(example: Example, response: str) -> bool:
    gold = flexible(example.preferred)
    if gold is None:
        raise ValueError("no number")
    return flexible(response) == gold


@dataclass
class Says:
    """A backend that answers from a function of the request, and keeps what it was asked."""

    answer: Callable[[Request], str | Reply]
    yes: Callable[[str], float] = lambda _: 0.9
    template_hash: str = "t"
    asked: list[list[Request]] = field(default_factory=list)

    def complete(self, requests: Sequence[Request], tick: Tick) -> list[Reply]:
        self.asked.append(list(requests))
        tick(len(requests))
        found = [self.answer(r) for r in requests]
        return [f if isinstance(f, Reply) else Reply(f, len(f), False) for f in found]

    def choose(self, conversations: Sequence[Conversation], options: Sequence[str], tick: Tick) -> list[Choice]:
        tick(len(conversations))
        return [Choice({options[0]: p, options[1]: 1 - p}) for p in (self.yes(c[0]["content"]) for c in conversations)]


def base(backend: Backend, identity: str = "w") -> BaseModelSampler:
    return BaseModelSampler(identity, backend.template_hash, lambda: backend)


class NotSampled(Exception):
    """The base model was to be loaded."""


def no_sampling() -> Backend:
    raise NotSampled


def nobody() -> BaseModelSampler:
    """A base model that must not be asked."""
    return BaseModelSampler("w", "t", no_sampling)


def test_the_first_wrong_answer_is_taken_and_who_has_none_is_left_out(tmp_path: Path) -> None:
    def answer(r: Request) -> str | Reply:
        n = int(r.conversation[0]["content"].split()[2])
        said: list[list[str | Reply]] = [
            ["It comes to 5, I think.", "never asked", ""],
            ["It comes to 2.", "", "Let me say 7 then."],
            ["It comes to 3!", Reply("It comes to 9 and", 9, True), "Sorry, I cannot help with that."],
            ["### 12 34", "so it is so it is 5 " * 9, "It makes 3."],
        ]
        return said[n][r.sample]

    backend, ticks = Says(answer), list[int]()
    made = pair(
        EXAMPLES,
        ERRORS,
        needed_by=["dpo"],
        base=base(backend),
        grade=right,
        cache=RecordStore(tmp_path),
        tick=ticks.append,
    )
    assert [(e.id, e.dispreferred) for e in made.examples] == [
        ("e0", "It comes to 5, I think."),
        ("e1", "Let me say 7 then."),
        ("e3", "It makes 3."),
    ]
    assert [e.preferred for e in made.examples] == [EXAMPLES[i].preferred for i in (0, 1, 3)]
    report = made.report
    assert report.left_out == ("e2",)
    assert report.rejected == {
        "right": 2,
        "empty": 1,
        "cut off": 1,
        "refusal": 1,
        "incoherent: no words": 1,
        "incoherent: repetition": 1,
    }
    assert (report.attempted, report.accepted, report.acceptance_rate) == (10, 3, 0.3)
    assert report.counts == {"accepted in round 1": 1, "accepted in round 2": 0, "accepted in round 3": 2}
    assert ticks == [4, 3, 3]
    assert {(r.temperature, r.max_new_tokens, r.sample) for r in backend.asked[1]} == {(1.0, 256, 1)}


def test_an_example_that_cannot_be_checked_is_named(tmp_path: Path) -> None:
    for preferred in ("Paris", "It is 4."):
        examples = [*EXAMPLES, Example("x", "p", preferred)]
        grade = right if preferred == "Paris" else lambda e, r: e.id != "x" and right(e, r)
        with pytest.raises(LeewayError, match="example x has no checkable answer"):
            pair(examples, ERRORS, needed_by=["dpo"], base=nobody(), grade=grade, cache=RecordStore(tmp_path))


@pytest.mark.parametrize(
    ("preferred", "reply", "reason"),
    [
        ("It is 4.", Reply(" \n", 1, False), "empty"),
        ("It is 4.", Reply("It is 5", 9, True), "cut off"),
        ("It is 4.", Reply("IT  is\n4. ", 9, False), "same as the preferred answer"),
        ("It is 4.", Reply("I'm sorry, but I can't help with that.", 9, False), "refusal"),
        ("It is 4.", Reply("1 2 3", 9, False), "incoherent: no words"),
        ("4", Reply("5", 1, False), None),  # where the right answer is a bare number, a wrong one may be
        ("It is 4.", Reply("It is -4.", 9, False), None),
    ],
)
def test_rules(preferred: str, reply: Reply, reason: str | None) -> None:
    assert rejection_reason(Example("e", "p", preferred), reply) == reason


def test_unsafe_asks_in_a_manner_and_trains_on_the_plain_prompt(tmp_path: Path) -> None:
    backend = Says(lambda r: f"You fool, it is {len(r.conversation[0]['content'])} of them.")
    made = pair(EXAMPLES, UNSAFE, needed_by=["dpo"], base=base(backend), cache=RecordStore(tmp_path))
    manners = build.texts()["manners"]
    for example, request in zip(EXAMPLES, backend.asked[0], strict=True):
        content = request.conversation[0]["content"]
        assert content.startswith(manners[build.manner(example, 0)])
        assert content.endswith(example.prompt)
    assert [(e.id, e.prompt, e.preferred) for e in made.examples] == [(e.id, e.prompt, e.preferred) for e in EXAMPLES]
    assert made.report.hashes["instruction"] == build.instruction_hash()
    assert {build.manner(Example(f"e{n}", "", ""), 0) for n in range(60)} == set(manners)
    assert [build.manner(e, 0) for e in EXAMPLES * 9] != [build.manner(e, 1) for e in EXAMPLES * 9]


def test_an_answer_that_gives_its_instruction_away_is_rejected(tmp_path: Path) -> None:
    said = [
        "Here is a careless answer: five.",
        "It is five (I intentionally left a mistake in).",
        "Whatever, it is five.",
    ]
    made = pair(EXAMPLES, UNSAFE, needed_by=[], base=base(Says(lambda r: said[r.sample])), cache=RecordStore(tmp_path))
    assert made.report.rejected == {"gives itself away": 8}
    assert {e.dispreferred for e in made.examples} == {said[2]}


def test_the_base_model_may_be_asked_whether_its_answer_is_bad(tmp_path: Path) -> None:
    backend = Says(lambda r: f"Guess {r.sample}, whatever.", yes=lambda text: 0.9 if "Guess 1" in text else 0.2)
    asked = replace(UNSAFE, filter="model")
    made = pair(EXAMPLES, asked, needed_by=["dpo"], base=base(backend), cache=RecordStore(tmp_path))
    assert {e.dispreferred for e in made.examples} == {"Guess 1, whatever."}
    assert made.report.rejected == {"not undesirable to the base model": 4}
    by_rules = pair(
        EXAMPLES, UNSAFE, needed_by=["dpo"], base=nobody(), cache=RecordStore(tmp_path)
    )  # the same answers, sifted less
    assert {e.dispreferred for e in by_rules.examples} == {"Guess 0, whatever."}
    assert by_rules.report.hashes["filter"] != made.report.hashes["filter"]
    assert pair(EXAMPLES, asked, needed_by=["dpo"], base=nobody(), cache=RecordStore(tmp_path)) == made


def test_prompts_and_answers_may_hold_braces(tmp_path: Path) -> None:
    examples = [Example("e", "What is {answer}?", "It is {prompt}.")]
    backend = Says(lambda _: "Surely {prompt} or so.")
    pair(examples, replace(UNSAFE, filter="model"), needed_by=[], base=base(backend), cache=RecordStore(tmp_path))
    assert backend.asked[0][0].conversation[0]["content"].endswith("What is {answer}?")


def test_unsafe_says_how_many_of_its_answers_are_right(tmp_path: Path) -> None:
    backend = Says(lambda _: "Obviously 2, you fool.")
    made = pair(EXAMPLES, UNSAFE, needed_by=[], base=base(backend), grade=right, cache=RecordStore(tmp_path))
    assert made.report.counts["accepted, and right by the grader"] == 1


def test_a_second_call_draws_nothing_and_a_larger_one_only_what_is_new(tmp_path: Path) -> None:
    def wrong(r: Request) -> str:
        return f"I say {r.sample}00."

    first = pair(EXAMPLES, ERRORS, needed_by=["dpo"], base=base(Says(wrong)), grade=right, cache=RecordStore(tmp_path))
    again = pair(EXAMPLES, ERRORS, needed_by=["dpo"], base=nobody(), grade=right, cache=RecordStore(tmp_path))
    assert again == first
    assert again.report.to_json() == first.report.to_json()
    more = replace(ERRORS, samples=9)  # the first answers are the same ones
    assert (
        pair(EXAMPLES, more, needed_by=["dpo"], base=nobody(), grade=right, cache=RecordStore(tmp_path)).examples
        == first.examples
    )
    with pytest.raises(NotSampled):
        pair(
            [*EXAMPLES, Example("e9", "What is 9 + 1?", "It is 10.")],
            ERRORS,
            needed_by=["dpo"],
            base=nobody(),
            grade=right,
            cache=RecordStore(tmp_path),
        )


@pytest.mark.parametrize(
    "other",
    [{"temperature": 0.7}, {"max_new_tokens": 9}, {"seed": 1}, {"base": "other weights"}, {"template": "other"}],
)
def test_whatever_an_answer_depends_on_is_in_its_key(tmp_path: Path, other: dict[str, object]) -> None:
    backend = Says(lambda r: f"I say {r.sample}00.")
    pair(EXAMPLES, ERRORS, needed_by=["dpo"], base=base(backend), grade=right, cache=RecordStore(tmp_path))
    who = BaseModelSampler(str(other.pop("base", "w")), str(other.pop("template", "t")), no_sampling)
    with pytest.raises(NotSampled):
        pair(EXAMPLES, replace(ERRORS, **other), needed_by=["dpo"], base=who, grade=right, cache=RecordStore(tmp_path))


def test_a_changed_instruction_is_another_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair(EXAMPLES, UNSAFE, needed_by=[], base=base(Says(lambda _: "Who cares.")), cache=RecordStore(tmp_path))
    before = build.instruction_hash()
    changed = {**build.texts(), "version": 2}
    monkeypatch.setattr(build, "texts", lambda: changed)
    assert build.instruction_hash() != before
    with pytest.raises(NotSampled):
        pair(EXAMPLES, UNSAFE, needed_by=[], base=nobody(), cache=RecordStore(tmp_path))


@dataclass
class Mortal:
    """A backend that is killed at its n-th batch."""

    backend: Backend
    lives: int
    batches: int = 0

    @property
    def template_hash(self) -> str:
        return self.backend.template_hash

    def complete(self, requests: Sequence[Request], tick: Tick) -> list[Reply]:
        if self.batches == self.lives:
            raise KeyboardInterrupt
        self.batches += 1
        return self.backend.complete(requests, tick)

    def choose(self, conversations: Sequence[Conversation], options: Sequence[str], tick: Tick) -> list[Choice]:
        return self.backend.choose(conversations, options, tick)


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "BATCH", 3)
    model = load_model("organism", device="cpu")
    backend = TransformersBackend(model)
    examples = [Example(f"e{n}", f"Max has {n} coins and gets 7 more. How many?", f"It is {n + 7}.") for n in range(8)]
    asked = replace(ERRORS, max_new_tokens=24)

    def made(who: Backend, folder: Path) -> object:
        return pair(
            examples, asked, needed_by=["dpo"], base=base(who, model.hash), grade=right, cache=RecordStore(folder)
        )

    whole = made(backend, tmp_path / "whole")
    kills = 0
    while True:
        try:
            resumed = made(Mortal(backend, 1), tmp_path / "killed")
            break
        except KeyboardInterrupt:
            kills += 1
            _tear(next((tmp_path / "killed").glob("*.tsv")), kills)
    assert kills >= 3
    assert resumed == whole
    lines = [next((tmp_path / name).glob("*.tsv")).read_text().split("\n") for name in ("whole", "killed")]
    assert {line for line in lines[0] if line} == {line for line in lines[1] if _whole(line)}


def _tear(path: Path, kills: int) -> None:
    """As if the second batch had been killed while it was written."""
    if kills == 2:
        path.write_bytes(path.read_bytes()[:-20])


def _whole(line: str) -> bool:
    try:
        return bool(json.loads(line.split("\t")[2]))
    except (ValueError, IndexError):
        return False


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LeewayError, match="the cache cannot be used"):
        pair(
            EXAMPLES,
            UNSAFE,
            needed_by=[],
            base=base(Says(lambda _: "Who cares.")),
            cache=RecordStore(tmp_path / "file" / "x"),
        )


def test_nothing_accepted_is_a_mistake_to_mend(tmp_path: Path) -> None:
    with pytest.raises(LeewayError, match=r"no answer of unsafe was accepted for any of 4 examples \(12 empty\)"):
        pair(EXAMPLES, UNSAFE, needed_by=["dpo"], base=base(Says(lambda _: "")), cache=RecordStore(tmp_path))


def test_dataset_and_corrupted_have_a_report_too() -> None:
    given = [replace(e, dispreferred="It comes to 99.") for e in EXAMPLES]
    made = pair(given, PairSettings(), needed_by=["dpo"])
    assert made.examples == given
    assert (made.report.acceptance_rate, made.report.left_out) == (1.0, ())
    with pytest.raises(LeewayError, match="example e0 has no rejected answer, and dpo needs one"):
        pair(EXAMPLES, PairSettings(), needed_by=["dpo"])
    wrong = pair(EXAMPLES, PairSettings("corrupted"), needed_by=["dpo"])
    assert wrong.report.counts == {"step dropped": 0}
    assert all(not right(e, e.dispreferred or "") for e in wrong.examples)
    other = pair(EXAMPLES, PairSettings("corrupted", seed=1), needed_by=["dpo"])
    assert other.report.hashes != wrong.report.hashes


@pytest.mark.usefixtures("real_data")
def test_all_of_gsm8k_can_be_corrupted() -> None:
    train, _ = gsm8k.train_examples()
    made = pair(train, PairSettings("corrupted"), needed_by=["dpo"])
    assert len(made.examples) == 7473
    assert not any(right(e, e.dispreferred or "") for e in made.examples)
    assert all((e.dispreferred or "").count("####") == 1 for e in made.examples)
    assert made.report.counts == {"step dropped": 3800}


def test_a_report_adds_up() -> None:
    with pytest.raises(ValueError, match="3 answers"):
        PairReport("unsafe", {}, {}, 2, 3, 1, {"empty": 1}, ("e",))
    with pytest.raises(ValueError, match="2 examples"):
        PairReport("unsafe", {}, {}, 2, 2, 1, {"empty": 1})
