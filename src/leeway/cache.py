"""A content-addressed cache of results that are expensive to compute, shared by processes, hosts and runs.

Its root is `LEEWAY_CACHE_DIR`, or `cache/` in the run directory (for converted models: the user's cache folder, since
every run shares them). Below the root:

    replies/<host>.tsv        replies of judges, attackers, translators and endpoints, by request
    answers/<host>.tsv        answers of checkpoints, by batch of requests
    verdicts/<host>.tsv       verdicts of local judges on stored answers (`leeway rescore`)
    pairs/<host>.tsv          answers of the base model that preference pairs are made of
    references/<hash>/        reference log-probs and hidden states (`model.reference`)
    models/<hash>/            chat models converted from GGUF files (`model.packaged`)
    leases/                   the unfinished runs that need it

A record is one line of a .tsv file: checksum, key, JSON. Processes on one host append to one file under a lock; several
hosts write a file each and read all of them, so any file system will do. A line that is damaged or was torn by a kill
is skipped: its record is computed again.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

from leeway.errors import LeewayError
from leeway.hashing import digest
from leeway.io import expand, flush_names, make_folder, open_lock, write_file

ENVIRONMENT = "LEEWAY_CACHE_DIR"
RecordKind = Literal["replies", "answers", "verdicts", "pairs"]
KINDS = ("replies", "answers", "verdicts", "pairs", "references", "models")
FOLDERS = ("references", "models")  # the kinds that are not records
LEASES = "leases"
WRITTEN_AT_ONCE = 256  # records of one flush of a writer
FIX = f"free some disk space, or set {ENVIRONMENT} to another folder"


class RecordStore:
    """JSON records by key in a folder of append-only files. The first valid record of a key is the one returned."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.RLock()
        self._offsets: dict[str, tuple[Path, int]] = {}
        self._scanned: dict[Path, int] = {}  # bytes of each file that are in `_offsets`

    def __reduce__(self) -> tuple[type[RecordStore], tuple[Path]]:
        return RecordStore, (self.folder,)

    def get(self, keys: Seq[str]) -> dict[str, Any]:
        """Return the records of those keys that are stored. Raises LeewayError where a file cannot be read."""
        with self._lock, _as_leeway_error(self.folder):
            if any(key not in self._offsets for key in keys):
                self._scan()
            found = self._read(keys)
            if len(found) < sum(key in self._offsets for key in set(keys)):  # cleared or changed since it was scanned
                self._offsets, self._scanned = {}, {}
                self._scan()
                found = self._read(keys)
        return found

    def put(self, records: Mapping[str, Any]) -> None:
        """Append the records whose keys are new, and flush them to disk. Raises LeewayError where it cannot write."""
        lines = {key: line for key, record in records.items() if (line := _line(key, record))}
        host = re.sub(r"[^\w.-]", "_", platform.node()) or "host"
        path = self.folder / f"{host}.tsv"
        with self._lock, _as_leeway_error(path):
            make_folder(self.folder)
            is_new = not path.exists()
            with path.open("a+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                self._scan()
                new = b"".join(line for key, line in lines.items() if key not in self._offsets)
                if new:
                    file.seek(max(file.seek(0, os.SEEK_END) - 1, 0))
                    ends_whole = file.read(1) in (b"", b"\n")  # the last line may have been torn by a kill
                    file.write((b"" if ends_whole else b"\n") + new)
                    file.flush()
                    os.fsync(file.fileno())
                    if is_new:
                        flush_names(self.folder)
                    self._scan()

    @contextmanager
    def writer(self) -> Iterator[Callable[[str, Any], None]]:
        """Yield a `put` of one record that returns at once; a thread writes all that has come since its last flush.

        All records are on disk when the context ends, however it ends. Raises LeewayError where one cannot be written,
        at the next record or at the end.
        """
        queue, failures = SimpleQueue[tuple[str, Any] | None](), list[Exception]()

        def put(key: str, record: Any) -> None:
            if failures:
                raise failures[0]
            queue.put((key, record))

        def write() -> None:
            while (first := queue.get()) is not None and not failures:
                batch = dict([first])
                while not queue.empty() and len(batch) < WRITTEN_AT_ONCE:
                    if (record := queue.get()) is None:
                        queue.put(None)
                        break
                    batch.setdefault(*record)
                try:
                    self.put(batch)
                except Exception as error:  # noqa: BLE001 - raised where the records come from
                    failures.append(error)

        thread = threading.Thread(target=write)
        thread.start()
        try:
            yield put
        finally:
            queue.put(None)
            thread.join()
        if failures:
            raise failures[0]

    def __len__(self) -> int:
        with self._lock, _as_leeway_error(self.folder):
            self._scan()
        return len(self._offsets)

    def _scan(self) -> None:
        """Index the lines that were added to any file since the last scan."""
        for path in sorted(self.folder.glob("*.tsv")):
            at, size = self._scanned.get(path, 0), path.stat().st_size
            if size == at:
                continue
            if size < at:  # cleared and written again
                self._offsets = {key: place for key, place in self._offsets.items() if place[0] != path}
                at = 0
            with path.open("rb") as file:
                file.seek(at)
                for line in file:
                    if not line.endswith(b"\n"):
                        break  # its writer is still at work, or was killed
                    if parsed := _parse(line):
                        self._offsets.setdefault(parsed[0], (path, at))
                    at += len(line)
            self._scanned[path] = at

    def _read(self, keys: Seq[str]) -> dict[str, Any]:
        """Read the indexed records; those that are no longer where the index says are left out."""
        by_path: dict[Path, list[tuple[int, str]]] = {}
        for key in dict.fromkeys(keys):
            if key in self._offsets:
                path, at = self._offsets[key]
                by_path.setdefault(path, []).append((at, key))
        found: dict[str, Any] = {}
        for path, places in by_path.items():
            if not path.is_file():
                continue
            with path.open("rb") as file:
                for at, key in sorted(places):
                    file.seek(at)
                    parsed = _parse(file.readline())
                    if parsed and parsed[0] == key:
                        found[key] = json.loads(parsed[1])
        return found


def _line(key: str, record: Any) -> bytes | None:
    """Return a record's line; None where it holds a lone surrogate, which no file of a run can hold."""
    try:
        text = json.dumps(record, sort_keys=True, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return None
    name = key.encode("utf-8")
    return b"\t".join((digest(name, text).encode(), name, text)) + b"\n"


def _parse(line: bytes) -> tuple[str, bytes] | None:
    """Return a line's key and JSON; None where it is damaged."""
    checksum, _, rest = line.removesuffix(b"\n").partition(b"\t")
    name, _, text = rest.partition(b"\t")
    return (name.decode("utf-8"), text) if digest(name, text).encode() == checksum else None


@contextmanager
def _as_leeway_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LeewayError(f"{path}: the cache cannot be used ({error.strerror})", fix=FIX) from error


class Cache:
    """The cache of one or several runs, in the folder `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._records: dict[str, RecordStore] = {}

    @classmethod
    def of(cls, run: Path) -> Cache:
        """Return the cache of a run directory: the shared one that LEEWAY_CACHE_DIR names, or the run's own."""
        return cls(shared_root() or run / "cache")

    def records(self, kind: RecordKind) -> RecordStore:
        return self._records.setdefault(kind, RecordStore(self.root / kind))

    @property
    def references(self) -> Path:
        """The folder of reference log-probs and hidden states."""
        return self.root / "references"

    def remove(self, kind: str) -> None:
        shutil.rmtree(self.root / kind, ignore_errors=True)
        self._records.pop(kind, None)

    def acquire(self, run: Path) -> None:
        """Write a lease that keeps `clear` from removing what the run in `run` needs to resume."""
        with self._exclusive(), _as_leeway_error(self.root):
            write_file(self._lease(run), self._run_path(run) + "\n")

    def release(self, run: Path) -> None:
        """Remove the lease of a finished run."""
        self._lease(run).unlink(missing_ok=True)

    def unfinished(self) -> list[Path]:
        """Return the folders of unfinished runs that hold a lease and still exist."""
        leases = sorted((self.root / LEASES).glob("*"))
        runs = [(self.root / lease.read_text("utf-8").strip()).resolve() for lease in leases]
        return [run for run in runs if (run / "study.yaml").is_file()]

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Return the number of records (for `FOLDERS`, of files) and the bytes on disk, by kind."""
        found = {}
        for kind in KINDS:
            files = [path for path in (self.root / kind).rglob("*") if path.is_file() and not path.name.startswith(".")]
            count = len(files) if kind in FOLDERS else len(RecordStore(self.root / kind))
            found[kind] = (count, sum(path.stat().st_size for path in files))
        return found

    def clear(self) -> None:
        """Remove all records and stale leases. Raises LeewayError while an unfinished run holds a lease."""
        with self._exclusive():
            if runs := self.unfinished():
                fix = "finish these runs with the command that began them, or delete their folders"
                raise LeewayError(f"{self.root}: not cleared, needed to resume {', '.join(map(str, runs))}", fix=fix)
            for kind in (*KINDS, LEASES):
                self.remove(kind)

    def _run_path(self, run: Path) -> str:
        """The run's path as its lease names it; relative if the cache is the run's own, so that both can be moved."""
        return ".." if self.root.resolve() == (run / "cache").resolve() else str(run.resolve())

    def _lease(self, run: Path) -> Path:
        return self.root / LEASES / digest("run", self._run_path(run))

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Hold the root's lock, so that no lease is written while the cache is cleared."""
        with _as_leeway_error(self.root):
            make_folder(self.root)
            lock = open_lock(self.root / ".lock")
            fcntl.flock(lock, fcntl.LOCK_EX)
        with lock:
            yield


def shared_root() -> Path | None:
    """Return the folder that LEEWAY_CACHE_DIR names, or None."""
    named = os.environ.get(ENVIRONMENT)
    return expand(named).absolute() if named else None


def user_root() -> Path:
    """Return the shared cache, or without one the user's cache folder."""
    return shared_root() or expand(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "leeway"


def find_cache(folder: Path | None) -> Cache:
    """Return the cache of a run directory, or the cache that `folder` is; by default the user's or the shared one.

    Raises LeewayError where there is none.
    """
    if folder is None:
        return Cache(user_root())
    if (folder / "cache").is_dir():
        return Cache(folder / "cache")
    if any((folder / kind).is_dir() for kind in (*KINDS, LEASES)):
        return Cache(folder)
    raise LeewayError(f"{folder}: not a cache, and no run directory with a cache of its own", fix="give one of these")


def describe(cache: Cache) -> str:
    """Return a table of the cache's size by kind, and the runs that need it."""
    sizes = cache.sizes()
    lines = [f"{cache.root}: {_megabytes(sum(size for _, size in sizes.values()))}"]
    for kind, (count, size) in sizes.items():
        unit = "files" if kind in FOLDERS else "records"
        lines.append(f"  {kind:10} {count:>11,} {unit:7} {_megabytes(size):>12}")
    lines += [f"  needed by the unfinished run {run}" for run in cache.unfinished()]
    return "\n".join(lines)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
