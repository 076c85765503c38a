"""The reference model that an objective compares the policy with, while the policy trains.

It runs with dropout off, without gradients and without consuming random numbers. Objectives see its statistics only.

`ReferenceCache` keeps its log-probs and hidden states on disk, shared by objectives, seeds and reruns. A folder per
reference and way of computing it holds files that never change, each named by the digest of its bytes once it is
complete: a killed process leaves no file that is read, two processes that write the same content write one file, and a
damaged file is detected and computed again. Files are memory-mapped; only the index of sequences stays in memory.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Parameter

from leeway.cache import FIX
from leeway.data.chat import Sequence
from leeway.errors import LeewayError, first_line
from leeway.hashing import digest, file_digest
from leeway.io import make_folder, open_lock, publish, readable, remove_partial, scratch_file
from leeway.model.adapters import is_low_rank, trainable
from leeway.model.forward import hidden_at_measured
from leeway.model.fsdp import exchanged, is_shard
from leeway.model.load import Model
from leeway.model.packing import Layout, PackedBatch
from leeway.model.token_stats import Head, token_logps

SHARD_BYTES = 64 << 20  # of one file, about
BUCKETS = "0123456789abcdef"  # first digit of a sequence's key: one process at a time fills a bucket
PART_TOKENS = 8192  # minimum of the buckets that a process fills together: full rows are faster


@dataclass(frozen=True)
class ReferenceStats:
    """Statistics of one sequence's M measured tokens, on the CPU: log-probabilities in nats, final hidden states."""

    logp_M: Tensor | None
    hidden_MD: Tensor | None


class Needed(NamedTuple):
    """Which statistics of a sequence are needed."""

    logps: bool
    states: bool


@dataclass(frozen=True)
class Location:
    """The rows of a sequence in a file."""

    path: Path
    rows: slice
    tokens: int


class ReferenceModel(Protocol):
    """Computes the statistics that are not cached."""

    def stats(self, sequences: Seq[Sequence], needed: Needed) -> Iterator[tuple[Sequence, ReferenceStats]]:
        """Yield the needed statistics of each sequence, in any order."""

    def logps(self, sequence: Sequence, hidden_MD: Tensor) -> Tensor:
        """Return a sequence's log-probabilities [M], computed from its cached hidden states."""


def key(sequence: Sequence) -> str:
    """Return the content key of a sequence: all its ids, and the index of the first measured one."""
    return digest(sequence.ids, sequence.start)


