"""A study on a Ray cluster: pieces handed out to workers on its nodes, over a run directory that all of them see.

A worker is an actor, and a piece one task of it: it keeps the model between pieces, and on a GPU it keeps the GPU. (A
plain task on a GPU has a process of its own in Ray, that would load the model for every piece.) A worker that dies, or
whose node does, is replaced, and its piece is handed out again.

What protects the run directory, where neither a lock of this machine nor a parent's death reaches: Ray itself ends the
workers of a run that has ended. One name in the cluster is held for the folder by whoever runs a study into it, beside
`flock`, which workers take too and many file systems carry from host to host. And where a worker that was given up for
dead goes on writing for a while, nothing is spoilt: everything it writes (checkpoints, parts, step logs) appears whole,
by one rename, with the content that its successor would write; what it has begun is seen by nobody.

What works on a Ray cluster's nodes: a process that carries pieces out, over a run directory that all nodes see.
"""

from __future__ import annotations

import fcntl
import logging
import os
import platform
import tempfile
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from leeway.errors import LeewayError, first_line
from leeway.hashing import digest
from leeway.io import expand
from leeway.plan.plan import memory_of_a_worker
from leeway.study.executors.local import Event, Listen, ready, requires_single_worker, timed
from leeway.study.jobs import Job
from leeway.study.manifest import PACKAGES, manifest
from leeway.study.prepare import PairSampling, Prepared, prepare
from leeway.study.run_dir import REFERENCES, RunDir
from leeway.study.spec import Spec
from leeway.study.worker import SHARED as ANSWERS
from leeway.study.worker import Worker

PATIENCE_S = 90.0  # for a file system to show on one node what another has written


class RayWorker:
    """A process of the cluster that carries pieces out; what it did since is asked for beside that (`told`)."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._ends = ExitStack()
        self._work: Worker | None = None

    def begin(
        self, raw_spec: dict[str, Any], folder: Path, token: str, versions: dict[str, str], shared: dict[str, str]
    ) -> LeewayError | None:
        """Prepare the study, on the same versions and over the same folders; a user's mistake comes back."""
        os.environ.update(shared)
        try:
            _check_same_versions(versions)
            self._ends.enter_context(_held(folder, token))
            own = self._ends.enter_context(tempfile.TemporaryDirectory(prefix="leeway-"))
            store = RunDir(folder)
            prepared = prepare(
                Spec.model_validate(raw_spec), PairSampling(store.pairs, kept=store.kept_on(platform.node()))
            )
            self._work = Worker(prepared, store, timed(self._events.append), Path(own))
        except LeewayError as error:
            return error
        return None

    def facts(self, command: str) -> dict[str, Any] | LeewayError:
        """The manifest, of the machine that computes."""
        assert self._work is not None
        try:
            return manifest(self._work.prepared, self._work.base(), command)
        except LeewayError as error:
            return error

    def do(self, piece: Job) -> LeewayError | None:
        assert self._work is not None
        work = self._work
        try:
            wait_for(lambda: _seen(work, piece), piece, work.store.folder)
            work.carry_out(piece)
        except LeewayError as error:
            return error
        return None

    def told(self) -> list[Event]:
        return [self._events.popleft() for _ in range(len(self._events))]

    def end(self) -> None:
        """Leave nothing behind on this node."""
        self._ends.close()


def _seen(work: Worker, piece: Job) -> bool:
    """Whether all that a piece waited for can be seen from here."""
    return all(map(work.there, piece.needs)) and all(map(work.written, piece.after))


def shared_folders() -> dict[str, str]:
    """The folders that several runs share, as the driver's environment names them."""
    named = {name: os.environ.get(name) for name in (REFERENCES, ANSWERS)}
    return {name: str(expand(folder).absolute()) for name, folder in named.items() if folder}


def installed_versions() -> dict[str, str]:
    return {p: version(p) for p in ("leeway", *PACKAGES)}


def _check_same_versions(versions: dict[str, str]) -> None:
    """Raise where bits would depend on which node computes them."""
    for package, here in installed_versions().items():
        if here != versions[package]:
            raise LeewayError(
                f"{platform.node()} has {package} {here}, and the run began with {versions[package]}",
                fix="install the same versions on every node",
            )


@contextmanager
def _held(folder: Path, token: str) -> Iterator[None]:
    """The run directory's lock for workers, once it is seen to be the same directory here."""
    path = folder / ".workers"
    try:
        hold = path.open("r")
    except OSError as error:
        raise LeewayError(
            f"{folder}: not there on {platform.node()} ({error.strerror})",
            fix="give an --out on a file system that every node of the cluster has at the same path",
        ) from error
    with hold:
        wait_for(lambda: path.read_text() == token, None, folder)
        fcntl.flock(hold, fcntl.LOCK_SH)
        yield


