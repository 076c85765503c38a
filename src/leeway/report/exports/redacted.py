"""A run for publication: without the text of forbidden prompts and of the answers to them."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from leeway.errors import LeewayError
from leeway.hashing import digest, file_digest
from leeway.io import atomic_write, readable, write_file, write_json
from leeway.report.rebuild import rebuild

HARMLESS = ("capability", "overrefusal", "persona", "persona-check", "persona-sd3", "persona-self", "sycophancy")
TEXTS = ("prompt", "response")


def publish(folder: Path, out: Path, *, no_prompts: bool = False) -> Path:
    """Write a run directory with the tables, step logs, study and page of `folder` into `out`; return the page's path.

    Rows of an eval outside HARMLESS keep ids, outcomes and scores; a text is replaced by its hash, and what the judge
    wrote is left out. With `no_prompts` the prompts of every eval are replaced. Checkpoints are not copied. Raises
    LeewayError if `out` is not empty.
    """
    if out.exists() and any(out.iterdir()):
        raise LeewayError(f"{out} is not empty", fix="give a new folder")
    rows_path = folder / "rows.parquet"
    with readable(rows_path):
        rows = pq.read_table(rows_path)
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    hidden = pc.invert(pc.is_in(rows["eval"], pa.array(HARMLESS)))
    for name in TEXTS:
        hashes = pa.array([f"[{name} {digest(text)}]" for text in rows[name].to_pylist()])
        where = pa.scalar(True) if no_prompts and name == "prompt" else hidden
        rows = rows.set_column(rows.schema.get_field_index(name), name, pc.if_else(where, hashes, rows[name]))
    raw = pc.if_else(hidden, pa.scalar(""), rows["judge_raw"])
    rows = rows.set_column(rows.schema.get_field_index("judge_raw"), "judge_raw", raw)
    out.mkdir(parents=True, exist_ok=True)
    with atomic_write(out / "rows.parquet") as scratch:
        pq.write_table(rows, scratch, compression="zstd")
    for path in [folder / "study.yaml", *folder.glob("le*.parquet"), *folder.glob("steps/*.jsonl")]:  # ledger, learning
        write_file(out / path.relative_to(folder), path.read_bytes())
    hashes = manifest.get("file_hashes") or {}
    hashes |= {"rows.parquet": file_digest(out / "rows.parquet")} if hashes else {}
    write_json(out / "manifest.json", {**manifest, "file_hashes": hashes, "redacted": True})
    return rebuild(out)
