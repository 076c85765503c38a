"""What references said of sequences, on disk: asked once for every objective, seed, weight and rerun.

A folder for each reference and each way of computing it holds files that are never changed. A file is named by the
digest of its bytes, written under another name and renamed when it is whole: a process that is killed leaves nothing
that is read, two that write the same write one file, and a damaged one is seen. Files are mapped while they are read,
and nothing of them stays in memory but which sequence lies where.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from leeway.data.chat import Sequence
from leeway.errors import LeewayError, first_line
from leeway.hashing import digest, file_digest

SHARD_BYTES = 64 << 20  # of one file, about
BUCKETS = "0123456789abcdef"  # first digit of a sequence's key: what one process fills at a time
FIX = "delete it and run the same command again"


@dataclass(frozen=True)
class Said:
    """Statistics of one sequence's M measured tokens, on the CPU: log-probabilities, nats, and final hidden states."""

    logp_M: Tensor
    hidden_MD: Tensor | None

    @property
    def bytes(self) -> int:
        return self.logp_M.nbytes + (0 if self.hidden_MD is None else self.hidden_MD.nbytes)


@dataclass(frozen=True)
class Place:
    """Where a sequence's rows are."""

    path: Path
    rows: slice
    tokens: int


Ask = Callable[[Seq[Sequence], bool], Iterator[tuple[Sequence, Said]]]  # with states or without, in any order


def key(sequence: Sequence) -> str:
    """A sequence by its content: all its ids, and from where on they are measured."""
    return digest(sequence.ids, sequence.start)


