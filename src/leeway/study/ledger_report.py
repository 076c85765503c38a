"""The matching table of a run directory: what is equal over objectives, what each cost, and what differs."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from leeway.data.ledger import COST, MATCHED, Matching, differences
from leeway.errors import LeewayError
from leeway.hashing import changed
from leeway.io import readable
from leeway.study.run_dir import LEDGER_SCHEMA
from leeway.training import checkpoints

WIDTH = 100  # columns
HASH = 8  # hex digits that are printed; what differs is found by all of them
BLOCKS = {
    "matched": ("step", "source_tokens", "examples", "epochs", "data_hash", "init_hash", "reference_hash"),
    "cost": (*COST, "lr"),
}


@dataclass(frozen=True)
class LedgerView:
    """The text to print, and what differs."""

    text: str
    faults: tuple[str, ...]


def view(folder: Path) -> LedgerView:
    """Read every checkpoint's ledger line in `folder`, hold them against each other, their adapters and the table."""
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        raise LeewayError(f"{folder} has no manifest.json: not a run directory", fix="give the --out of a `leeway run`")
    with readable(manifest):
        raw = json.loads(manifest.read_text("utf-8"))
    rule = raw.get("matching") or {}
    matching = Matching(rule.get("count", "source"), rule.get("starts", {}))
    found = sorted(folder.glob("checkpoints/*/s*/*/ledger.json"))
    if not found:
        raise LeewayError(f"{folder}: no checkpoint is finished there yet", fix="run the study first")
    lines, faults = [], []
    for path in found:
        try:
            lines.append(checkpoints.verified_ledger(path.parent))
        except LeewayError as error:
            faults.append(str(error))
            if (line := checkpoints.doubtful_ledger(path.parent)).keys() >= set(MATCHED):
                lines.append(line)
    lines.sort(key=lambda line: (line["seed"], line["budget"]))
    faults += map(str, differences(lines, matching))
    faults += _against_table(folder / "ledger.parquet", lines)
    faults += (f"{name} is not the file that the run wrote" for name in changed(folder, raw.get("file_hashes") or {}))
    return LedgerView("\n".join(_text(lines, matching, faults)), tuple(faults))


def _against_table(path: Path, lines: list[dict[str, Any]]) -> Iterator[str]:
    """ledger.parquet says what the checkpoints say, where it is written already."""
    if not path.is_file():
        return
    with readable(path):
        table = pq.read_table(path, schema=LEDGER_SCHEMA).to_pylist()
    told = {(r["objective"], r["seed"], r["budget"]): r for r in table}
    for line in lines:
        key = (line["objective"], line["seed"], line["budget"])
        row = told.pop(key, None)
        if row is None:
            yield f"{path.name} has no line for {key[0]}, seed {key[1]}, budget {key[2]}"
        elif wrong := [c for c in LEDGER_SCHEMA.names if row[c] != line.get(c)]:
            yield f"{path.name}: {wrong[0]} of {key[0]} at budget {key[2]}, seed {key[1]} is not its checkpoint's"
    for key in told:
        yield f"{path.name} has a line for {key[0]}, seed {key[1]}, budget {key[2]}, and there is no such checkpoint"


def _text(lines: list[dict[str, Any]], matching: Matching, faults: list[str]) -> Iterator[str]:
    for seed, budget in dict.fromkeys((line["seed"], line["budget"]) for line in lines):
        here = [line for line in lines if (line["seed"], line["budget"]) == (seed, budget)]
        yield f"seed {seed}, budget {budget:,}"
        for title, columns in BLOCKS.items():
            yield from _block(title, columns, here)
        yield ""
    for alias, start in matching.starts.items():
        seen = next((line.get("start_tokens") for line in lines if line["objective"] == alias), None)
        told = "an unknown number of" if seen is None else f"{seen:,}"
        yield from _wrapped(
            f"{alias} starts from {start}, after {told} source tokens that its own columns leave out; its init and "
            "reference are held against its like alone"
        )
    if matching.count == "processed":
        yield from _wrapped(
            "budgets count processed tokens, a reference token as half a one: steps and source tokens differ over "
            "objectives, and are no fault"
        )
    yield from (f"differs: {f}" for f in faults)
    verdict = "matched, every adapter is the one its line names" if not faults else f"{len(faults)} not matched"
    yield from _wrapped(f"{len(lines)} checkpoints: {verdict} ({', '.join(MATCHED)})")


def _block(title: str, columns: tuple[str, ...], lines: list[dict[str, Any]]) -> Iterator[str]:
    """Some columns of the lines under their heads; a name too long to stand before its numbers stands above them."""
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
    return f"{value:.4g}" if isinstance(value, float) else str(value)
