"""Fuzz run directories: every command that reads a finished run, on one with changed, swapped, missing or odd files.

Half of the changed tables are forged: the manifest records their new hash, as if the run had written them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.hardening import mutations
from benchmarks.hardening.attempts import LIMIT_S, Tally, attempt
from benchmarks.hardening.small_run import small_run
from benchmarks.hardening.table import Line

DRAWING = ("report", "rescore", "compare", "run again")  # they draw all figures, for a run that is whole too
DRAWING_S = 120  # of CPU time
RULE = "rules: [{measure: asr, margin: 0.1}]\ncheckpoint: {objective: sft}\n"
TEXTS = (
    "../../../tmp/x",
    "a/b",
    "",
    "=1+1",
    "\x1b[2J",
    "\u202e",
    "{{ 7*7 }}",
    "\\input{/etc/passwd}",
    "base",
    "x" * 3_000,
)
NUMBERS = (-1, 0, 2**53 + 1, 10**12, 7)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--n", type=int, default=500, help="run directories")
    parser.add_argument("--only", help="one command")


def run(options: argparse.Namespace) -> list[Line]:
    """Fuzz; every kind of failure is printed with what was changed."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    folder = options.folder
    finished = small_run(folder)
    commands = {k: c for k, c in _commands(finished, folder).items() if options.only in (None, k)}
    tallies = {name: Tally(f"damaged or forged run directories: {name}") for name in commands}
    names = list(commands)
    for n in range(options.n):
        rng = random.Random(f"{options.seed}/{n}")
        name = names[n % len(names)]
        copy = folder / "damaged"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(finished, copy, copy_function=os.link)
        what = damage(rng, copy)
        limit = DRAWING_S if name in DRAWING else LIMIT_S
        found = attempt(lambda name=name, copy=copy: commands[name](copy), folder, limit_s=limit)  # type: ignore[misc]
        tallies[name].add(found, f"{n}: {what}")
    return [t.line() for t in tallies.values()]


def _commands(finished: Path, folder: Path) -> dict[str, Callable[[Path], object]]:
    from leeway.cache import describe, find_cache
    from leeway.gate import gate
    from leeway.integrations.hub import push
    from leeway.report import build
    from leeway.report.compare.compare import compare, write
    from leeway.report.exports.redacted import publish
    from leeway.report.results import Results
    from leeway.rescoring.label_sheet import make_sheet
    from leeway.rescoring.rescore import rescore
    from leeway.study.ledger_report import view

    rule = folder / "rule.yaml"
    rule.write_text(RULE)

    def tables(copy: Path) -> None:
        results = Results.load(copy)
        results.rates(), results.contrasts(), results.outcomes(), results.persona(), results.claims()

    def published(copy: Path) -> None:
        shutil.rmtree(folder / "redacted", ignore_errors=True)
        publish(copy, folder / "redacted")

    def pushed(copy: Path) -> None:
        shutil.rmtree(folder / "pushed", ignore_errors=True)
        push(copy, None, "sft", None, None, public=False, dry_run=folder / "pushed")

    def sheet(copy: Path) -> None:
        (folder / "sheet.csv").unlink(missing_ok=True)
        make_sheet(copy, out=folder / "sheet.csv")

    return {
        "tables": tables,
        "ledger": view,
        "gate": lambda c: gate(c, rule, folder / "gated"),
        "report": build,
        "compare": lambda c: write(compare([finished, c]), folder / "compared"),
        "label sheet": sheet,
        "rescore": lambda c: rescore(c, "keywords", name="again", quiet=True),
        "export --redacted": published,
        "push --dry-run": pushed,
        "cache": lambda c: describe(find_cache(c)),
        "run again": small_run_again,
    }


def small_run_again(copy: Path) -> None:
    """Resume the small study in a damaged folder, by the code that `leeway run` calls."""
    from benchmarks.hardening.small_run import STUDY
    from leeway.study.load import parse
    from leeway.study.progress import Reporter
    from leeway.study.run import run as run_study

    run_study(parse(STUDY, "small"), copy, Reporter(quiet=True), "leeway run small.yaml", workers=1)


