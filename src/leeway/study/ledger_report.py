"""`leeway ledger`: what is matched across the objectives of a run, what each cost and learned, and what differs."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from leeway import stats
from leeway.data.ledger import COST, MATCHED, Matching, differences
from leeway.errors import LeewayError
from leeway.hashing import changed_files
from leeway.io import readable
from leeway.report.formatting import mapping
from leeway.report.results import training_steps
from leeway.report.validation import manifest_fault
from leeway.study.run_dir import LEDGER_SCHEMA
from leeway.training import checkpoints

WIDTH = 100  # columns
HASH = 8  # printed hex digits; comparisons use all of them
BLOCKS = {
    "matched": ("step", "source_tokens", "examples", "epochs", "data_hash", "init_hash", "reference_hash"),
    "cost": (*COST, "lr"),
}
LEARNING = ("train-loss", "nll", "preference", "margin", "kl", "kl-general", "weight-change")  # nats per token


@dataclass(frozen=True)
class LedgerView:
    """The text to print, and the faults in it."""

    text: str
    faults: tuple[str, ...]


def view(folder: Path) -> LedgerView:
    """Compare the ledger lines of all checkpoints in `folder` with each other, their adapters and the table."""
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        raise LeewayError(f"{folder} has no manifest.json: not a run directory", fix="give the --out of a `leeway run`")
    with readable(manifest):
        raw = json.loads(manifest.read_text("utf-8"))
        if not isinstance(raw, dict) or (fault := manifest_fault(raw)):
            raise ValueError(fault if isinstance(raw, dict) else f"it is {type(raw).__name__}, not an object")
    rule = mapping(raw.get("matching"))
    matching = Matching(rule.get("count", "source"), mapping(rule.get("starts")))
    paths = sorted(folder.glob("checkpoints/*/s*/*/ledger.json"))
    if not paths:
        raise LeewayError(f"{folder}: no finished checkpoint", fix="run the study first")
    lines, faults = [], []
    for path in paths:
        try:
            lines.append(checkpoints.verified_ledger(path.parent))
        except LeewayError as error:
            faults.append(str(error))
            if (line := checkpoints.unverified_ledger(path.parent)).keys() >= set(MATCHED):
                lines.append(line)
    lines.sort(key=lambda line: (line["seed"], line["budget"]))
    faults += differences(lines, matching)
    faults += _table_faults(folder / "ledger.parquet", lines)
    faults += (
        f"{name} is not the file that the run wrote" for name in changed_files(folder, mapping(raw.get("file_hashes")))
    )
    text = _text(lines, matching, faults, _learning(folder, raw, lines))
    return LedgerView("\n".join(text), tuple(faults))


def _learning(folder: Path, manifest: dict[str, Any], lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what each checkpoint learned under its objective's first condition; empty if nothing was measured."""
    joined = folder / "learning.parquet"
    paths = [joined] if joined.is_file() else sorted(folder.glob("learning/*.parquet"))
    if not paths:
        return []
    items = pd.concat([pq.read_table(path).to_pandas() for path in paths], ignore_index=True)
    first = {**items.groupby("objective")["condition"].first(), **(manifest.get("first_conditions") or {})}
    paired = (manifest.get("learning") or {}).get("trained_on_pairs", ())
    table = stats.learning(items, training_steps(folder, pd.DataFrame(lines)))
    table = table[table["condition"] == table["objective"].map(first)]
    wide = (
        table.pivot_table("value", ["objective", "seed", "budget"], "measure").reindex(columns=LEARNING).reset_index()
    )
    status = stats.learned(items, first, paired)[["objective", "budget", "status"]]
    records: Any = wide.merge(status, on=["objective", "budget"]).to_dict("records")
    return list(records)


def _table_faults(path: Path, lines: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the differences between ledger.parquet, if it is written, and the checkpoints' lines."""
    if not path.is_file():
        return
    with readable(path):
        table = pq.read_table(path, schema=LEDGER_SCHEMA).to_pylist()
    rows = {(r["objective"], r["seed"], r["budget"]): r for r in table}
    for line in lines:
        name, seed, budget = key = line["objective"], line["seed"], line["budget"]
        row = rows.pop(key, None)
        if row is None:
            yield f"{path.name} has no line for {name}, seed {seed}, budget {budget}"
        elif wrong := [c for c in LEDGER_SCHEMA.names if row[c] != line.get(c)]:
            yield f"{path.name}: {wrong[0]} of {name} at budget {budget}, seed {seed} is not its checkpoint's"
    for name, seed, budget in rows:
        yield f"{path.name} has a line for {name}, seed {seed}, budget {budget}, but that checkpoint is missing"


def _text(
    lines: list[dict[str, Any]], matching: Matching, faults: list[str], learning: list[dict[str, Any]]
) -> Iterator[str]:
    for seed, budget in dict.fromkeys((line["seed"], line["budget"]) for line in lines):
        here = [line for line in lines if (line["seed"], line["budget"]) == (seed, budget)]
        yield f"seed {seed}, budget {budget:,}"
        for title, columns in BLOCKS.items():
            yield from _block(title, columns, here)
        if checked := [line for line in learning if (line["seed"], line["budget"]) == (seed, budget)]:
            yield from _block("learned", (*LEARNING, "status"), checked)
        yield ""
    if not learning:
        yield "learned: not measured\n"
    for alias, start in matching.starts.items():
        seen = next((line.get("start_tokens") for line in lines if line["objective"] == alias), None)
        before = "an unknown number of" if seen is None else f"{seen:,}"
        yield from _wrapped(
            f"{alias} starts from {start}, after {before} source tokens that its own columns leave out; its init and "
            "reference are compared only with objectives of the same start"
        )
    if matching.count == "processed":
        yield from _wrapped(
            "budgets count processed tokens, a reference token as half: steps and source tokens differ across "
            "objectives by design"
        )
    yield from (f"differs: {f}" for f in faults)
    verdict = "matched, every adapter has the hash in its line" if not faults else f"{len(faults)} not matched"
    yield from _wrapped(f"{len(lines)} checkpoints: {verdict} ({', '.join(MATCHED)})")


def _block(title: str, columns: tuple[str, ...], lines: list[dict[str, Any]]) -> Iterator[str]:
    """Yield some columns under a header; a name that is too long has its own line above its numbers."""
    head = [c.replace("_tokens", "").replace("_hash", "") for c in columns]
    cells = [[_cell(c, line.get(c)) for c in columns] for line in lines]
    widths = [max(len(r[k]) for r in [head, *cells]) + 2 for k in range(len(columns))]
    names = [str(line["objective"]) for line in lines]
    room = max(WIDTH - sum(widths), len(title))
    wide = max(len(n) for n in [title, *names] if len(n) <= room)
    for name, row in zip([title, *names], [head, *cells], strict=True):
        if len(name) > room:
            yield name
        before = name if len(name) <= room else ""
        yield f"{before:{wide}}" + "".join(f"{c:>{w}}" for c, w in zip(row, widths, strict=True))


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _cell(column: str, value: Any) -> str:
    if column.endswith("_hash"):
        return str(value)[:HASH]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:.4g}"
    return str(value)
