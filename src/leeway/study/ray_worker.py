"""What works on a Ray cluster's nodes: a process that carries pieces out, over a run directory that all nodes see."""

from __future__ import annotations

import fcntl
import os
import platform
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from leeway.errors import LeewayError
from leeway.paths import expand
from leeway.study.drawing import Drawing
from leeway.study.executor import Event, timed
from leeway.study.keeping import SHARED as ANSWERS
from leeway.study.manifest import PACKAGES, manifest
from leeway.study.pieces import Piece
from leeway.study.prepare import prepare
from leeway.study.spec import Spec
from leeway.study.store import REFERENCES, Store
from leeway.study.work import Work

PATIENCE_S = 90.0  # for a file system to show on one node what another has written


class Worker:
    """A process of the cluster that carries pieces out; what it did since is asked for beside that (`told`)."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._ends = ExitStack()
        self._work: Work | None = None

    def begin(
        self, raw_spec: dict[str, Any], folder: Path, token: str, versions: dict[str, str], shared: dict[str, str]
    ) -> LeewayError | None:
        """Prepare the study, on the same versions and over the same folders; a user's mistake comes back."""
        os.environ.update(shared)
        try:
            _alike(versions)
            self._ends.enter_context(_held(folder, token))
            own = self._ends.enter_context(tempfile.TemporaryDirectory(prefix="leeway-"))
            store = Store(folder)
            prepared = prepare(Spec.model_validate(raw_spec), Drawing(store.pairs, kept=store.kept_on(platform.node())))
            self._work = Work(prepared, store, timed(self._events.append), Path(own))
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

    def do(self, piece: Piece) -> LeewayError | None:
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


def _seen(work: Work, piece: Piece) -> bool:
    """Whether all that a piece waited for can be seen from here."""
    return all(map(work.there, piece.needs)) and all(map(work.written, piece.after))


def shared_folders() -> dict[str, str]:
    """The folders that several runs share, as the driver's environment names them."""
    named = {name: os.environ.get(name) for name in (REFERENCES, ANSWERS)}
    return {name: str(expand(folder).absolute()) for name, folder in named.items() if folder}


def versions_here() -> dict[str, str]:
    return {p: version(p) for p in ("leeway", *PACKAGES)}


def _alike(versions: dict[str, str]) -> None:
    """Raise where bits would depend on which node computes them."""
    for package, here in versions_here().items():
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


def wait_for(there: Callable[[], bool], piece: Piece | None, folder: Path) -> None:
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


def called(piece: Piece) -> str:
    return f"{piece.kind} {piece.alias} s{piece.seed}"