@dataclass
class Shelf:
    """What one reference said. Sequences are found by their keys, with their final states or without."""

    folder: Path
    _read: set[str] = field(default_factory=set, repr=False)
    _logps: dict[str, Place] = field(default_factory=dict, repr=False)
    _states: dict[str, Place] = field(default_factory=dict, repr=False)

    def look(self) -> None:
        """Take in what has come since, each file held against its name. Raises LeewayError for a damaged one."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name not in self._read:
                self._take_in(path)
                self._read.add(path.name)

    def _take_in(self, path: Path) -> None:
        with _readable(path):
            if file_digest(path) != path.stem:
                raise ValueError("it is not what was written")
            with safe_open(path, "pt") as f:
                keys, ends, tokens = (f.get_tensor(name).tolist() for name in ("keys", "ends", "tokens"))
                states = "hidden" in f.keys()  # noqa: SIM118 - it is no dict
        at = 0
        for raw, end, length in zip(keys, ends, tokens, strict=True):
            place = Place(path, slice(at, end), length)
            at, name = end, bytes(raw).hex()
            self._logps.setdefault(name, place)
            if states:
                self._states[name] = place

    def has(self, name: str, *, states: bool) -> bool:
        return name in (self._states if states else self._logps)

    def recall(self, sequences: Seq[Sequence], *, states: bool) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities [T] of these sequences, one after another, and where asked for final states [T, D]."""
        known = self._states if states else self._logps
        wanted: dict[Path, list[tuple[int, slice]]] = {}
        for k, s in enumerate(sequences):
            place = known[key(s)]
            wanted.setdefault(place.path, []).append((k, place.rows))
        found: dict[int, Said] = {}
        for path, rows in wanted.items():
            with _readable(path), safe_open(path, "pt") as f:
                logp, hidden = f.get_slice("logp"), f.get_slice("hidden") if states else None
                for k, r in rows:
                    found[k] = Said(logp[r].clone(), None if hidden is None else hidden[r].clone())
        said = [found[k] for k in range(len(sequences))]
        states_ = [s.hidden_MD for s in said if s.hidden_MD is not None]
        return torch.cat([s.logp_M for s in said]), torch.cat(states_) if states else None

    def fill(
        self, sequences: Seq[Sequence], states: Callable[[str], bool], ask: Ask, tell: Callable[[int, int], None]
    ) -> int:
        """Ask about those that are not there yet, of those that `states` names with states; how many tokens it took.

        Several processes may fill at once: one that finds another at a part goes on with the next, and comes back.
        `tell` hears how many of this call's tokens are done, and of how many, at most.
        """
        self.look()
        named = sorted({key(s): s for s in sequences}.items())
        left = {k: s for k, s in named if not self.has(k, states=states(k))}
        total, done, spent = _tokens(left), 0, 0
        todo = {b: part for b in BUCKETS if (part := {k: s for k, s in left.items() if k[0] == b})}
        for wait in (False, True):
            for bucket in list(todo):
                with self._held(bucket, wait=wait) as held:
                    if not held:
                        continue
                    self.look()
                    part = todo.pop(bucket)
                    missing = {k: s for k, s in part.items() if not self.has(k, states=states(k))}
                    for whole in (False, True):
                        self._put(bucket, [s for k, s in missing.items() if states(k) == whole], whole, ask)
                spent, done = spent + _tokens(missing), done + _tokens(part)
                tell(done, total)
        self.look()
        return spent

    def _put(self, bucket: str, missing: Seq[Sequence], states: bool, ask: Ask) -> None:
        """Ask, and write files of a bounded size, so that no more than one of them is held."""
        batch: list[tuple[Sequence, Said]] = []
        for s, said in ask(missing, states):
            batch.append((s, said))
            if sum(b.bytes for _, b in batch) >= SHARD_BYTES:
                self._write(bucket, batch)
                batch = []
        if batch:
            self._write(bucket, batch)

    def _write(self, bucket: str, batch: Seq[tuple[Sequence, Said]]) -> None:
        tensors = {
            "keys": torch.tensor([list(bytes.fromhex(key(s))) for s, _ in batch], dtype=torch.uint8),
            "ends": torch.tensor([s.measured for s, _ in batch]).cumsum(0),
            "tokens": torch.tensor([len(s.ids) for s, _ in batch]),
            "logp": torch.cat([said.logp_M for _, said in batch]),
        }
        if states := [said.hidden_MD for _, said in batch if said.hidden_MD is not None]:
            tensors["hidden"] = torch.cat(states)
        try:
            handle, scratch = tempfile.mkstemp(prefix=f".partial-{bucket}-", dir=self.folder)
            os.close(handle)
            save_file(tensors, scratch)
            with open(scratch, "rb") as f:
                os.fsync(f.fileno())
            os.replace(scratch, self.folder / f"{file_digest(Path(scratch))}.safetensors")
        except (OSError, SafetensorError) as error:
            raise LeewayError(
                f"{self.folder}: what the reference says cannot be kept there ({first_line(error)})",
                fix="free some disk space, or set LEEWAY_REFERENCES to a folder elsewhere",
            ) from error

    @contextmanager
    def _held(self, bucket: str, *, wait: bool) -> Iterator[bool]:
        """Whether this part is ours to fill for now. What a killed process left of it half written goes."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / f".lock-{bucket}").open("w")
        except OSError as error:
            raise LeewayError(
                f"{self.folder}: cannot be written ({error.strerror})", fix="set LEEWAY_REFERENCES to another folder"
            ) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            for left in self.folder.glob(f".partial-{bucket}-*"):
                left.unlink(missing_ok=True)
            yield True

    def size(self) -> tuple[int, int, int]:
        """(sequences, their tokens, bytes of the files)."""
        self.look()
        tokens = sum(p.tokens for p in self._logps.values())
        return len(self._logps), tokens, sum(f.stat().st_size for f in self.folder.glob("*.safetensors"))


@dataclass
class References:
    """All shelves below a folder. `also` are sequences whose states are kept even where log-probabilities are asked
    for: another objective of the study will ask for them.
    """

    folder: Path
    also: frozenset[str] = frozenset()
    _shelves: dict[str, Shelf] = field(default_factory=dict, repr=False)

    def of(self, who: str) -> Shelf:
        return self._shelves.setdefault(who, Shelf(self.folder / who))

    def stating(self, also: Iterable[str]) -> References:
        """The same shelves, with other sequences whose states are kept as well."""
        return References(self.folder, frozenset(also), self._shelves)

    def size(self) -> tuple[int, int, int]:
        """(sequences, their tokens, bytes) of all that is kept here."""
        found = [self.of(f.name).size() for f in sorted(self.folder.glob("*")) if f.is_dir()]
        return sum(n for n, _, _ in found), sum(t for _, t, _ in found), sum(b for *_, b in found)


def _tokens(sequences: dict[str, Sequence]) -> int:
    return sum(len(s.ids) for s in sequences.values())


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError, SafetensorError) as error:
        raise LeewayError(f"{path}: damaged ({first_line(error)})", fix=FIX) from error