@dataclass
class ReferenceStore:
    """The cached statistics of one reference. A sequence may have log-probabilities, final states, or both."""

    folder: Path
    _indexed: set[str] = field(default_factory=set, repr=False)
    _logps: dict[str, Location] = field(default_factory=dict, repr=False)
    _states: dict[str, Location] = field(default_factory=dict, repr=False)

    def refresh(self) -> None:
        """Index the files that were added since. A damaged file is removed: its sequences are computed again."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name in self._indexed:
                continue
            try:
                self._index(path)
            except (ValueError, SafetensorError):
                path.unlink(missing_ok=True)
            except FileNotFoundError:
                continue  # damaged, and removed by another process
            except OSError as error:
                raise LeewayError(f"{path}: cannot be read ({error.strerror})", fix=FIX) from error
            else:
                self._indexed.add(path.name)

    def _index(self, path: Path) -> None:
        if file_digest(path) != path.stem:
            raise ValueError("not the content that was written")
        with safe_open(path, "pt") as f:
            keys, ends, tokens = (f.get_tensor(name).tolist() for name in ("keys", "ends", "tokens"))
            names = f.keys()
        indices = [index for name, index in (("logp", self._logps), ("hidden", self._states)) if name in names]
        for raw, start, end, length in zip(keys, [0, *ends], ends, tokens, strict=False):
            location = Location(path, slice(start, end), length)
            for index in indices:
                index.setdefault(bytes(raw).hex(), location)

    def _missing(self, name: str, needed: Needed) -> Needed:
        return Needed(needed.logps and name not in self._logps, needed.states and name not in self._states)

    def logps(self, sequences: Seq[Sequence]) -> Tensor:
        """Return the concatenated log-probabilities of these sequences: [T]."""
        return self._read("logp", self._logps, sequences)

    def states(self, sequences: Seq[Sequence]) -> Tensor:
        """Return their concatenated final hidden states: [T, D]."""
        return self._read("hidden", self._states, sequences)

    def _read(self, name: str, index: dict[str, Location], sequences: Seq[Sequence]) -> Tensor:
        by_path: dict[Path, list[tuple[int, slice]]] = {}
        for k, s in enumerate(sequences):
            location = index[key(s)]
            by_path.setdefault(location.path, []).append((k, location.rows))
        parts: dict[int, Tensor] = {}
        for path, rows in by_path.items():
            with readable(path, SafetensorError), safe_open(path, "pt") as f:
                tensor = f.get_slice(name)
                parts |= {k: tensor[r].clone() for k, r in rows}
        return torch.cat([parts[k] for k in range(len(sequences))])

    def fill(
        self,
        sequences: Seq[Sequence],
        needed: Callable[[str], Needed],
        model: ReferenceModel,
        on_progress: Callable[[int, int], None],
    ) -> int:
        """Compute what is needed of each sequence and not cached; return how many tokens went through the model.

        `needed` takes a sequence's key; `on_progress` gets (tokens done, tokens to do at most). Several processes may
        fill at once: each skips the parts that another one holds, and waits for them at the end.
        """
        self.refresh()
        by_key = sorted({key(s): s for s in sequences}.items())
        left = {k: s for k, s in by_key if any(self._missing(k, needed(k)))}
        total, done, spent = _tokens(left), 0, 0
        todo = _parts(left)
        for wait in (False, True):
            for buckets in list(todo):
                with ExitStack() as locks:  # taken in one order, so that two waiting processes cannot deadlock
                    if not all(locks.enter_context(self._locked(b, wait=wait)) for b in buckets):
                        continue
                    self.refresh()
                    part = todo.pop(buckets)
                    spent += self._compute(buckets[0], part, needed, model)
                done += _tokens(part)
                on_progress(done, total)
        self.refresh()
        return spent

    def _compute(
        self, bucket: str, part: dict[str, Sequence], needed: Callable[[str], Needed], model: ReferenceModel
    ) -> int:
        """Compute and write what this part lacks; log-probabilities come from cached states where there are any."""
        uncached: dict[Needed, dict[str, Sequence]] = {}
        from_states: list[Sequence] = []
        for k, s in part.items():
            missing = self._missing(k, needed(k))
            if missing.logps and k in self._states:
                from_states.append(s)
            elif any(missing):
                uncached.setdefault(missing, {})[k] = s
        self._write_all(bucket, ((s, ReferenceStats(model.logps(s, self.states([s])), None)) for s in from_states))
        for missing, some in sorted(uncached.items()):
            self._write_all(bucket, model.stats(list(some.values()), missing))
        return sum(map(_tokens, uncached.values()))

    def _write_all(self, bucket: str, stats: Iterable[tuple[Sequence, ReferenceStats]]) -> None:
        """Write files of a bounded size, so that no more than one of them is in memory."""
        batch: list[tuple[Sequence, ReferenceStats]] = []
        size = 0
        for sequence, found in stats:
            batch.append((sequence, found))
            size += sum(t.nbytes for t in (found.logp_M, found.hidden_MD) if t is not None)
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
        if logps := [stats.logp_M for _, stats in batch if stats.logp_M is not None]:
            tensors["logp"] = torch.cat(logps)
        if states := [stats.hidden_MD for _, stats in batch if stats.hidden_MD is not None]:
            tensors["hidden"] = torch.cat(states)
        try:
            with scratch_file(self.folder, f"{bucket}-") as scratch:
                save_file(tensors, scratch)
                publish(scratch, self.folder / f"{file_digest(scratch)}.safetensors")
        except (OSError, SafetensorError) as error:
            raise LeewayError(f"{self.folder}: the cache cannot be written ({first_line(error)})", fix=FIX) from error

    @contextmanager
    def _locked(self, bucket: str, *, wait: bool) -> Iterator[bool]:
        """Yield whether this process holds the bucket's lock; remove what a killed process left half written in it."""
        try:
            make_folder(self.folder)
            lock = open_lock(self.folder / f".lock-{bucket}")
        except OSError as error:
            raise LeewayError(f"{self.folder}: the cache cannot be written ({error.strerror})", fix=FIX) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            remove_partial(self.folder, f"{bucket}-")
            yield True

    def size(self) -> tuple[int, int, int]:
        """Return (sequences, their tokens, bytes of the files)."""
        self.refresh()
        known = self._logps | self._states
        size = sum(f.stat().st_size for f in self.folder.glob("*.safetensors"))
        return len(known), sum(p.tokens for p in known.values()), size