def damage(rng: random.Random, run: Path) -> str:
    """Change one or two files of a run, and return what was done."""
    done = []
    for _ in range(rng.choice([1, 1, 2])):
        files = sorted(p for p in run.rglob("*") if p.is_file() and "cache" not in p.relative_to(run).parts)
        tops = [p for p in files if p.parent == run]
        path = rng.choice(tops if rng.random() < 0.7 else files)
        content = path.read_bytes()
        how = rng.random()
        path.unlink()  # the original is linked, never written to
        if how < 0.08:
            done.append(f"{path.name} removed")
        elif how < 0.2:
            done.append(f"{path.name} is {_odd(rng, path)}")
        elif how < 0.4:
            path.write_bytes(mutations.flipped(rng, content))
            done.append(f"{path.name} has other bytes")
        else:
            path.write_bytes(_changed(rng, path, content))
            forged = rng.random() < 0.7 and _forge(run, path)
            done.append(f"{path.name} has other values{' (forged)' if forged else ''}")
    return ", ".join(done)


def _odd(rng: random.Random, path: Path) -> str:
    made: dict[str, Callable[[], object]] = {
        "a folder": path.mkdir,
        "a pipe": lambda: os.mkfifo(path),
        "a link to /dev/zero": lambda: path.symlink_to("/dev/zero"),
        "a link to itself": lambda: path.symlink_to(path),
        "a link to a system file": lambda: path.symlink_to("/etc/hostname"),
        "empty": path.touch,
    }
    name = rng.choice(list(made))
    made[name]()
    return name


def _changed(rng: random.Random, path: Path, content: bytes) -> bytes:
    """Return a file's content with other values, in its own format."""
    if path.suffix == ".json":
        return _json(mutations.mutant_value(rng, json.loads(content)))
    if path.suffix == ".yaml":
        return mutations.mutant_text(rng, content.decode())
    if path.suffix == ".jsonl":
        lines = [json.loads(line) for line in content.splitlines()]
        return b"\n".join(_json(v) for v in mutations.mutant_value(rng, lines) or [])
    if path.suffix == ".parquet":
        return _table(rng, content)
    return mutations.flipped(rng, content)


def _json(value: Any) -> bytes:
    try:
        return json.dumps(value, default=str, skipkeys=True).encode("utf-8", "surrogatepass")
    except ValueError:
        return b"9" * 5_000


def _table(rng: random.Random, content: bytes) -> bytes:
    """Return a table with a column dropped, retyped, emptied, or filled with odd values, or with other rows."""
    import io

    import pandas as pd
    import pyarrow.parquet as pq

    source = pq.read_table(io.BytesIO(content))
    table: pd.DataFrame = source.to_pandas()
    for _ in range(rng.randint(1, 2)):
        column, how = rng.choice(list(table.columns)), rng.random()
        some = table.sample(frac=rng.choice([0.01, 0.3, 1.0]), random_state=rng.randrange(2**31)).index
        if how < 0.1:
            table = table.drop(columns=column)
        elif how < 0.2:
            table = table.iloc[: rng.choice([0, 1, len(table) // 2])]
        elif how < 0.3:
            table = pd.concat([table, table.loc[some]], ignore_index=True)
        elif how < 0.4:
            table[column] = table[column].astype(str)
        elif how < 0.5:
            table[column] = None
        elif pd.api.types.is_numeric_dtype(table[column]):
            odd = rng.choice(
                NUMBERS if table[column].dtype.kind == "i" else (float("nan"), float("inf"), -1.0, 1e308, 2.0)
            )
            table.loc[some, column] = odd
        else:
            table.loc[some, column] = rng.choice(TEXTS)
        if table.empty or not len(table.columns):
            break
    out = io.BytesIO()
    try:
        table.to_parquet(out, index=False)
    except Exception:  # noqa: BLE001 - a mixture that Parquet does not hold
        return content
    return out.getvalue()


def _forge(run: Path, path: Path) -> bool:
    """Record the changed file's hash in the manifest, and its own checksum in a sealed record."""
    from leeway.hashing import file_digest
    from leeway.io import with_checksum

    try:
        if path.suffix == ".json" and "seal" in (record := json.loads(path.read_text())):
            path.write_text(json.dumps(with_checksum({k: v for k, v in record.items() if k != "seal"})))
        manifest = run / "manifest.json"
        facts = json.loads(manifest.read_text())
        name = str(path.relative_to(run))
        if name not in facts.get("file_hashes", {}):
            return False
        facts["file_hashes"][name] = file_digest(path)
        manifest.unlink()
        manifest.write_text(json.dumps(facts))
    except Exception:  # noqa: BLE001 - a manifest that was damaged before
        return False
    return True
