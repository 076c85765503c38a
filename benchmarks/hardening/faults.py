"""Break machine and endpoint under a run: one line, nothing paid twice, and the same bytes once mended."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from benchmarks.hardening import endpoint, machine
from benchmarks.hardening.kills import Bench, Tally
from benchmarks.hardening.runs import Fork, differing, preload, snapshot
from benchmarks.hardening.table import Line

HEALTHY = 4  # requests that are answered well, and paid for, before the fault


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", default="", help="faults whose names hold this text")
    parser.add_argument("--points", type=int, default=15, help="moments of a run at which the disk is full, and so on")


def run(options: argparse.Namespace) -> list[Line]:
    preload()
    import openai  # noqa: F401

    bench = Bench.build(options.folder)
    lines = machine.run(bench, options)
    tallies = _endpoint_faults(bench, options.only)
    return [
        *lines,
        *(tally.line(f"endpoint {name}", "one line; nothing paid twice") for name, tally in tallies.items()),
    ]


def rescored(out: Path, url: str, timeout_s: float = 2.0) -> list[str]:
    settings = ["model.model=judge", f"model.endpoint={url}", "model.key_env=JUDGE_KEY", "model.concurrency=2"]
    return [
        "rescore",
        str(out),
        "--judge",
        "rubric",
        *settings,
        f"model.timeout_s={timeout_s}",
        "model.retries=1",
        "--quiet",
    ]


def _endpoint_faults(bench: Bench, only: str) -> dict[str, Tally]:
    """Judge the answers of a finished run at an endpoint that fails after a few replies; then mend it."""
    healthy = _fresh(bench, "judged")
    with endpoint.serving(endpoint.FAULTS["never answers"], 1 << 40) as server:
        fork = _judge(bench, healthy, server.url)
        if code := fork.wait():
            raise SystemExit(f"judging ended with {code}: {fork.output}")
        n_requests = len(server.counts()[1])
    expected = snapshot(healthy)
    tallies = {}
    for name, fault in endpoint.FAULTS.items():
        if only in name:
            with endpoint.serving(fault, HEALTHY) as server:
                tallies[name] = _try(bench, server, name, expected, n_requests)
    for name, (certificate, trusted) in endpoint.certificates(bench.folder).items():
        if only in name:
            with endpoint.serving(endpoint.FAULTS["sends null"], 1 << 40, certificate) as server:
                tallies[f"with a certificate {name}"] = _distrust(bench, server, certificate if trusted else None)
    return tallies


def _fresh(bench: Bench, name: str) -> Path:
    out = bench.folder / name
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(bench.whole, out)
    return out


def _judge(bench: Bench, out: Path, url: str, **environment: str) -> Fork:
    variables = {"JUDGE_KEY": "sk-hardening", **environment}
    return Fork(rescored(out, url), bench.folder / "judge.log", environment=variables).start()


def _try(bench: Bench, server: endpoint.Server, name: str, expected: dict[str, Any], n_requests: int) -> Tally:
    tally, out = Tally(), _fresh(bench, "judged")
    tally.tried += 1
    fork = _judge(bench, out, server.url)
    code = fork.wait_or_kill(90)
    lines = fork.output.strip().splitlines()
    if code not in (0, 2) or len(lines) > 1 or "Traceback" in fork.output or "internal error" in fork.output:
        tally.fault(f"{name}: exit {code}, {len(lines)} lines: {fork.output.strip()[-300:]}")
    if any(not c.isprintable() for line in lines for c in line):
        tally.fault(f"{name}: control characters on the terminal")
    _, paid, flooded = server.counts()
    if flooded > 1 << 31:
        tally.fault(f"{name}: {flooded >> 20} MiB were read")
    before = dict(paid)
    server.heal()
    again = _judge(bench, out, server.url)
    if (code := again.wait_or_kill(90)) != 0:
        tally.fault(f"{name}, mended: exit {code}: {again.output.strip()[-300:]}")
    paid = server.counts()[1]
    twice = [key for key, n in paid.items() if n > 1]
    if twice or any(paid[key] != n for key, n in before.items()):
        tally.fault(f"{name}: {len(twice)} requests paid twice")
    if len(paid) != n_requests:
        tally.fault(f"{name}: {len(paid)} of {n_requests} requests answered")
    if code == 0 and (names := differing(snapshot(out), expected)):
        tally.fault(f"{name}: {', '.join(names[:5])} differ from an endpoint without faults")
    return tally


def _distrust(bench: Bench, server: endpoint.Server, issuer: Path | None) -> Tally:
    tally, out = Tally(), _fresh(bench, "judged")
    tally.tried += 1
    fork = _judge(bench, out, server.url, **({"SSL_CERT_FILE": str(issuer)} if issuer else {}))
    code, paid = fork.wait_or_kill(90), server.counts()[1]
    lines = fork.output.strip().splitlines()
    if paid:
        tally.fault(f"{len(paid)} prompts were sent")
    if code not in (0, 2) or len(lines) > 1:
        tally.fault(f"exit {code}, {len(lines)} lines: {fork.output.strip()[-300:]}")
    return tally
