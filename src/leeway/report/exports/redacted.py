"""A run for publication: without the text of forbidden prompts and of the answers to them."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq

from leeway.errors import LeewayError
from leeway.hashing import file_digest
from leeway.io import atomic_write, readable, write_file, write_json
from leeway.report.rebuild import rebuild
from leeway.report.redaction import redact
from leeway.report.validation import manifest_fault


def publish(folder: Path, out: Path, *, no_prompts: bool = False) -> Path:
    """Write a run directory with the tables, step logs, study and page of `folder` into `out`; return the page's path.

    Rows are redacted (`leeway.report.redaction.redact`). Checkpoints are not copied. Raises LeewayError if `out` is not
    empty.
    """
    if out.exists() and any(out.iterdir()):
        raise LeewayError(f"{out} is not empty", fix="give a new folder")
    rows_path = folder / "rows.parquet"
    with readable(rows_path):
        rows = redact(pq.read_table(rows_path), no_prompts=no_prompts)
    with readable(folder / "manifest.json"):
        manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
        if not isinstance(manifest, dict) or (fault := manifest_fault(manifest)):
            raise ValueError(fault if isinstance(manifest, dict) else "not an object")
    out.mkdir(parents=True, exist_ok=True)
    with atomic_write(out / "rows.parquet") as scratch:
        pq.write_table(rows, scratch, compression="zstd")
    copied = [folder / "study.yaml", *folder.glob("le*.parquet"), *folder.glob("steps/*.jsonl")]  # ledger, learning
    if link := next((p for p in copied if p.is_symlink() or not p.is_file()), None):
        raise LeewayError(f"{link} is not a file of the run", fix="restore it, or run the study again")
    for path in copied:
        write_file(out / path.relative_to(folder), path.read_bytes())
    hashes = manifest.get("file_hashes") or {}
    hashes |= {"rows.parquet": file_digest(out / "rows.parquet")} if hashes else {}
    write_json(out / "manifest.json", {**manifest, "file_hashes": hashes, "redacted": True})
    return rebuild(out)
