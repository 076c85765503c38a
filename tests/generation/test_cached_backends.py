"""Backends behind a cache: a reply is generated once, the same bits with and without, and failures are not cached."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from leeway.cache import RecordStore
from leeway.generation import cache as cache_module
from leeway.generation.backend import Choice, Conversation, Reply, Request, Tick
from leeway.generation.cache import BatchCachedBackend, CachedBackend
from leeway.generation.transformers import TransformersBackend
from leeway.model.load import load_model


@dataclass
class Echo:
    """Replies with the prompt; fails if it contains `fail`, and raises if it contains `die`."""

    identity: str = "echo"
    template_hash: str = "plain"
    asked: list[object] = field(default_factory=list)

    def complete(self, requests: Seq[Request], tick: Tick) -> list[Reply]:
        return [self._reply(r, tick) for r in requests]

    def _reply(self, request: Request, tick: Tick) -> Reply:
        text = request.conversation[-1]["content"]
        if "die" in text:
            raise KeyboardInterrupt
        self.asked.append(request)
        tick(1)
        return Reply("", 0, False, "no luck") if "fail" in text else Reply(f"{text} {request.sample}", 3, True)

    def choose(self, conversations: Seq[Conversation], options: Seq[str], tick: Tick) -> list[Choice]:
        self.asked += conversations
        tick(len(conversations))
        return [Choice({o: float(len(c[-1]["content"])) for o in options}) for c in conversations]


@dataclass
class Streaming(Echo):
    """The same as a streaming backend, in reverse order."""

    def complete_each(self, requests: Seq[Request], on_reply: Callable[[int, Reply], None]) -> None:
        for i in reversed(range(len(requests))):
            on_reply(i, self._reply(requests[i], lambda _: None))

    def choose_each(
        self, conversations: Seq[Conversation], options: Seq[str], on_reply: Callable[[int, Choice], None]
    ) -> None:
        for i in reversed(range(len(conversations))):
            on_reply(i, self.choose([conversations[i]], options, lambda _: None)[0])


def user(text: str) -> Conversation:
    return [{"role": "user", "content": text}]


def request(text: str) -> Request:
    return Request(user(text), 8)


@pytest.fixture
def store(tmp_path: Path) -> RecordStore:
    return RecordStore(tmp_path / "deep" / "replies")


@pytest.mark.parametrize("kind", [Echo, Streaming])
def test_only_missing_requests_are_sent_and_duplicates_once(store: RecordStore, kind: type[Echo]) -> None:
    asked = [request(t) for t in ("a", "b", "a", "fail", "c", "fail")]
    expected = [f"{t} 0" for t in "aba"] + [None, "c 0", None]
    ticks: list[int] = []
    first = kind()
    replies = CachedBackend(first, store).complete(asked, ticks.append)
    assert [r.text if r.failure is None else None for r in replies] == expected
    assert replies[0] == Reply("a 0", 3, True)
    assert len(first.asked) == 4  # a, b, fail, c
    assert sum(ticks) == 6
    second = kind()
    ticks.clear()
    assert CachedBackend(second, store).complete([*asked, request("d")], ticks.append)[:6] == replies
    assert {r.conversation[0]["content"] for r in second.asked} == {"fail", "d"}  # type: ignore[attr-defined]
    assert sum(ticks) == 7
    assert len(store) == 4


@pytest.mark.parametrize("kind", [Echo, Streaming])
def test_choices_are_cached_by_conversation_and_options(store: RecordStore, kind: type[Echo]) -> None:
    backend = kind()
    keeping = CachedBackend(backend, store)
    asked = [user("a"), user("bb"), user("a")]
    choices = keeping.choose(asked, ["Yes", "No"], lambda _: None)
    assert choices == [Choice({"Yes": n, "No": n}) for n in (1.0, 2.0, 1.0)]
    assert keeping.choose(asked, ["Yes", "No"], lambda _: None) == choices
    assert len(backend.asked) == 2
    keeping.choose(asked, ["Yes"], lambda _: None)
    assert len(backend.asked) == 4


def test_all_that_shapes_a_reply_is_in_the_key(store: RecordStore) -> None:
    one = request("a")
    changes = [{"max_new_tokens": 9}, {"temperature": 1.0}, {"sample": 1}, {"seed": 1}, {"conversation": user("b")}]
    requests = [one, *(replace(one, **c) for c in changes)]  # type: ignore[arg-type]
    backends = [Echo(), Echo(identity="other"), Echo(template_hash="other")]
    for backend in backends:
        CachedBackend(backend, store).complete(requests, lambda _: None)
        assert len(backend.asked) == 6
    assert len(store) == 18
    whole = replace(one, temperature=0)  # 0 and 0.0 are one temperature
    again = Echo()
    CachedBackend(again, store).complete([whole], lambda _: None)
    assert again.asked == []


@pytest.mark.parametrize(("kind", "before"), [(Streaming, 3), (Echo, 2)])
def test_replies_before_an_interruption_are_cached(
    store: RecordStore, kind: type[Echo], before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One by one from a streaming backend; else all batches but the interrupted one."""
    monkeypatch.setattr(cache_module, "BATCH", 2)
    texts = ["a", "b", "die", "c", "d", "e"]
    with pytest.raises(KeyboardInterrupt):
        CachedBackend(kind(), store).complete([request(t) for t in texts], lambda _: None)
    assert len(store) == before


