"""Break machine and endpoint under a run: one line, nothing paid twice, and the same bytes once mended."""

from __future__ import annotations

import argparse
import os
import pickle
import resource
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.hardening import endpoint, machine
from benchmarks.hardening.kills import Bench, Tally
from benchmarks.hardening.runs import preload, write_study
from benchmarks.hardening.table import Line

REQUESTS, HEALTHY = 6, 2  # the first are answered well, and paid for, before the fault
MEMORY = 256 << 20  # bytes that a client may need for whatever an endpoint sends
FLOOD = 1 << 30  # bytes that may be in the sockets' buffers and queues when a client hangs up


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", default="", help="faults whose names hold this text")
    parser.add_argument("--points", type=int, default=15, help="moments of a run at which the disk is full, and so on")


def run(options: argparse.Namespace) -> list[Line]:
    lines = []
    if any(options.only in f"endpoint {name}" for name in endpoint.FAULTS) or options.only in "endpoint certificate":
        lines = _endpoint_faults(options.folder, options.only.removeprefix("endpoint").strip())
    if any(options.only in name for name in machine.FAULTS):
        preload(write_study(options.folder))
        lines += machine.run(Bench.build(options.folder), options)
    return lines


def _endpoint_faults(folder: Path, only: str) -> list[Line]:
    """Send requests through the cache to an endpoint that fails after a few replies; then mend it."""
    import openai  # noqa: F401

    import leeway.generation.cache
    import leeway.generation.openai_api  # noqa: F401

    lines = []
    for name, fault in endpoint.FAULTS.items():
        if only in name:
            with endpoint.serving(fault, HEALTHY) as server:
                lines.append(_try(folder / f"replies-{len(lines)}", server, name))
                print(lines[-1], flush=True)
    for name, (certificate, trusted) in endpoint.certificates(folder).items():
        if only in f"certificate {name}":
            with endpoint.serving(endpoint.FAULTS["sends null"], 1 << 40, certificate) as server:
                lines.append(_distrust(folder / "replies", server, name, certificate if trusted else None))
                print(lines[-1], flush=True)
    return lines


@dataclass
class Outcome:
    """What a caller gets: texts, reasons of failures, an error in one line, or a traceback; and the memory it took."""

    texts: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    error: str = ""
    crash: str = ""
    memory: int = 0  # bytes above the memory before

    @property
    def lines(self) -> Sequence[str]:
        return [*self.failures, *([self.error] if self.error else [])]


def _send(folder: Path, url: str, timeout_s: float, **environment: str) -> Outcome:
    """Send the requests from a fork."""
    path = folder.with_suffix(".outcome")
    child = os.fork()
    if child == 0:
        try:
            os.environ.update(environment)
            path.write_bytes(pickle.dumps(_outcome(folder, url, timeout_s)))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    return pickle.loads(path.read_bytes()) if path.exists() else Outcome(crash="the process died")


def _outcome(folder: Path, url: str, timeout_s: float) -> Outcome:
    from leeway.cache import RecordStore
    from leeway.errors import LeewayError
    from leeway.generation.backend import Request
    from leeway.generation.cache import CachedBackend
    from leeway.generation.openai_api import ApiSettings, OpenAIBackend

    before, found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, Outcome()
    settings = ApiSettings("judge", url, key_env="", concurrency=4, timeout_s=timeout_s, retries=1)
    requests = [Request([{"role": "user", "content": f"prompt {k}"}], 20) for k in range(REQUESTS)]
    try:
        replies = CachedBackend(OpenAIBackend(settings), RecordStore(folder)).complete(requests, lambda _: None)
        found.texts = [reply.text for reply in replies if reply.failure is None]
        found.failures = [reply.failure for reply in replies if reply.failure is not None]
    except LeewayError as error:
        found.error = str(error)
    except BaseException:  # noqa: BLE001 - whatever it is, it is a finding
        found.crash = traceback.format_exc()
    found.memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10
    return found


def _judge(tally: Tally, found: Outcome) -> None:
    if found.crash:
        tally.fault(found.crash[-300:])
    for line in found.lines:
        if not line.isprintable() or len(line) > 500:
            tally.fault(f"not one printable line: {line!r:.300}")
    if found.memory > MEMORY:
        tally.fault(f"{found.memory >> 20} MiB of memory")


def _try(folder: Path, server: endpoint.Server, name: str) -> Line:
    tally = Tally(1)
    found = _send(folder, server.url, timeout_s=8.0)
    _judge(tally, found)
    _, paid, flooded = server.counts()
    if flooded > FLOOD:
        tally.fault(f"{flooded >> 20} MiB were read")
    invalid = [text for text in found.texts if text != endpoint.GRADES]
    if invalid:
        tally.fault(f"taken for a reply: {invalid[0]!r:.100}")
    server.heal()
    again = _send(folder, server.url, timeout_s=120.0)
    _judge(tally, again)
    total = server.counts()[1]
    if len(again.texts) != REQUESTS:
        tally.fault(f"mended, {len(again.texts)} of {REQUESTS} replies: {again.lines}")
    if twice := [key for key, n in total.items() if n > 1]:
        tally.fault(f"{len(twice)} of {len(paid)} requests paid twice")
    return tally.line(f"endpoint {name}", next(iter(found.lines), "read as it is meant"))


def _distrust(folder: Path, server: endpoint.Server, name: str, issuer: Path | None) -> Line:
    tally = Tally(1)
    found = _send(folder, server.url, 8.0, **({"SSL_CERT_FILE": str(issuer)} if issuer else {}))
    _judge(tally, found)
    if found.texts or server.counts()[0]:
        tally.fault("the prompts were sent")
    return tally.line(f"endpoint with a certificate {name}", next(iter(found.lines), ""))
