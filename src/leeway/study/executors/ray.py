"""Run the jobs of a study on a Ray cluster, over a run directory that all nodes share.

A worker is an actor and a job one task of it: the actor keeps the model, and on a GPU the GPU, between jobs. (A plain
task would load the model for every job.) A worker that dies, or whose node dies, is replaced and its job runs again.

Neither a local file lock nor a parent's death protects the run directory across nodes. Instead, Ray ends the workers of
a run that has ended, and a name in the cluster, held by the driver, reserves the directory in addition to `flock`. A
worker that was given up but still writes does no harm: checkpoints, parts and step logs appear whole, by one rename,
with the same content as its successor's.
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

from leeway.cache import ENVIRONMENT, shared_root
from leeway.errors import LeewayError, all_faults, first_line
from leeway.hashing import digest
from leeway.plan.plan import memory_of_a_worker
from leeway.study.executors.local import OnEvent, ready, requires_single_worker, timed
from leeway.study.executors.watchdog import Watchdog
from leeway.study.jobs import Job
from leeway.study.manifest import PACKAGES, check_fingerprint, fingerprint, manifest
from leeway.study.preflight import service_faults
from leeway.study.prepare import PairSampling, Prepared, prepare
from leeway.study.progress import Event
from leeway.study.run_dir import RunDir
from leeway.study.spec import Spec
from leeway.study.worker import Worker

SHARED_FOLDER = "give an --out on a file system that every node of the cluster has at the same path"
PATIENCE_S = 90.0  # until a shared file system shows on one node what another wrote


class RayWorker:
    """An actor that runs jobs; the driver polls `take_events` for its progress."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._resources = ExitStack()
        self._worker: Worker | None = None

    def setup(
        self,
        raw_spec: dict[str, Any],
        folder: Path,
        token: str,
        versions: dict[str, str],
        shared: dict[str, str],
        expected: str,
    ) -> LeewayError | None:
        """Prepare the study with the driver's versions and folders; return a user's mistake."""
        os.environ.update(shared)
        try:
            for package, here in installed_versions().items():  # the bits depend on the node that computes them
                if here != versions[package]:
                    what = f"{platform.node()} has {package} {here}, the driver has {versions[package]}"
                    raise LeewayError(what, fix="install the same versions on every node")
            self._resources.enter_context(_shared_lock(folder, token))
            scratch = self._resources.enter_context(tempfile.TemporaryDirectory(prefix="leeway-"))
            store, spec = RunDir(folder), Spec.model_validate(raw_spec)
            if faults := [] if store.rows_path.is_file() else service_faults(spec):
                raise all_faults(platform.node(), faults)
            prepared = prepare(spec, PairSampling(store.cache))
            check_fingerprint(prepared, expected, platform.node())
            self._worker = Worker(prepared, store, timed(self._events.append), Path(scratch))
        except LeewayError as error:
            self.close()
            return error
        return None

    def manifest(self, command: str) -> dict[str, Any] | LeewayError:
        """Return the manifest, with this node's environment."""
        assert self._worker is not None
        try:
            return manifest(self._worker.prepared, self._worker.base(), command)
        except LeewayError as error:
            return error

    def run_job(self, job: Job) -> LeewayError | None:
        assert self._worker is not None
        worker = self._worker

        def inputs_visible() -> bool:
            return all(map(worker.has_checkpoint, job.needs)) and all(map(worker.has_results, job.after))

        try:
            wait_for(inputs_visible, f"the inputs of {job.name}", worker.store.folder)
            worker.run_job(job)
        except LeewayError as error:
            return error
        return None

    def take_events(self) -> list[Event]:
        return [self._events.popleft() for _ in range(len(self._events))]

    def close(self) -> None:
        """Remove the scratch folder and release the lock."""
        self._resources.close()


def installed_versions() -> dict[str, str]:
    return {p: version(p) for p in ("leeway", *PACKAGES)}


@contextmanager
def _shared_lock(folder: Path, token: str) -> Iterator[None]:
    """Hold the run directory's lock for workers, once this node sees the driver's token in it."""
    path = folder / ".workers"
    try:
        lock = path.open("r")
    except OSError as error:
        what = f"{folder}: not found on {platform.node()} ({error.strerror})"
        raise LeewayError(what, fix=SHARED_FOLDER) from error
    with lock:
        wait_for(lambda: path.read_text() == token, "this run's token", folder)
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield


def wait_for(is_visible: Callable[[], bool], what: str, folder: Path) -> None:
    """Wait until a shared file system shows here what another node wrote; raises LeewayError after PATIENCE_S."""
    until = time.monotonic() + PATIENCE_S
    while not is_visible():
        if time.monotonic() > until:
            raise LeewayError(f"{folder}: {platform.node()} does not see {what}", fix=SHARED_FOLDER)
        time.sleep(0.2)


try:
    import ray
    from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, WorkerCrashedError
except ImportError as error:
    raise LeewayError("--executor ray: Ray is not installed", fix="pip install 'leeway[ray]'") from error

