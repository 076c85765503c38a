"""A checkpoint's own answers, kept by content: what was generated once is not generated again, to the bit.

In float32 a near tie may fall otherwise beside other requests, so what is kept is not one answer but a portion: the
replies to one list of requests, under a key of all that their bits depend on. A portion that is read is the one that
would have been computed, so that a run has the same bytes with and without what is kept, and a resumed one those of an
uninterrupted one. One file a portion, whole or not there: no lock, no database, any file system.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from leeway.errors import LeewayError
from leeway.generation.backend import Backend, Choice, Conversation, Reply, Request, Tick
from leeway.hashing import digest, sealed, unsealed

Said = TypeVar("Said", Reply, Choice)


@dataclass(frozen=True)
class Answers:
    """A folder of portions by key."""

    folder: Path

    def get(self, key: str) -> list[dict[str, Any]] | None:
        """The records of a portion, or none; raises LeewayError where its file is damaged."""
        path = self._path(key)
        try:
            return list(unsealed(json.loads(path.read_text("utf-8")))["said"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise LeewayError(
                f"{path}: a kept answer is damaged ({error})", fix="delete that file: what it held is asked again"
            ) from error

    def put(self, key: str, records: list[dict[str, Any]]) -> None:
        """Written whole, or not at all; raises LeewayError where it cannot be written."""
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=".partial-", dir=path.parent)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(json.dumps(sealed({"said": records}), sort_keys=True, ensure_ascii=False))
            os.replace(name, path)
        except OSError as error:
            raise LeewayError(f"{path}: answers cannot be kept ({error.strerror})", fix="make room") from error

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"


@dataclass(frozen=True)
class AnsweredBackend:
    """Asks `backend` in portions of `portion` requests, each only if `answers` does not hold it.

    `made_by` is the identity of all that its answers depend on beside the requests and the template: weights, adapter,
    dtype, batch, threads, versions. A request that occurs twice in one call is asked once.
    """

    backend: Backend
    answers: Answers
    made_by: str
    portion: int

    @property
    def identity(self) -> str:
        return self.backend.identity

    @property
    def template_hash(self) -> str:
        return self.backend.template_hash

    def complete(self, requests: Seq[Request], tick: Tick) -> list[Reply]:
        """One reply per request, in their order; raises what the backend raises."""
        keys = [digest(asdict(r)) for r in requests]

        def ask(places: Seq[int], told: Tick) -> list[Reply]:
            return self.backend.complete(_at(requests, places), told)

        return self._said("complete", keys, Reply, ask, tick)

    def choose(self, conversations: Seq[Conversation], options: Seq[str], tick: Tick) -> list[Choice]:
        """One choice per conversation, in their order."""
        keys = [digest(c, list(options)) for c in conversations]

        def ask(places: Seq[int], told: Tick) -> list[Choice]:
            return self.backend.choose(_at(conversations, places), options, told)

        return self._said("choose", keys, Choice, ask, tick)

    def _said(
        self,
        what: str,
        keys: Seq[str],
        kind: type[Said],
        ask: Callable[[Seq[int], Tick], list[Said]],
        tick: Tick,
    ) -> list[Said]:
        """Every distinct request once, portion by portion; `ask` gets the places where each first occurs."""
        first: dict[str, int] = {}
        for place, key in enumerate(keys):
            first.setdefault(key, place)
        said: dict[str, Said] = {}
        for some in _portions(list(first), self.portion):
            key = digest(what, self.made_by, self.template_hash, some)
            records = self.answers.get(key)
            if records is None:
                found = ask([first[k] for k in some], tick)
                self.answers.put(key, [asdict(a) for a in found])
            else:
                found = [kind(**r) for r in records]
                tick(len(some))
            said |= dict(zip(some, found, strict=True))
        if len(keys) > len(first):
            tick(len(keys) - len(first))
        return [said[k] for k in keys]


def _at(asked: Seq[Any], places: Seq[int]) -> list[Any]:
    return [asked[p] for p in places]


def _portions(keys: list[str], size: int) -> Iterator[list[str]]:
    for start in range(0, len(keys), size):
        yield keys[start : start + size]