def wait_for(there: Callable[[], bool], piece: Job | None, folder: Path) -> None:
    """Wait until a common file system shows here what was written elsewhere."""
    until = time.monotonic() + PATIENCE_S
    while not there():
        if time.monotonic() > until:
            what = "this run's own mark" if piece is None else f"what {called(piece)} has written or needs"
            raise LeewayError(
                f"{folder}: {platform.node()} does not see {what}",
                fix="give an --out on a file system that every node of the cluster has at the same path",
            )
        time.sleep(0.2)


def called(piece: Job) -> str:
    return f"{piece.kind} {piece.alias} s{piece.seed}"


try:
    import ray
    from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, WorkerCrashedError
except ImportError as error:
    raise LeewayError("--executor ray: Ray is not installed", fix="pip install 'leeway[ray]'") from error

LOST = (RayActorError, WorkerCrashedError, OutOfMemoryError, ObjectLostError)
CLAIM_S = 20.0  # how long a run waits for the one before it to be gone from the cluster
TRIES = 4  # of a piece whose worker dies
OBJECTS = 80 << 20  # bytes of a local cluster's object store: pieces and progress are all that goes through it
NAMESPACE = "leeway"


@dataclass
class _WorkerHandle:
    """A worker as the driver knows it: what it is at (its beginning, where there is no piece), and what it tells."""

    actor: Any
    doing: Any
    piece: Job | None = None
    telling: Any = None
    begun: bool = False