LOST = (RayActorError, WorkerCrashedError, OutOfMemoryError, ObjectLostError)
RESERVE_S = 20.0  # how long a run waits until the cluster has ended the run before it
TRIES = 4  # of a job whose worker dies
OBJECTS = 80 << 20  # bytes of a local cluster's object store: only jobs and progress pass through it
NAMESPACE = "leeway"


@dataclass
class _WorkerHandle:
    """The driver's view of a worker: its current call (setup, then jobs) and its pending poll for events."""

    actor: Any
    call: Any
    job: Job | None = None
    poll: Any = None
    is_set_up: bool = False

    @property
    def place(self) -> str:
        return f"Ray actor {self.actor._actor_id.hex()}"


@dataclass
class RayExecutor:
    """A Ray cluster for one run: the one at RAY_ADDRESS, or a new one on this machine that ends with the run."""

    n_workers: int | None
    log: Callable[[str], None]
    _watchdog: Watchdog = field(init=False)
    _workers: list[_WorkerHandle] = field(default_factory=list)
    _losses: Counter[str] = field(default_factory=Counter)
    _reservation: Any = None
    _request: dict[str, float] = field(default_factory=dict)
    _connected: bool = False
    _token: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        self._watchdog = Watchdog(self.log)

    def __enter__(self) -> RayExecutor:
        return self

    def __exit__(self, *_: object) -> None:
        if closing := [h.actor.close.remote() for h in self._workers if h.is_set_up]:
            ray.wait(closing, num_returns=len(closing), timeout=3.0)
        for actor in [*(h.actor for h in self._workers), *([self._reservation] if self._reservation else [])]:
            ray.kill(actor)
        self._workers, self._reservation = [], None
        if self._connected:
            ray.shutdown()

    def workers(self, prepared: Prepared, jobs: int) -> int:
        self._connect(prepared)
        return min(self._capacity(prepared), jobs)

    def _capacity(self, prepared: Prepared) -> int:
        """Return the number of workers, by default as many as fit the nodes; 0 while no node is alive."""
        if requires_single_worker(prepared.spec, self.n_workers):
            return 1
        if self.n_workers is not None:
            return self.n_workers
        return sum(_workers_per_node(node["Resources"], self._request) for node in ray.nodes() if node["Alive"])

    def manifest(self, worker: Worker, command: str) -> dict[str, Any]:
        """Return the manifest from a worker, whose machine computes the results."""
        self._connect(worker.prepared)
        while True:
            self._scale_up(worker, max(1, self._capacity(worker.prepared)))
            self._wait(lambda _: None)
            for handle in [h for h in self._workers if h.is_set_up]:
                try:
                    made = ray.get(handle.actor.manifest.remote(command))
                except LOST as error:
                    self._drop(handle, error)
                    continue
                if isinstance(made, LeewayError):
                    raise made
                return dict(made)

    def run_jobs(self, worker: Worker, jobs: Seq[Job], on_event: OnEvent) -> Iterator[Job]:
        worker.release()
        left = list(jobs)
        while left:
            self._scale_up(worker, min(max(1, self._capacity(worker.prepared)), len(left)))
            free = [h for h in self._workers if h.is_set_up and h.job is None]
            running = [h.job for h in self._workers if h.job]
            for handle, job in zip(free, ready(left, running, worker.has_checkpoint), strict=False):
                handle.job, handle.call = job, handle.actor.run_job.remote(job)
                self._watchdog.report(job, handle.place)
            for job in self._wait(on_event):
                wait_for(lambda job=job: worker.has_results(job), f"the results of {job.name}", worker.store.folder)  # type: ignore[misc]
                left.remove(job)
                self._watchdog.end(job)
                yield job
            self._watchdog.check()

    def _connect(self, prepared: Prepared) -> None:
        """Join the cluster and size a worker; raises LeewayError if no node can hold one."""
        if self._request:
            return
        if prepared.spec.device.startswith("cuda:"):
            what = f"device: {prepared.spec.device} under --executor ray: Ray gives each worker one GPU"
            raise LeewayError(what, fix="set device: cuda")
        if not ray.is_initialized():
            self._join()
        self._request = _request(prepared)
        if not self._capacity(prepared):
            amounts = {k: f"{v / 2**30:.1f} GiB of" if k == "memory" else f"{v:g}" for k, v in self._request.items()}
            needed = ", ".join(f"{amount} {k}" for k, amount in amounts.items())
            what = f"--executor ray: no node of the cluster has the resources of a worker ({needed})"
            raise LeewayError(what, fix="add such nodes; or give --workers, and the run waits for them")

    def _join(self) -> None:
        """Join the cluster at RAY_ADDRESS, or start one here, and log which."""
        address = os.environ.get("RAY_ADDRESS")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": NAMESPACE}
        try:
            if address:
                ray.init(address=address, **quiet)
            else:
                ray.init(address="local", include_dashboard=False, object_store_memory=OBJECTS, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            where = f"no cluster answers at RAY_ADDRESS {address}" if address else "Ray does not start on this machine"
            fix = "check that its head runs, or unset RAY_ADDRESS to start a cluster on this machine"
            raise LeewayError(f"--executor ray: {where} ({first_line(error)})", fix=fix) from error
        self._connected = True
        nodes, total = [n for n in ray.nodes() if n["Alive"]], ray.cluster_resources()
        where = f"the cluster at {address}" if address else "a new cluster on this machine"
        self.log(f"Ray: {where}; nodes: {len(nodes)}, CPUs: {total.get('CPU', 0):g}, GPUs: {total.get('GPU', 0):g}")

    def _scale_up(self, worker: Worker, wanted: int) -> None:
        """Start workers until there are `wanted`, replacing lost ones."""
        folder, cache = worker.store.folder, shared_root()
        if self._reservation is None:
            self._reservation = _reserve(folder)
            (folder / ".workers").write_text(self._token)
        actor_class = ray.remote(max_concurrency=2)(RayWorker).options(**self._request)
        raw, expected = worker.prepared.spec.model_dump(mode="json", by_alias=True), fingerprint(worker.prepared)
        shared = {ENVIRONMENT: str(cache)} if cache else {}
        while len(self._workers) < wanted:
            actor = actor_class.remote()
            call = actor.setup.remote(raw, folder.resolve(), self._token, installed_versions(), shared, expected)
            self._workers.append(_WorkerHandle(actor, call))

    def _wait(self, on_event: OnEvent) -> list[Job]:
        """Wait up to 0.3 s and return the completed jobs; raises the first mistake of a user."""
        handles = {h.call: h for h in self._workers if h.call is not None}
        if not handles:
            time.sleep(0.3)
            return []
        done, _ = ray.wait(list(handles), num_returns=1, timeout=0.3)
        completed = []
        for handle in [handles[ref] for ref in done]:
            try:
                error = ray.get(handle.call)
            except LOST as lost:
                self._drop(handle, lost)
                continue
            if error is not None:
                raise error
            completed += [handle.job] if handle.job else []
            handle.is_set_up, handle.job, handle.call = True, None, None
        for handle in [h for h in self._workers if h.is_set_up]:
            self._poll_events(handle, on_event)
        return completed

    def _poll_events(self, handle: _WorkerHandle, on_event: OnEvent) -> None:
        """Pass on a worker's events and poll again; `_wait` notices a lost worker by its call."""
        if handle.poll is not None and ray.wait([handle.poll], timeout=0)[0]:
            try:
                for event in ray.get(handle.poll):
                    on_event(event)
                    if handle.job:
                        self._watchdog.report(handle.job, handle.place)
            except LOST:
                return
            handle.poll = None
        if handle.poll is None:
            handle.poll = handle.actor.take_events.remote()

    def _drop(self, handle: _WorkerHandle, error: Exception) -> None:
        """Remove a lost worker, so that another one runs its job; raises LeewayError after TRIES losses."""
        self._workers.remove(handle)
        ray.kill(handle.actor)
        what = handle.job.name if handle.job else "setup"
        if handle.job:
            self._watchdog.end(handle.job)
        self._losses[what] += 1
        if self._losses[what] >= TRIES:
            fault = f"--executor ray: {what} has lost its worker {TRIES} times ({first_line(error)})"
            fix = "look at the node's logs (probably out of memory); run the same command again to resume"
            raise LeewayError(fault, fix=fix) from error
        self.log(f"Ray: {what} has lost its worker; it runs again")


def _request(prepared: Prepared) -> dict[str, float]:
    """Return a worker's resources: the study's threads, and a GPU, or on a CPU the memory that a plan estimates."""
    spec = prepared.spec
    request: dict[str, float] = {"num_cpus": spec.threads * spec.processes}
    if spec.device.startswith("cuda") or (spec.device == "auto" and ray.cluster_resources().get("GPU", 0)):
        return {**request, "num_gpus": spec.processes}
    return {**request, "memory": spec.processes * memory_of_a_worker(prepared)}


def _workers_per_node(resources: dict[str, float], request: dict[str, float]) -> int:
    names = {"num_cpus": "CPU", "num_gpus": "GPU", "memory": "memory"}
    return min(int(resources.get(names[k], 0.0) // v) for k, v in request.items())


def _reserve(folder: Path) -> Any:
    """Take the folder's name in the cluster, which Ray frees when this run ends; raises LeewayError if it is taken."""
    until = time.monotonic() + RESERVE_S
    while True:
        try:
            name = digest("run directory", str(folder.resolve()))
            return ray.remote(num_cpus=0)(_Reservation).options(name=name, namespace=NAMESPACE).remote()
        except ValueError as error:  # the name is taken
            if time.monotonic() > until:
                what = f"{folder} is in use by another leeway of this cluster"
                raise LeewayError(what, fix="wait for it, or give another --out") from error
            time.sleep(0.5)


class _Reservation:
    """An actor without work: its name reserves a run directory."""
