"""What was said, kept by content: an answer that was paid for is never asked for twice.

One SQLite file in WAL mode, safe for several processes at once and for a kill at any moment. Every record carries a
checksum, so that a damaged one is an error and never an answer. WAL needs a local disk: not a network file system.

A checkpoint's own answers, kept by content: what was generated once is not generated again, to the bit.

In float32 a near tie may fall otherwise beside other requests, so what is kept is not one answer but a portion: the
replies to one list of requests, under a key of all that their bits depend on. A portion that is read is the one that
would have been computed, so that a run has the same bytes with and without what is kept, and a resumed one those of an
uninterrupted one. One file a portion, whole or not there: no lock, no database, any file system.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from leeway.errors import LeewayError
from leeway.generation.backend import Backend, Choice, Conversation, Reply, Request, Tick, is_unicode
from leeway.hashing import digest
from leeway.io import atomic_write, verify_checksum, with_checksum

Record = dict[str, Any]
Said = TypeVar("Said", Reply, Choice)

TABLE = "CREATE TABLE IF NOT EXISTS said (key TEXT PRIMARY KEY, record TEXT NOT NULL, sum TEXT NOT NULL) WITHOUT ROWID"
PATIENCE_S = 60.0  # how long a writer waits for another
PORTION = 256  # requests asked at a time of a backend that tells its answers only at the end
LOOKED_UP = 500  # keys in one query


class ReplyCache:
    """Records by key in one file; a key's first record stands."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._lock = threading.RLock()
        self._open: tuple[int, sqlite3.Connection] | None = None

    def get(self, keys: Seq[str]) -> dict[str, Record]:
        """The records that are there. Raises LeewayError where the file or one of them is damaged.

        A record with a lone surrogate is no answer, since no file of a run can hold it: it is removed.
        """
        found: dict[str, Record] = {}
        unusable: list[str] = []
        with self._told() as db:
            for start in range(0, len(keys), LOOKED_UP):
                some = keys[start : start + LOOKED_UP]
                marks = ",".join("?" * len(some))
                for key, record, check in db.execute(f"SELECT * FROM said WHERE key IN ({marks})", some):
                    if digest(key, record) != check:
                        raise self._damaged(f"record {key} is not what was written")
                    found[key] = json.loads(record)
                    if not is_unicode(json.dumps(found[key], ensure_ascii=False)):
                        del found[key]
                        unusable.append(key)
            if unusable:
                with db:
                    db.executemany("DELETE FROM said WHERE key = ?", [(key,) for key in unusable])
        return found

    def put(self, records: dict[str, Record]) -> None:
        """Write what is new, whole or not at all, to the disk before it returns."""
        texts = {k: json.dumps(r, sort_keys=True) for k, r in records.items()}
        with self._told() as db, db:
            db.executemany(
                "INSERT OR IGNORE INTO said VALUES (?, ?, ?)", [(k, t, digest(k, t)) for k, t in texts.items()]
            )

    def __len__(self) -> int:
        with self._told() as db:
            return int(db.execute("SELECT count(*) FROM said").fetchone()[0])

    def close(self) -> None:
        with self._lock:
            if self._open is not None and self._open[0] == os.getpid():
                self._open[1].close()
            self._open = None

    def __del__(self) -> None:
        self.close()

    def __reduce__(self) -> tuple[type[ReplyCache], tuple[Path]]:
        """A worker process opens the file itself: a connection does not outlive a fork."""
        return ReplyCache, (self.path,)

    def _connected(self) -> sqlite3.Connection:
        if self._open is None or self._open[0] != os.getpid():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            db = sqlite3.connect(self.path, timeout=PATIENCE_S, check_same_thread=False)
            try:
                _prepare(db)
            except BaseException:
                db.close()
                raise
            self._open = (os.getpid(), db)
        return self._open[1]

    @contextmanager
    def _told(self) -> Iterator[sqlite3.Connection]:
        """The connection, its many errors turned into one line."""
        try:
            with self._lock:
                yield self._connected()
        except sqlite3.OperationalError as error:
            raise LeewayError(
                f"{self.path}: answers cannot be kept ({error})",
                fix="see that the disk is local, writable and has room, and that no other program holds the file",
            ) from error
        except (sqlite3.DatabaseError, ValueError) as error:
            raise self._damaged(str(error)) from error
        except OSError as error:
            raise LeewayError(
                f"{self.path}: answers cannot be kept ({error.strerror})", fix="give another folder"
            ) from error

    def _damaged(self, why: str) -> LeewayError:
        return LeewayError(
            f"{self.path}: the kept answers are damaged ({why})",
            fix="bring back a copy, or move the file and its -wal and -shm away: what it held is asked again",
        )


