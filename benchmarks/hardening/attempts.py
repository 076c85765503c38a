"""One attempt: call something on a hostile input, and say how it ended.

An attempt fails if it raises anything but one-line LeewayErrors, runs longer than its limit, writes outside the folders
it was given, opens a connection, starts a process or unpickles an object. A process that hangs in native code is ended
by faulthandler, with the input's path on stderr.
"""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.hardening.table import Line
from leeway.errors import LeewayError

LIMIT_S = 10  # of CPU time, so that other work on the machine is not counted
WAIT_S = 60  # of waiting, on a pipe or a socket for example
DEAD_S = 120  # native code does not return to Python's alarm
LONGEST = 6_000  # characters of a message; one that lists many faults has a line for each
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2028\u2029\u2060-\u2069\ufeff]")
LIBRARIES = ("MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR")  # folders that libraries make when they are imported
DEVICES = ("/dev/null", "/dev/tty", "/proc/", "/sys/")
SHOWN = 3  # inputs kept of one kind of failure

Ended = Literal["accepted", "refused", "crash", "hang", "message", "write", "network", "process", "pickle"]
HARMLESS: tuple[Ended, ...] = ("accepted", "refused")


class Hang(BaseException):
    """The limit has passed; not an Exception, so that no handler of the code under test takes it."""


@dataclass
class _Watch:
    """What the audit hook saw; it cannot be removed, so it is switched on and off."""

    on: bool = False
    allowed: tuple[str, ...] = ()
    seen: list[tuple[Ended, str]] = field(default_factory=list)


_watch = _Watch()
WRITES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod"}
SOCKETS = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"}
PROCESSES = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"}


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watch.on:
        return
    if event == "open":
        path, mode, flags = arguments
        written = any(c in (mode or "") for c in "wax+") if mode else bool((flags or 0) & (os.O_WRONLY | os.O_RDWR))
        if written and not isinstance(path, int) and not os.path.isdir(path):  # a file without a name is in a folder
            _note_write(path)
    elif event in ("os.remove", "os.rmdir") and isinstance(arguments[1], int) and arguments[1] >= 0:
        _note_write(f"/proc/self/fd/{arguments[1]}/{os.fsdecode(arguments[0])}")  # as shutil.rmtree does
    elif event in WRITES:
        for path in arguments[1:2] if event == "os.symlink" else arguments[:2]:
            if isinstance(path, str | bytes | os.PathLike):
                _note_write(path)
    elif event in SOCKETS and not (event == "socket.connect" and isinstance(arguments[1], str | bytes)):
        _watch.seen.append(("network", f"{event} {arguments[1:] or arguments}"))
    elif event in PROCESSES:
        _watch.seen.append(("process", f"{event} {arguments[0]}"))
    elif event == "pickle.find_class":
        _watch.seen.append(("pickle", ".".join(map(str, arguments))))


def _note_write(path: Any) -> None:
    whole = os.path.abspath(os.fsdecode(path))
    real = os.path.realpath(whole)
    if not any(real.startswith(a) for a in _watch.allowed) and not real.startswith(DEVICES):
        _watch.seen.append(("write", real))


@contextmanager
def watched(*folders: Path) -> Iterator[list[tuple[Ended, str]]]:
    """Record connections, processes, unpickled names, and writes outside `folders`."""
    if not getattr(sys, "_leeway_hook", False):
        sys.addaudithook(_hook)
        sys._leeway_hook = True  # type: ignore[attr-defined]
    _watch.on, _watch.seen = True, []
    own = [os.environ[v] for v in LIBRARIES if v in os.environ]
    _watch.allowed = tuple(os.path.realpath(f) for f in (*folders, *own))
    try:
        yield _watch.seen
    finally:
        _watch.on = False


@dataclass(frozen=True)
class Attempt:
    """How one attempt ended; `kind` groups equal failures."""

    ended: Ended
    kind: str = ""
    detail: str = ""

    @property
    def failed(self) -> bool:
        return self.ended not in HARMLESS