@dataclass
class ReferenceCache:
    """The stores of all references in a folder.

    `state_keys`: sequences whose states another objective needs, cached even if log-probabilities are needed here.
    """

    folder: Path
    state_keys: frozenset[str] = frozenset()
    _stores: dict[str, ReferenceStore] = field(default_factory=dict, repr=False)

    def of(self, reference: str) -> ReferenceStore:
        return self._stores.setdefault(reference, ReferenceStore(self.folder / reference))

    def with_states(self, state_keys: Iterable[str]) -> ReferenceCache:
        """Return the same stores with other `state_keys`."""
        return ReferenceCache(self.folder, frozenset(state_keys), self._stores)

    def size(self) -> tuple[int, int, int]:
        """Return (sequences, their tokens, bytes) over all references."""
        sizes = [self.of(f.name).size() for f in sorted(self.folder.glob("*")) if f.is_dir()]
        return sum(n for n, _, _ in sizes), sum(t for _, t, _ in sizes), sum(b for *_, b in sizes)


def _parts(left: dict[str, Sequence]) -> dict[str, dict[str, Sequence]]:
    """Return the sequences to compute, by the buckets that are locked together."""
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


Frozen = dict[Parameter, Tensor]

ARITHMETIC = 3  # increase when the computation of a reference changes


@dataclass
class Reference:
    """A reference model, identified by its `hash`, in one of three forms.

    Live, no values given: the base with the adapter disabled; no extra memory.
    Live, `frozen`: trainable parameters take these values for the pass; one more copy of what trains.
    Cached: `cached` on disk holds its statistics for each sequence, computed before the first step; `frozen` is then
    released, except the reference's output layer in full fine-tuning. `spent` counts tokens by the optimiser step that
    first needs them.
    """

    hash: str = ""
    frozen: Frozen | None = None
    cached: ReferenceStore | None = None
    spent: dict[int, int] = field(default_factory=dict)
    released: bool = False

    def head(self, policy: Head) -> Head:
        """Return the policy's output layer with the reference's attached, if the policy's is trained."""
        weight_VD = (self.frozen or {}).get(policy.weight_VD)  # type: ignore[call-overload]
        return policy if weight_VD is None else replace(policy, reference=replace(policy, weight_VD=weight_VD))

    def logps(self, model: Model, batch: PackedBatch, sequences: Seq[Sequence]) -> Tensor:
        """Return log-probabilities of the batch's measured tokens, [T], nats; `sequences` as packed."""
        if self.cached is not None:
            return self.cached.logps(sequences).to(model.device)
        with as_reference(model, self):
            return token_logps(hidden_at_measured(model, batch), batch.measured_T, model.head)

    def hidden(self, model: Model, batch: PackedBatch, sequences: Seq[Sequence]) -> Tensor:
        """Return the final hidden states that predict them, [T, D]."""
        if self.cached is not None:
            return self.cached.states(sequences).to(model.device)
        with as_reference(model, self):
            return hidden_at_measured(model, batch)

    def release(self) -> None:
        """Drop the frozen copy; only cached statistics remain available."""
        self.released, self.frozen = self.frozen is not None, None


def computed_as(model: Model, reference: Reference, layout: Layout) -> str:
    """Return the cache key of a reference and its arithmetic: anything that may change the last bits."""
    on_cpu = model.device.type == "cpu"
    return digest(
        "reference",
        ARITHMETIC,
        layout,
        reference.hash,
        model.head.blocked,
        str(model.head.weight_VD.dtype),
        "None",  # autocast
        torch.__version__,
        [torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()] if on_cpu else model.device.type,
    )


def freeze(model: Model) -> Frozen:
    """Return a copy of the trainable parameters."""
    return {p: p.detach().clone() for p in trainable(model)}


@contextmanager
def as_reference(model: Model, reference: Reference | None = None) -> Iterator[None]:
    """Run the model as the reference: frozen values or no adapter, no dropout, no gradients, no random numbers."""
    frozen = reference.frozen if reference else None
    if (reference and reference.released) or (frozen is None and not is_low_rank(model)):
        raise ValueError("this reference was released: only cached statistics are available")
    was_training = model.lm.training
    model.lm.eval()
    try:
        with torch.no_grad(), model.lm.disable_adapter() if frozen is None else _values(model.lm, frozen):
            yield
    finally:
        model.lm.train(was_training)


@contextmanager
def _values(lm: Any, frozen: Frozen) -> Iterator[None]:
    """Replace parameter values within the context."""
    if any(map(is_shard, frozen)):
        with exchanged(lm, frozen):
            yield
        return
    own = {p: p.data for p in frozen}
    for p, value in frozen.items():
        p.data = value
    try:
        yield
    finally:
        for p, data in own.items():
            p.data = data
