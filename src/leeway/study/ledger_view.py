"""The matching table of a run directory: what is equal over objectives, what each cost, and what differs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from leeway.data.ledger import COST, MATCHED, Matching, differences
from leeway.errors import LeewayError
from leeway.hashing import changed
from leeway.study.store import LEDGER_SCHEMA, readable
from leeway.training import checkpoints

SHOWN = ("step", "source_tokens", "examples", "epochs", *COST, "lr", "data_hash", "init_hash", "reference_hash")


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
    faults += (f"{name} is not the file that the run wrote" for name in changed(folder, raw.get("written") or {}))
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
    names = [line["objective"] for line in lines]
    wide = max(map(len, [*names, "objective"])) + 2
    head = [c.replace("_tokens", "").replace("_hash", "") for c in SHOWN]
    cells = [[_cell(line.get(c)) for c in SHOWN] for line in lines]
    widths = [max(len(r[k]) for r in [head, *cells]) + 2 for k in range(len(SHOWN))]
    before = None
    for line, row in zip(lines, cells, strict=True):
        if (at := (line["seed"], line["budget"])) != before:
            yield f"\nseed {at[0]}, budget {at[1]:,}" if before else f"seed {at[0]}, budget {at[1]:,}"
            yield f"{'objective':{wide}}" + "".join(f"{h:>{w}}" for h, w in zip(head, widths, strict=True))
            before = at
        yield f"{line['objective']:{wide}}" + "".join(f"{c:>{w}}" for c, w in zip(row, widths, strict=True))
    yield ""
    for alias, start in matching.starts.items():
        seen = next((line.get("start_tokens") for line in lines if line["objective"] == alias), None)
        told = "an unknown number of" if seen is None else f"{seen:,}"
        yield (
            f"{alias} starts from {start}, after {told} source tokens that its own columns leave out; its init and "
            "reference are held against its like alone"
        )
    if matching.count == "processed":
        yield (
            "budgets count processed tokens, a reference token as half a one: steps and source tokens differ over "
            "objectives, and are no fault"
        )
    yield from (f"differs: {f}" for f in faults)
    verdict = "matched, every adapter is the one its line names" if not faults else f"{len(faults)} not matched"
    yield f"{len(lines)} checkpoints: {verdict} ({', '.join(MATCHED)})"


def _cell(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
