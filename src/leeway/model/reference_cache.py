"""What references said of sequences, on disk: asked once for every objective, seed, weight and rerun.

A folder for each reference and each way of computing it holds files that are never changed. A file is named by the
digest of its bytes, written under another name and renamed when it is whole: a process that is killed leaves nothing
that is read, two that write the same write one file, and a damaged one is seen. Files are mapped while they are read,
and nothing of them stays in memory but which sequence lies where.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from leeway.cache import FIX
from leeway.data.chat import Sequence
from leeway.errors import LeewayError, first_line
from leeway.hashing import digest, file_digest
from leeway.io import publish, readable, remove_partial, scratch_file

SHARD_BYTES = 64 << 20  # of one file, about
BUCKETS = "0123456789abcdef"  # first digit of a sequence's key: one process at a time fills a bucket
PART_TOKENS = 8192  # of the buckets that it takes together, at least: full rows go faster through a model


@dataclass(frozen=True)
class ReferenceStats:
    """Statistics of one sequence's M measured tokens, on the CPU: log-probabilities, nats, or final hidden states."""

    logp_M: Tensor | None
    hidden_MD: Tensor | None

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in (self.logp_M, self.hidden_MD) if t is not None)


class Wanted(NamedTuple):
    """What is wanted of a sequence."""

    logps: bool
    states: bool


@dataclass(frozen=True)
class Place:
    """Where a sequence's rows are."""

    path: Path
    rows: slice
    tokens: int


Wanting = Callable[[str], Wanted]  # by a sequence's key


class Answering(Protocol):
    """Who is asked."""

    def ask(self, sequences: Seq[Sequence], wanted: Wanted) -> Iterator[tuple[Sequence, ReferenceStats]]:
        """What is wanted of each sequence, in any order."""

    def read(self, sequence: Sequence, hidden_MD: Tensor) -> Tensor:
        """A sequence's log-probabilities [M] from the states that are kept of it."""


def key(sequence: Sequence) -> str:
    """A sequence by its content: all its ids, and from where on they are measured."""
    return digest(sequence.ids, sequence.start)