@dataclass
class Counting:
    """Replies with each request's index in its call, which shows the batches that were sent."""

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


def test_a_batch_is_generated_once_and_a_request_once_a_call(tmp_path: Path) -> None:
    inner, ticks = Counting(), []
    asked = BatchCachedBackend(inner, RecordStore(tmp_path), "me", size=2)
    first = asked.complete(said("a", "b", "a", "c"), ticks.append)
    assert inner.calls == [["a", "b"], ["c"]]
    assert [r.text for r in first] == ["a is 0", "b is 1", "a is 0", "c is 0"]
    assert sum(ticks) == 4
    again = BatchCachedBackend(inner, RecordStore(tmp_path), "me", size=2)
    assert again.complete(said("a", "b", "a", "c"), ticks.append) == first
    assert len(inner.calls) == 2
    assert sum(ticks) == 8


def test_all_that_the_bits_depend_on_is_in_the_key(tmp_path: Path) -> None:
    inner = Counting()
    for made_by, template, limit in (("me", "t", 4), ("other", "t", 4), ("me", "u", 4), ("me", "t", 5)):
        inner.template_hash = template
        request = Request([{"role": "user", "content": "a"}], limit)
        BatchCachedBackend(inner, RecordStore(tmp_path), made_by, 2).complete([request], lambda _: None)
    assert len(inner.calls) == 4
    # with another request its bits may differ: a reply is never taken out of its batch
    BatchCachedBackend(inner, RecordStore(tmp_path), "me", 2).complete([request, *said("b")], lambda _: None)
    assert len(inner.calls) == 5


def test_choices_and_their_failures_are_read_as_they_were(tmp_path: Path) -> None:
    inner = Counting()
    asked = BatchCachedBackend(inner, RecordStore(tmp_path), "me", 8)
    talk = [[{"role": "user", "content": t}] for t in ("bad", "good", "good")]
    first = asked.choose(talk, ["Yes", "No"], lambda _: None)
    assert asked.choose(talk, ["Yes", "No"], lambda _: None) == first
    assert (first[0].failure, first[1].failure) == ("NaN", None)
    assert inner.calls == [["bad", "good"]]
    asked.choose(talk, ["No", "Yes"], lambda _: None)
    assert len(inner.calls) == 2


def test_a_damaged_batch_is_generated_again(tmp_path: Path) -> None:
    backend = BatchCachedBackend(Counting(), RecordStore(tmp_path), "me", 2)
    first = backend.complete(said("a"), lambda _: None)
    (file,) = tmp_path.glob("*.tsv")
    file.write_text(file.read_text().replace("a is 0", "a is 9"))
    assert backend.complete(said("a"), lambda _: None) == first
    assert BatchCachedBackend(Counting(), RecordStore(tmp_path), "me", 2).complete(said("a"), lambda _: None) == first


def test_a_model_gives_the_same_replies_with_and_without(models: dict[str, Path], tmp_path: Path) -> None:
    model = load_model(str(models["llama"]), dtype="float32", device="cpu")
    backend = TransformersBackend(model, batch=2)
    requests = [Request([{"role": "user", "content": "How many " * n}], 5) for n in (1, 5, 2, 4)]
    plain = backend.complete(requests, lambda _: None)
    for _ in range(2):  # computed, then read
        kept = BatchCachedBackend(backend, RecordStore(tmp_path), "me", 8)
        assert kept.complete(requests, lambda _: None) == plain
