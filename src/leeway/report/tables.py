"""Tables as CSV files, and any file put in place whole or not at all."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pandas as pd


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write beside the target and move into place: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{path.name}-{os.getpid()}")
    partial.unlink(missing_ok=True)
    with partial.open("xb") as file:  # never through a symbolic link
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
    os.replace(partial, path)


def csv(table: pd.DataFrame) -> str:
    """Ten significant digits, no index, Unix line ends."""
    return str(table.to_csv(index=False, float_format="%.10g", lineterminator="\n"))


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as plain Python values, with null for what is missing."""
    return [{str(k): _plain(v) for k, v in row.items()} for row in table.to_dict("records")]


def dump(value: Any) -> str:
    """JSON that any reader accepts: no NaN, keys in the order given."""
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):
        value = value.item()
    if value is None or value is pd.NA or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return round(value, 10) if isinstance(value, float) else value


def unscored(rows: pd.DataFrame) -> pd.DataFrame:
    """How many answers of each evaluation have no score, and why; 0 where all have one."""
    table = rows.assign(missing=rows["score"].isna(), reason=rows["unscored_reason"].fillna("no reason given"))
    asked = table.groupby("eval").size().rename("answers")
    counts = table[table["missing"]].groupby(["eval", "reason"]).size().rename("unscored").reset_index()
    clean = pd.DataFrame({"eval": [e for e in asked.index if e not in set(counts["eval"])]})
    found = pd.concat([counts, clean.assign(reason="", unscored=0)], ignore_index=True)
    found = found.join(asked, on="eval").sort_values(["eval", "reason"])
    return found[["eval", "answers", "unscored", "reason"]].reset_index(drop=True)