@dataclass
class Shelf:
    """What one reference said. Sequences are found by their keys: log-probabilities, final states, or both."""

    folder: Path
    _read: set[str] = field(default_factory=set, repr=False)
    _logps: dict[str, Place] = field(default_factory=dict, repr=False)
    _states: dict[str, Place] = field(default_factory=dict, repr=False)

    @property
    def _places(self) -> dict[str, dict[str, Place]]:
        """By the name of a file's tensor."""
        return {"logp": self._logps, "hidden": self._states}

    def look(self) -> None:
        """Index the files that were added since. A damaged file is removed: its sequences are computed again."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name in self._read:
                continue
            try:
                self._take_in(path)
            except (ValueError, SafetensorError):
                path.unlink(missing_ok=True)
            except OSError as error:
                raise LeewayError(f"{path}: cannot be read ({error.strerror})", fix=FIX) from error
            else:
                self._read.add(path.name)

    def _take_in(self, path: Path) -> None:
        if file_digest(path) != path.stem:
            raise ValueError("not the content that was written")
        with safe_open(path, "pt") as f:
            keys, ends, tokens = (f.get_tensor(name).tolist() for name in ("keys", "ends", "tokens"))
            known = [places for name, places in self._places.items() if name in f.keys()]  # noqa: SIM118 - not a dict
        at = 0
        for raw, end, length in zip(keys, ends, tokens, strict=True):
            place = Place(path, slice(at, end), length)
            at = end
            for places in known:
                places.setdefault(bytes(raw).hex(), place)

    def has(self, name: str, wanted: Wanted) -> bool:
        return not (wanted.logps and name not in self._logps) and not (wanted.states and name not in self._states)

    def logps(self, sequences: Seq[Sequence]) -> Tensor:
        """Log-probabilities of these sequences, one after another: [T]."""
        return self._recall("logp", sequences)

    def states(self, sequences: Seq[Sequence]) -> Tensor:
        """Their final hidden states: [T, D]."""
        return self._recall("hidden", sequences)

    def _recall(self, name: str, sequences: Seq[Sequence]) -> Tensor:
        rows: dict[Path, list[tuple[int, slice]]] = {}
        for k, s in enumerate(sequences):
            place = self._places[name][key(s)]
            rows.setdefault(place.path, []).append((k, place.rows))
        found: dict[int, Tensor] = {}
        for path, wanted in rows.items():
            with readable(path, SafetensorError), safe_open(path, "pt") as f:
                kept = f.get_slice(name)
                found |= {k: kept[r].clone() for k, r in wanted}
        return torch.cat([found[k] for k in range(len(sequences))])

    def fill(
        self,
        sequences: Seq[Sequence],
        wanted: Wanting,
        who: Answering,
        tell: Callable[[int, int], None],
    ) -> int:
        """Ask for what is wanted of each and not there yet; how many tokens went through the model for it.

        Several processes may fill at once: one that finds another at a part goes on with the next, and comes back.
        `tell` hears how many of this call's tokens are done, and of how many, at most.
        """
        self.look()
        named = sorted({key(s): s for s in sequences}.items())
        left = {k: s for k, s in named if not self.has(k, wanted(k))}
        total, done, spent = _tokens(left), 0, 0
        todo = _parts(left)
        for wait in (False, True):
            for buckets in list(todo):
                with ExitStack() as held:  # in one order, so that two who wait never wait for each other
                    if not all(held.enter_context(self._held(b, wait=wait)) for b in buckets):
                        continue
                    self.look()
                    part = todo.pop(buckets)
                    spent += self._complete(buckets[0], part, wanted, who)
                done += _tokens(part)
                tell(done, total)
        self.look()
        return spent

    def _complete(self, bucket: str, part: dict[str, Sequence], wanted: Wanting, who: Answering) -> int:
        """What of this part is missing, asked for and written; log-probabilities are read off states that are there."""
        asked: dict[Wanted, dict[str, Sequence]] = {}
        read: list[Sequence] = []
        for k, s in part.items():
            want = wanted(k)
            missing = Wanted(want.logps and k not in self._logps, want.states and k not in self._states)
            if missing.logps and k in self._states:
                read.append(s)
            elif any(missing):
                asked.setdefault(missing, {})[k] = s
        self._put(bucket, ((s, ReferenceStats(who.read(s, self.states([s])), None)) for s in read))
        for what, these in sorted(asked.items()):
            self._put(bucket, who.ask(list(these.values()), what))
        return sum(map(_tokens, asked.values()))

    def _put(self, bucket: str, said: Iterable[tuple[Sequence, ReferenceStats]]) -> None:
        """Write files of a bounded size, so that no more than one of them is held."""
        batch: list[tuple[Sequence, ReferenceStats]] = []
        size = 0
        for one in said:
            batch.append(one)
            size += one[1].bytes
            if size >= SHARD_BYTES:
                self._write(bucket, batch)
                batch, size = [], 0
        if batch:
            self._write(bucket, batch)

    def _write(self, bucket: str, batch: Seq[tuple[Sequence, ReferenceStats]]) -> None:
        tensors = {
            "keys": torch.tensor([list(bytes.fromhex(key(s))) for s, _ in batch], dtype=torch.uint8),
            "ends": torch.tensor([s.measured for s, _ in batch]).cumsum(0),
            "tokens": torch.tensor([len(s.ids) for s, _ in batch]),
        }
        if logps := [said.logp_M for _, said in batch if said.logp_M is not None]:
            tensors["logp"] = torch.cat(logps)
        if states := [said.hidden_MD for _, said in batch if said.hidden_MD is not None]:
            tensors["hidden"] = torch.cat(states)
        try:
            with scratch_file(self.folder, f"{bucket}-") as scratch:
                save_file(tensors, scratch)
                publish(scratch, self.folder / f"{file_digest(scratch)}.safetensors")
        except (OSError, SafetensorError) as error:
            raise LeewayError(
                f"{self.folder}: what the reference says cannot be kept there ({first_line(error)})",
                fix=FIX,
            ) from error

    @contextmanager
    def _held(self, bucket: str, *, wait: bool) -> Iterator[bool]:
        """Whether this part is ours to fill for now. What a killed process left of it half written goes."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / f".lock-{bucket}").open("w")
        except OSError as error:
            raise LeewayError(f"{self.folder}: cannot be written ({error.strerror})", fix=FIX) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            remove_partial(self.folder, f"{bucket}-")
            yield True

    def size(self) -> tuple[int, int, int]:
        """(sequences, their tokens, bytes of the files)."""
        self.look()
        known = self._logps | self._states
        tokens = sum(p.tokens for p in known.values())
        return len(known), tokens, sum(f.stat().st_size for f in self.folder.glob("*.safetensors"))


@dataclass
class ReferenceCache:
    """All shelves below a folder. `also` are sequences whose states are kept even where log-probabilities are asked
    for: another objective of the study will ask for them.
    """

    folder: Path
    also: frozenset[str] = frozenset()
    _shelves: dict[str, Shelf] = field(default_factory=dict, repr=False)

    def of(self, who: str) -> Shelf:
        return self._shelves.setdefault(who, Shelf(self.folder / who))

    def stating(self, also: Iterable[str]) -> ReferenceCache:
        """The same shelves, with other sequences whose states are kept as well."""
        return ReferenceCache(self.folder, frozenset(also), self._shelves)

    def size(self) -> tuple[int, int, int]:
        """(sequences, their tokens, bytes) of all that is kept here."""
        found = [self.of(f.name).size() for f in sorted(self.folder.glob("*")) if f.is_dir()]
        return sum(n for n, _, _ in found), sum(t for _, t, _ in found), sum(b for *_, b in found)


def _parts(left: dict[str, Sequence]) -> dict[str, dict[str, Sequence]]:
    """What is to be filled, by the buckets that are taken together."""
    parts: dict[str, dict[str, Sequence]] = {}
    buckets, part = "", dict[str, Sequence]()
    for b in BUCKETS:
        buckets += b
        part |= {k: s for k, s in left.items() if k[0] == b}
        if _tokens(part) >= PART_TOKENS or (b == BUCKETS[-1] and part):
            parts[buckets] = part
            buckets, part = "", {}
    return parts


def _tokens(sequences: dict[str, Sequence]) -> int:
    return sum(len(s.ids) for s in sequences.values())
