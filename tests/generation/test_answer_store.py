"""A checkpoint's own answers kept by content: the same bits with and without, nothing generated twice."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from leeway.errors import LeewayError
from leeway.generation.backend import Choice, Conversation, Reply, Request, Tick
from leeway.generation.cache import AnswerStore, AnswerStoreBackend
from leeway.generation.transformers import TransformersBackend
from leeway.model.load import load_model


@dataclass
class Counting:
    """Says each request's place in its call, so that what is asked together shows in the answer."""

    identity: str = "counting"
    template_hash: str = "t"
    calls: list[list[str]] = field(default_factory=list)

    def complete(self, requests: Seq[Request], tick: Tick) -> list[Reply]:
        self.calls.append([r.conversation[0]["content"] for r in requests])
        tick(len(requests))
        return [Reply(f"{r.conversation[0]['content']} is {k}", 1, False) for k, r in enumerate(requests)]

    def choose(self, conversations: Seq[Conversation], options: Seq[str], tick: Tick) -> list[Choice]:
        self.calls.append([c[0]["content"] for c in conversations])
        tick(len(conversations))
        return [Choice(dict.fromkeys(options, 0.1), "NaN" if c[0]["content"] == "bad" else None) for c in conversations]


def said(*texts: str) -> list[Request]:
    return [Request([{"role": "user", "content": t}], 4) for t in texts]


def test_a_portion_is_asked_once_and_a_request_once_a_call(tmp_path: Path) -> None:
    inner, ticks = Counting(), []
    asked = AnswerStoreBackend(inner, AnswerStore(tmp_path), "me", portion=2)
    first = asked.complete(said("a", "b", "a", "c"), ticks.append)
    assert inner.calls == [["a", "b"], ["c"]]
    assert [r.text for r in first] == ["a is 0", "b is 1", "a is 0", "c is 0"]
    assert sum(ticks) == 4
    again = AnswerStoreBackend(inner, AnswerStore(tmp_path), "me", portion=2)
    assert again.complete(said("a", "b", "a", "c"), ticks.append) == first
    assert len(inner.calls) == 2
    assert sum(ticks) == 8


def test_what_else_the_bits_depend_on_is_in_the_key(tmp_path: Path) -> None:
    inner = Counting()
    for made_by, template, limit in (("me", "t", 4), ("other", "t", 4), ("me", "u", 4), ("me", "t", 5)):
        inner.template_hash = template
        request = Request([{"role": "user", "content": "a"}], limit)
        AnswerStoreBackend(inner, AnswerStore(tmp_path), made_by, 2).complete([request], lambda _: None)
    assert len(inner.calls) == 4
    # beside another request its bits may differ: an answer is never taken out of its portion
    AnswerStoreBackend(inner, AnswerStore(tmp_path), "me", 2).complete([request, *said("b")], lambda _: None)
    assert len(inner.calls) == 5


def test_choices_and_their_failures_come_back_as_they_were(tmp_path: Path) -> None:
    inner = Counting()
    asked = AnswerStoreBackend(inner, AnswerStore(tmp_path), "me", 8)
    talk = [[{"role": "user", "content": t}] for t in ("bad", "good", "good")]
    first = asked.choose(talk, ["Yes", "No"], lambda _: None)
    assert asked.choose(talk, ["Yes", "No"], lambda _: None) == first
    assert (first[0].failure, first[1].failure) == ("NaN", None)
    assert inner.calls == [["bad", "good"]]
    asked.choose(talk, ["No", "Yes"], lambda _: None)
    assert len(inner.calls) == 2


def test_a_damaged_portion_is_one_line(tmp_path: Path) -> None:
    asked = AnswerStoreBackend(Counting(), AnswerStore(tmp_path), "me", 2)
    asked.complete(said("a"), lambda _: None)
    (file,) = tmp_path.rglob("*.json")
    file.write_text(file.read_text().replace("a is 0", "a is 9"))
    with pytest.raises(LeewayError, match="damaged"):
        asked.complete(said("a"), lambda _: None)


def test_a_model_says_the_same_with_and_without(models: dict[str, Path], tmp_path: Path) -> None:
    model = load_model(str(models["llama"]), dtype="float32", device="cpu")
    backend = TransformersBackend(model, batch=2)
    requests = [Request([{"role": "user", "content": "How many " * n}], 5) for n in (1, 5, 2, 4)]
    plain = backend.complete(requests, lambda _: None)
    for _ in range(2):  # computed, then read
        kept = AnswerStoreBackend(backend, AnswerStore(tmp_path), "me", 8)
        assert kept.complete(requests, lambda _: None) == plain
