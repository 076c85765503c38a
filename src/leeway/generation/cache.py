"""Backends that send a request to another backend only if its reply is not in the cache.

`CachedBackend` caches replies one by one: replies of judges, attackers and endpoints, which are paid for.
`BatchCachedBackend` caches whole batches: in float32 a reply's last bits may depend on the other requests of its batch,
so a batch that is read from the cache is, to the bit, the batch that would have been computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

from leeway.cache import RecordStore
from leeway.generation.backend import (
    CUT_THINKING,
    ENDED_THINKING,
    Backend,
    Choice,
    Conversation,
    Reply,
    Request,
    Tick,
)
from leeway.hashing import digest

Answer = TypeVar("Answer", Reply, Choice)
Method = Literal["complete", "choose"]

BATCH = 256  # requests sent at a time to a backend that returns all replies at the end


@dataclass(frozen=True)
class _Wrapper:
    """The identity of `backend`, and a store of answers."""

    backend: Backend
    cache: RecordStore

    @property
    def identity(self) -> str:
        return self.backend.identity

    @property
    def template_hash(self) -> str:
        return self.backend.template_hash


@dataclass(frozen=True)
class CachedBackend(_Wrapper):
    """Send `backend` the requests that `cache` does not hold, each distinct request once.

    Failures are not cached, except replies without a final answer (cut off inside their thinking).

    A reply is on disk as soon as it arrives from a backend that has `complete_each` and `choose_each` (an endpoint's),
    else after every BATCH requests.
    """

    def complete(self, requests: Seq[Request], tick: Tick) -> list[Reply]:
        """Return one reply per request, in order. Replies that came before `backend` raises are cached."""
        model = (self.identity, self.template_hash)
        keys = [
            digest("complete", *model, r.conversation, r.max_new_tokens, float(r.temperature), r.sample, r.seed)
            for r in requests
        ]
        return self._through_cache("complete", Reply, keys, requests, (), tick)

    def choose(self, conversations: Seq[Conversation], options: Seq[str], tick: Tick) -> list[Choice]:
        """Return one choice per conversation, in order."""
        model = (self.identity, self.template_hash)
        keys = [digest("choose", *model, c, list(options)) for c in conversations]
        return self._through_cache("choose", Choice, keys, conversations, (options,), tick)

    def _through_cache(
        self, method: Method, kind: type[Answer], keys: Seq[str], requests: Seq[Any], args: tuple[Any, ...], tick: Tick
    ) -> list[Answer]:
        """Return the answer of `method` per request and key; `args` follow the requests."""
        answers = {k: kind(**r) for k, r in self.cache.get(keys).items()}
        missing = {k: r for k, r in zip(keys, requests, strict=True) if k not in answers}
        names, unsent, counts = list(missing), list(missing.values()), Counter(keys)
        if cached := len(keys) - sum(counts[k] for k in names):
            tick(cached)

        each = getattr(self.backend, f"{method}_each", None)
        with self.cache.writer() as put:

            def on_answer(number: int, answer: Answer) -> None:
                key = names[number]
                if answer.failure is None or answer.failure in (CUT_THINKING, ENDED_THINKING):
                    put(key, asdict(answer))
                answers[key] = answer
                tick(counts[key])

            if each and unsent:
                each(unsent, *args, on_answer)
            for start in () if each else range(0, len(unsent), BATCH):
                batch = getattr(self.backend, method)(unsent[start : start + BATCH], *args, lambda _: None)
                for number, answer in enumerate(batch, start):
                    on_answer(number, answer)
        return [answers[k] for k in keys]


@dataclass(frozen=True)
class BatchCachedBackend(_Wrapper):
    """Send `backend` batches of `size` requests, each distinct request once a call, if `cache` does not hold the batch.

    `identity_hash` covers all that the answers depend on but the requests and the template: weights, adapter, dtype,
    batch size, threads, versions.
    """

    identity_hash: str
    size: int

    def complete(self, requests: Seq[Request], tick: Tick) -> list[Reply]:
        """Return one reply per request, in order."""
        return self._through_cache("complete", Reply, [digest(asdict(r)) for r in requests], requests, (), tick)

    def choose(self, conversations: Seq[Conversation], options: Seq[str], tick: Tick) -> list[Choice]:
        """Return one choice per conversation, in order."""
        keys = [digest(c, list(options)) for c in conversations]
        return self._through_cache("choose", Choice, keys, conversations, (options,), tick)

    def _through_cache(
        self, method: Method, kind: type[Answer], keys: Seq[str], requests: Seq[Any], args: tuple[Any, ...], tick: Tick
    ) -> list[Answer]:
        """Return the answer of `method` per request and key, batch by batch; `args` follow the requests."""
        by_key = dict(zip(keys, requests, strict=True))
        distinct, answers = list(by_key), dict[str, Answer]()
        for start in range(0, len(distinct), self.size):
            batch = distinct[start : start + self.size]
            key = digest(method, self.identity_hash, self.template_hash, batch)
            records = self.cache.get([key]).get(key)
            if records is None:
                new = getattr(self.backend, method)([by_key[k] for k in batch], *args, tick)
                self.cache.put({key: [asdict(a) for a in new]})
            else:
                new = [kind(**r) for r in records]
                tick(len(batch))
            answers |= zip(batch, new, strict=True)
        if len(keys) > len(distinct):
            tick(len(keys) - len(distinct))
        return [answers[k] for k in keys]
