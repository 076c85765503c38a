"""Cut the power at random moments: what was not flushed to disk is lost, then the run resumes to the same bytes.

The run's process records what `fsync` makes durable: a file's content, a folder's names. At a cut the disk is rebuilt
from that, under three models of a file system, from kind to hostile:

    names    changes of names survive in order, content only if it was flushed (ext4, XFS after a crash)
    mixed    each folder either keeps its current names or falls back to those it was flushed with
    flushed  names survive only if their folder was flushed (the least that POSIX promises)
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import stat
from collections.abc import Callable
from pathlib import Path

from benchmarks.hardening.kills import Bench, Tally
from benchmarks.hardening.runs import Fork, differing, kill_at, preload, random_of, snapshot, torn, write_study
from benchmarks.hardening.table import Line

MODELS = {"names": 1.0, "mixed": 0.5, "flushed": 0.0}  # the probability that a folder keeps its current names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--n", type=int, default=60, help="power cuts, over three models of a file system")


def run(options: argparse.Namespace) -> list[Line]:
    preload(write_study(options.folder))
    bench = Bench.build(options.folder)
    lines = []
    for model, keeps in MODELS.items():
        tally = _cut(bench, options.n // len(MODELS), random_of(options, model), model, keeps)
        lines.append(tally.line(f"power cut before a random file operation, resumed ({model})", "the same bytes"))
    return lines


def _cut(bench: Bench, n: int, rng: random.Random, model: str, keeps: float) -> Tally:
    tally, chain = Tally(), 0
    while tally.tried < n:
        chain += 1
        out, durable = bench.folder / f"{model}-{chain}", bench.folder / f"{model}-{chain}-durable"
        code, output = -signal.SIGKILL, ""
        for attempt in range(20):
            shutil.rmtree(durable, ignore_errors=True)
            durable.mkdir()
            _record_all(out, durable)  # what is there at the start of a boot is on disk
            at = rng.randint(1, bench.operations) if attempt < 19 and tally.tried < n else 10**9
            fork = Fork(bench.arguments(out), bench.folder / "power.log", _recording(out, durable, at)).start()
            code, output = fork.wait(), fork.output
            if code != -signal.SIGKILL:
                break
            tally.tried += 1
            lost = bench.folder / f"{model}-{chain}-lost"
            _rebuild(out, durable, lost, rng, keeps)
            shutil.rmtree(out, ignore_errors=True)
            if lost.exists():
                lost.rename(out)
            if found := torn(out):
                tally.fault(f"{model}, at operation {at}: {found[0]}")
        if code != 0:
            tally.fault(f"{model}: exit {code}: {output.strip()[-300:]}")
        elif names := differing(snapshot(out), bench.expected):
            tally.fault(f"{model}: {', '.join(names[:5])} differ")
    return tally


def _recording(out: Path, durable: Path, operation: int) -> Callable[[], None]:
    """Return a hook that records every fsync below `out`, and kills the process before an operation."""

    def install() -> None:
        flush = os.fsync

        def recorded(fd: int) -> None:
            flush(fd)
            if os.readlink(f"/proc/self/fd/{fd}").startswith(str(out.parent)):
                _record(Path(f"/proc/self/fd/{fd}"), durable)

        os.fsync = recorded
        kill_at(out, operation)()

    return install


def _record(path: Path, durable: Path) -> None:
    """Record a folder's names or a file's content as durable, by inode."""
    info = path.stat()
    if stat.S_ISDIR(info.st_mode):
        names = {entry.name: entry.inode() for entry in os.scandir(path)}
        (durable / f"names-{info.st_ino}").write_text(json.dumps(names))
    else:
        shutil.copyfile(path, durable / f"content-{info.st_ino}")


def _record_all(root: Path, durable: Path) -> None:
    _record(root.parent, durable)
    for path in [root, *root.rglob("*")] if root.exists() else []:
        _record(path, durable)


def _rebuild(out: Path, durable: Path, target: Path, rng: random.Random, keeps: float) -> None:
    """Write what is left of `out` after the cut to `target`."""
    current: dict[int, dict[str, int]] = {}
    for folder in [out, *(p for p in out.rglob("*") if p.is_dir())] if out.exists() else []:
        current[folder.stat().st_ino] = {entry.name: entry.inode() for entry in os.scandir(folder)}
    folders = set(current) | {int(p.name.partition("-")[2]) for p in durable.glob("names-*")}

    def names_of(ino: int) -> dict[str, int]:
        saved = durable / f"names-{ino}"
        flushed = json.loads(saved.read_text()) if saved.exists() else {}
        return current[ino] if ino in current and rng.random() < keeps else flushed

    def write(ino: int, path: Path) -> None:
        if ino in folders:
            path.mkdir()
            for name, child in names_of(ino).items():
                write(child, path / name)
        elif (content := durable / f"content-{ino}").exists():
            shutil.copyfile(content, path)
        else:
            path.touch()  # a name whose content was never flushed

    parent = json.loads((durable / f"names-{out.parent.stat().st_ino}").read_text())
    if out.exists() and (out.name in parent or rng.random() < keeps):
        write(out.stat().st_ino, target)
