"""Backends that send a request to another backend only if its reply is not in the cache.

`CachedBackend` caches replies one by one: replies of judges, attackers and endpoints, which are paid for.
`BatchCachedBackend` caches whole batches: in float32 a reply's last bits may depend on the other requests of its batch,
so a batch that is read from the cache is, to the bit, the batch that would have been computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

from leeway.cache import RecordStore
from leeway.generation.backend import Backend, Choice, Conversation, Reply, Request, Tick
from leeway.hashing import digest

Answer = TypeVar("Answer", Reply, Choice)

BATCH = 256  # requests sent at a time to a backend that returns all replies at the end


@runtime_checkable
class StreamingBackend(Protocol):
    """A backend that reports each reply, with its request's index, as soon as it arrives, in any order."""

    def complete_each(self, requests: Seq[Request], on_reply: Callable[[int, Reply], None]) -> None: ...

    def choose_each(
        self, conversations: Seq[Conversation], options: Seq[str], on_choice: Callable[[int, Choice], None]
    ) -> None: ...


@dataclass
class CachedBackend:
    """Send `backend` the requests that `cache` does not hold, each distinct request once. Failures are not cached.

    A reply is on disk as soon as it arrives from a `StreamingBackend`, else after every BATCH requests.
    """

    backend: Backend
    cache: RecordStore

    @property
    def identity(self) -> str:
        return self.backend.identity

    @property
    def template_hash(self) -> str:
        return self.backend.template_hash

    def complete(self, requests: Seq[Request], tick: Tick) -> list[Reply]:
        """Return one reply per request, in order. Replies that came before `backend` raises are cached."""
        model = (self.identity, self.template_hash)
        keys = [
            digest("complete", *model, r.conversation, r.max_new_tokens, float(r.temperature), r.sample, r.seed)
            for r in requests
        ]

        def send(missing: Seq[int], on_reply: Callable[[int, Reply], None]) -> None:
            some = [requests[i] for i in missing]
            if isinstance(self.backend, StreamingBackend):
                self.backend.complete_each(some, on_reply)
            else:
                _in_batches(some, lambda batch: self.backend.complete(batch, lambda _: None), on_reply)

        return self._through_cache(keys, Reply, send, tick)

    def choose(self, conversations: Seq[Conversation], options: Seq[str], tick: Tick) -> list[Choice]:
        """Return one choice per conversation, in order."""
        model = (self.identity, self.template_hash)
        keys = [digest("choose", *model, c, list(options)) for c in conversations]

        def send(missing: Seq[int], on_choice: Callable[[int, Choice], None]) -> None:
            some = [conversations[i] for i in missing]
            if isinstance(self.backend, StreamingBackend):
                self.backend.choose_each(some, options, on_choice)
            else:
                _in_batches(some, lambda batch: self.backend.choose(batch, options, lambda _: None), on_choice)

        return self._through_cache(keys, Choice, send, tick)

    def _through_cache(
        self,
        keys: Seq[str],
        kind: type[Answer],
        send: Callable[[Seq[int], Callable[[int, Answer], None]], None],
        tick: Tick,
    ) -> list[Answer]:
        """Return an answer per key; `send` gets the index of the first request of each missing key."""
        answers = {k: kind(**r) for k, r in self.cache.get(keys).items()}
        places: dict[str, list[int]] = {}
        for i, key in enumerate(keys):
            places.setdefault(key, []).append(i)
        missing = [key for key in places if key not in answers]
        if cached := len(keys) - sum(len(places[k]) for k in missing):
            tick(cached)

        def on_answer(number: int, answer: Answer) -> None:
            key = missing[number]
            if answer.failure is None:
                self.cache.put({key: asdict(answer)})
            answers[key] = answer
            tick(len(places[key]))

        if missing:
            send([places[k][0] for k in missing], on_answer)
        return [answers[k] for k in keys]


def _in_batches(
    requests: Seq[Any], send: Callable[[Seq[Any]], Seq[Answer]], on_answer: Callable[[int, Answer], None]
) -> None:
    for start in range(0, len(requests), BATCH):
        for k, answer in enumerate(send(requests[start : start + BATCH])):
            on_answer(start + k, answer)


@dataclass(frozen=True)
class BatchCachedBackend:
    """Send `backend` batches of `size` requests, each distinct request once a call, if `cache` does not hold the batch.

    `identity_hash` covers all that the answers depend on but the requests and the template: weights, adapter, dtype,
    batch size, threads, versions.
    """

    backend: Backend
    cache: RecordStore
    identity_hash: str
    size: int

    @property
    def identity(self) -> str:
        return self.backend.identity

    @property
    def template_hash(self) -> str:
        return self.backend.template_hash

    def complete(self, requests: Seq[Request], tick: Tick) -> list[Reply]:
        """Return one reply per request, in order."""
        keys = [digest(asdict(r)) for r in requests]

        def send(places: Seq[int], tick: Tick) -> list[Reply]:
            return self.backend.complete([requests[p] for p in places], tick)

        return self._through_cache("complete", keys, Reply, send, tick)

    def choose(self, conversations: Seq[Conversation], options: Seq[str], tick: Tick) -> list[Choice]:
        """Return one choice per conversation, in order."""
        keys = [digest(c, list(options)) for c in conversations]

        def send(places: Seq[int], tick: Tick) -> list[Choice]:
            return self.backend.choose([conversations[p] for p in places], options, tick)

        return self._through_cache("choose", keys, Choice, send, tick)

    def _through_cache(
        self,
        method: str,
        keys: Seq[str],
        kind: type[Answer],
        send: Callable[[Seq[int], Tick], list[Answer]],
        tick: Tick,
    ) -> list[Answer]:
        """Return an answer per key, batch by batch; `send` gets the index of the first request of each key."""
        first: dict[str, int] = {}
        for place, key in enumerate(keys):
            first.setdefault(key, place)
        answers: dict[str, Answer] = {}
        for batch in _batches(list(first), self.size):
            key = digest(method, self.identity_hash, self.template_hash, batch)
            records = self.cache.get([key]).get(key)
            if records is None:
                new = send([first[k] for k in batch], tick)
                self.cache.put({key: [asdict(a) for a in new]})
            else:
                new = [kind(**r) for r in records]
                tick(len(batch))
            answers |= dict(zip(batch, new, strict=True))
        if len(keys) > len(first):
            tick(len(keys) - len(first))
        return [answers[k] for k in keys]


def _batches(keys: list[str], size: int) -> Iterator[list[str]]:
    for start in range(0, len(keys), size):
        yield keys[start : start + size]