def attempt(call: Callable[[], object], *folders: Path, limit_s: float = LIMIT_S) -> Attempt:
    """Call, and return how it ended; writes below `folders` are allowed."""

    def expire(*_: object) -> None:
        raise Hang

    timers = {
        signal.ITIMER_PROF: (signal.SIGPROF, limit_s),
        signal.ITIMER_REAL: (signal.SIGALRM, max(WAIT_S, 6 * limit_s)),
    }
    before = [(number, signal.signal(number, expire)) for number, _ in timers.values()]
    faulthandler.dump_traceback_later(max(DEAD_S, 12 * limit_s), exit=True)
    try:
        with watched(*folders) as seen:
            for timer, (_, seconds) in timers.items():
                signal.setitimer(timer, seconds)
            try:
                found = _ended(call)
            finally:
                for timer in timers:
                    signal.setitimer(timer, 0)
    except Hang:  # between the call and the end of the timer
        return Attempt("hang", "hang", f"over {limit_s:g} s")
    finally:
        faulthandler.cancel_dump_traceback_later()
        for number, handler in before:
            signal.signal(number, handler)
    if found.failed or not seen:
        return found
    ended, what = seen[0]
    return Attempt(ended, f"{ended} {re.sub('[0-9a-f]{6,}', '…', what)}", what)


def _ended(call: Callable[[], object]) -> Attempt:
    try:
        call()
    except LeewayError as error:
        return judged_message(str(error))
    except Hang:
        return Attempt("hang", f"hang in {_place(sys.exc_info()[2])}", "")
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001 - whatever it raises is what is looked for
        where = _place(error.__traceback__)
        return Attempt("crash", f"{type(error).__name__} at {where}", str(error)[:200])
    return Attempt("accepted")


def judged_message(text: str) -> Attempt:
    """Return whether a refusal is readable: short, and without control characters."""
    if len(text) > LONGEST:
        return Attempt("message", f"message of over {LONGEST:,} characters", f"{len(text):,}: {text[:200]}")
    if strange := CONTROL.search(text):
        return Attempt("message", f"message with U+{ord(strange[0]):04X}", repr(text[:300]))
    return Attempt("refused", detail=text)


def _place(tb: Any) -> str:
    """Return the last frame in Leeway's source, and the function that raised."""
    frames = traceback.extract_tb(tb)
    own = [f for f in frames if f"{os.sep}leeway{os.sep}" in f.filename]
    last = own[-1] if own else frames[-1]
    return f"{Path(last.filename).name}:{last.lineno} {last.name} ({frames[-1].name})"


@dataclass
class Tally:
    """Counts of one kind of input, and examples of each kind of failure."""

    name: str
    note: str = ""
    ended: Counter[str] = field(default_factory=Counter)
    failures: dict[str, list[str]] = field(default_factory=dict)

    def add(self, found: Attempt, what: str) -> None:
        """Count an attempt on the input that `what` describes."""
        self.ended[found.ended] += 1
        if found.failed:
            shown = self.failures.setdefault(found.kind, [])
            if len(shown) < SHOWN:
                shown.append(f"{what}: {found.detail}")
                print(f"{self.name}: {found.kind}\n    {shown[-1]}", flush=True)

    @property
    def failed(self) -> int:
        return sum(n for ended, n in self.ended.items() if ended not in HARMLESS)

    def line(self) -> Line:
        """Return the table's line; its note has the counts, unless it has its own."""
        counts = ", ".join(f"{n:,} {ended}" for ended, n in sorted(self.ended.items()))
        return Line(self.name, self.ended.total(), self.failed, self.note or counts)


def keep(folder: Path, name: str, content: bytes, found: Attempt, tally: Tally) -> None:
    """Keep the first inputs of each kind of failure in `folder`/failures."""
    if found.failed and len(tally.failures.get(found.kind, [])) <= SHOWN:
        into = folder / "failures"
        into.mkdir(exist_ok=True)
        (into / name).write_bytes(content)


def scratch(folder: Path) -> Path:
    """Return a fresh folder for one attempt."""
    return Path(tempfile.mkdtemp(dir=folder))