@dataclass
class RayExecutor:
    """The cluster, for one run: the one that RAY_ADDRESS names, or one that is started here and ended with the run."""

    asked: int | None
    say: Callable[[str], None]
    _crew: list[_WorkerHandle] = field(default_factory=list)
    _lost: Counter[str] = field(default_factory=Counter)
    _claim: Any = None
    _request: dict[str, float] = field(default_factory=dict)
    _ours: bool = False
    _token: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __enter__(self) -> RayExecutor:
        return self

    def __exit__(self, *_: object) -> None:
        if ends := [h.actor.end.remote() for h in self._crew if h.begun]:
            ray.wait(ends, num_returns=len(ends), timeout=3.0)
        for actor in [*(h.actor for h in self._crew), *([self._claim] if self._claim else [])]:
            ray.kill(actor)
        self._crew, self._claim = [], None
        if self._ours:
            ray.shutdown()

    def workers(self, prepared: Prepared, pieces: int) -> int:
        """As many as are asked for, else as many as the cluster's nodes have room for now."""
        self._connect(prepared)
        return min(self._room(prepared), pieces)

    def _room(self, prepared: Prepared) -> int:
        """For how many workers there is room now; 0 where nodes are still to come, or have gone."""
        if requires_single_worker(prepared.spec, self.asked):
            return 1
        if self.asked is not None:
            return self.asked
        return sum(_fitting(node["Resources"], self._request) for node in ray.nodes() if node["Alive"])

    def facts(self, work: Worker, command: str) -> dict[str, Any]:
        """The manifest, by a worker: what is computed on is the cluster's, and not this machine's."""
        self._connect(work.prepared)
        while True:
            self._keep(work, max(1, self._room(work.prepared)))
            self._heed(lambda _: None)
            for hand in [h for h in self._crew if h.begun]:
                try:
                    found = ray.get(hand.actor.facts.remote(command))
                except LOST as error:
                    self._gone(hand, error)
                    continue
                if isinstance(found, LeewayError):
                    raise found
                return dict(found)

    def carry_out(self, work: Worker, pieces: Seq[Job], listen: Listen) -> Iterator[Job]:
        """Yield each piece once it is finished and seen from here."""
        work.release()
        left = list(pieces)
        while left:
            self._keep(work, min(max(1, self._room(work.prepared)), len(left)))
            free = [h for h in self._crew if h.begun and h.piece is None]
            busy = [h.piece for h in self._crew if h.piece]
            for hand, piece in zip(free, ready(left, busy, work.there), strict=False):
                hand.piece, hand.doing = piece, hand.actor.do.remote(piece)
            for piece in self._heed(listen):
                wait_for(lambda p=piece: work.written(p), piece, work.store.folder)  # type: ignore[misc]
                left.remove(piece)
                yield piece

    def _connect(self, prepared: Prepared) -> None:
        """Know the cluster, and what a worker takes of it. Raises LeewayError where no node has that."""
        if self._request:
            return
        if prepared.spec.device.startswith("cuda:"):
            raise LeewayError(
                f"device: {prepared.spec.device} under --executor ray: a worker sees the one GPU that Ray gives it",
                fix="set device: cuda",
            )
        if not ray.is_initialized():
            self._join()
        self._request = _request(prepared)
        if not self._room(prepared):
            needed = ", ".join(f"{_amount(k, v)} {k}" for k, v in self._request.items())
            raise LeewayError(
                f"--executor ray: no node of the cluster has what a worker takes ({needed})",
                fix="add such nodes; or give --workers, and the run waits for them",
            )

    def _join(self) -> None:
        """Join the cluster that is named, or start one here; says in a line which."""
        address = os.environ.get("RAY_ADDRESS")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": NAMESPACE}
        try:
            if address:
                ray.init(address=address, **quiet)
            else:
                ray.init(address="local", include_dashboard=False, object_store_memory=OBJECTS, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            where = f"RAY_ADDRESS {address}: no cluster answers" if address else "Ray does not start on this machine"
            raise LeewayError(
                f"--executor ray: {where} ({first_line(error)})",
                fix="see that its head runs; without RAY_ADDRESS one is started on this machine",
            ) from error
        self._ours = True
        nodes, total = [n for n in ray.nodes() if n["Alive"]], ray.cluster_resources()
        where = f"the cluster at {address}" if address else "a cluster started on this machine"
        self.say(f"Ray: {where}; nodes: {len(nodes)}, CPUs: {total.get('CPU', 0):g}, GPUs: {total.get('GPU', 0):g}")

    def _keep(self, work: Worker, wanted: int) -> None:
        """As many workers as are wanted: those that died have successors."""
        if self._claim is None:
            self._claim = _claimed(work.store.folder)
            (work.store.folder / ".workers").write_text(self._token)
        kind = ray.remote(max_concurrency=2)(RayWorker).options(**self._request)
        raw = work.prepared.spec.model_dump(mode="json", by_alias=True)
        while len(self._crew) < wanted:
            actor = kind.remote()
            begun = actor.begin.remote(
                raw, work.store.folder.resolve(), self._token, installed_versions(), shared_folders()
            )
            self._crew.append(_WorkerHandle(actor, begun))

    def _heed(self, listen: Listen) -> list[Job]:
        """Wait a little; the pieces that were finished. The first mistake of a user's ends the run."""
        at = {h.doing: h for h in self._crew if h.doing is not None}
        if not at:
            time.sleep(0.3)
            return []
        done, _ = ray.wait(list(at), num_returns=1, timeout=0.3)
        finished = []
        for hand in [at[ref] for ref in done]:
            try:
                error = ray.get(hand.doing)
            except LOST as lost:
                self._gone(hand, lost)
                continue
            if error is not None:
                raise error
            finished += [hand.piece] if hand.piece else []
            hand.begun, hand.piece, hand.doing = True, None, None
        for hand in [h for h in self._crew if h.begun]:
            self._listen(hand, listen)
        return finished

    def _listen(self, hand: _WorkerHandle, listen: Listen) -> None:
        """Pass on what it has told, and ask anew; one that is gone is noticed by what it was at."""
        if hand.telling is not None and ray.wait([hand.telling], timeout=0)[0]:
            try:
                for event in ray.get(hand.telling):
                    listen(event)
            except LOST:
                return
            hand.telling = None
        if hand.telling is None:
            hand.telling = hand.actor.told.remote()

    def _gone(self, hand: _WorkerHandle, error: Exception) -> None:
        """Its piece is handed out again, to another; not for ever."""
        self._crew.remove(hand)
        ray.kill(hand.actor)
        what = called(hand.piece) if hand.piece else "the beginning"
        self._lost[what] += 1
        if self._lost[what] >= TRIES:
            raise LeewayError(
                f"--executor ray: {what} has lost its worker {TRIES} times ({first_line(error)})",
                fix="look at the node's logs, for want of memory perhaps; the same command carries on",
            ) from error
        self.say(f"Ray: {what} has lost its worker; it is handed out again")


def _request(prepared: Prepared) -> dict[str, float]:
    """What a worker takes of a node: the study's threads, and a GPU, or on a CPU the memory that a plan estimates."""
    spec = prepared.spec
    if spec.device.startswith("cuda") or (spec.device == "auto" and ray.cluster_resources().get("GPU", 0)):
        return {"num_cpus": spec.threads * spec.processes, "num_gpus": spec.processes}
    return {"num_cpus": spec.threads * spec.processes, "memory": spec.processes * memory_of_a_worker(prepared)}


def _fitting(has: dict[str, float], request: dict[str, float]) -> int:
    """How many such workers a node holds."""
    names = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}
    return min(int(has.get(names[k], 0.0) // v) for k, v in request.items())


def _amount(name: str, value: float) -> str:
    return f"{value / 2**30:.1f} GiB of" if name == "memory" else f"{value:g}"


def _claimed(folder: Path) -> Any:
    """The folder's name in this cluster, which one run has at a time; Ray frees it when that run ends."""
    until = time.monotonic() + CLAIM_S
    while True:
        try:
            name = digest("run directory", str(folder.resolve()))
            return ray.remote(num_cpus=0)(_Claim).options(name=name, namespace=NAMESPACE).remote()
        except ValueError as error:  # the name is taken
            if time.monotonic() > until:
                raise LeewayError(
                    f"{folder} is in use by another leeway of this cluster", fix="wait for it, or give another --out"
                ) from error
            time.sleep(0.5)


class _Claim:
    """Held by its name."""