def _prepare(db: sqlite3.Connection) -> None:
    """WAL and the table; SQLite does not wait while another process switches the same file to WAL, so this does."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=FULL")
            with db:
                db.execute(TABLE)
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


@runtime_checkable
class StreamingBackend(Protocol):
    """A backend that tells each answer, by its request's place, as soon as it is there, and in no set order."""

    def complete_each(self, requests: Seq[Request], told: Callable[[int, Reply], None]) -> None: ...

    def choose_each(
        self, conversations: Seq[Conversation], options: Seq[str], told: Callable[[int, Choice], None]
    ) -> None: ...


@dataclass
class CachedBackend:
    """Asks `backend` only what `kept` does not hold; answers that failed are not kept.

    Each answer is on the disk as soon as it is there: at once from a backend that tells them one by one (`Telling`),
    else after every PORTION requests. A request that occurs twice in one call is asked once.
    """

    backend: Backend
    kept: ReplyCache

    @property
    def identity(self) -> str:
        return self.backend.identity

    @property
    def template_hash(self) -> str:
        return self.backend.template_hash

    def complete(self, requests: Seq[Request], tick: Tick) -> list[Reply]:
        """One reply per request, in their order; raises what the backend raises, with what was said before kept."""
        who = (self.identity, self.template_hash)
        keys = [
            digest("complete", *who, r.conversation, r.max_new_tokens, float(r.temperature), r.sample, r.seed)
            for r in requests
        ]

        def ask(missing: Seq[int], told: Callable[[int, Reply], None]) -> None:
            wanted = [requests[i] for i in missing]
            if isinstance(self.backend, StreamingBackend):
                self.backend.complete_each(wanted, told)
            else:
                _by_portions(wanted, lambda some: self.backend.complete(some, _silent), told)

        return self._said(keys, Reply, ask, tick)

    def choose(self, conversations: Seq[Conversation], options: Seq[str], tick: Tick) -> list[Choice]:
        """One choice per conversation, in their order."""
        who = (self.identity, self.template_hash)
        keys = [digest("choose", *who, c, list(options)) for c in conversations]

        def ask(missing: Seq[int], told: Callable[[int, Choice], None]) -> None:
            wanted = [conversations[i] for i in missing]
            if isinstance(self.backend, StreamingBackend):
                self.backend.choose_each(wanted, options, told)
            else:
                _by_portions(wanted, lambda some: self.backend.choose(some, options, _silent), told)

        return self._said(keys, Choice, ask, tick)

    def _said(
        self,
        keys: Seq[str],
        kind: type[Said],
        ask: Callable[[Seq[int], Callable[[int, Said], None]], None],
        tick: Tick,
    ) -> list[Said]:
        """What is kept and what is asked now, by key; `ask` gets the places where each missing key first occurs."""
        said = {k: kind(**r) for k, r in self.kept.get(list(dict.fromkeys(keys))).items()}
        places: dict[str, list[int]] = {}
        for i, key in enumerate(keys):
            places.setdefault(key, []).append(i)
        missing = [key for key in places if key not in said]
        if there := len(keys) - sum(len(places[k]) for k in missing):
            tick(there)

        def told(number: int, answer: Said) -> None:
            key = missing[number]
            if answer.failure is None:
                self.kept.put({key: asdict(answer)})
            said[key] = answer
            tick(len(places[key]))

        if missing:
            ask([places[k][0] for k in missing], told)
        return [said[k] for k in keys]


def _by_portions(
    wanted: Seq[Any], answered: Callable[[Seq[Any]], Seq[Said]], told: Callable[[int, Said], None]
) -> None:
    for start in range(0, len(wanted), PORTION):
        for k, answer in enumerate(answered(wanted[start : start + PORTION])):
            told(start + k, answer)


def _silent(_: int) -> None:
    """Progress is told as answers are kept."""


@dataclass(frozen=True)
class AnswerStore:
    """A folder of portions by key."""

    folder: Path

    def get(self, key: str) -> list[dict[str, Any]] | None:
        """The records of a portion, or none; raises LeewayError where its file is damaged."""
        path = self._path(key)
        try:
            return list(verify_checksum(json.loads(path.read_text("utf-8")))["said"])
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
            with atomic_write(path) as scratch:
                scratch.write_text(
                    json.dumps(with_checksum({"said": records}), sort_keys=True, ensure_ascii=False), "utf-8"
                )
        except OSError as error:
            raise LeewayError(f"{path}: answers cannot be kept ({error.strerror})", fix="make room") from error

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"


@dataclass(frozen=True)
class AnswerStoreBackend:
    """Asks `backend` in portions of `portion` requests, each only if `answers` does not hold it.

    `made_by` is the identity of all that its answers depend on beside the requests and the template: weights, adapter,
    dtype, batch, threads, versions. A request that occurs twice in one call is asked once.
    """

    backend: Backend
    answers: AnswerStore
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
