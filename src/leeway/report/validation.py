"""Check the tables and the manifest of a run directory, which may have been edited, before anything is computed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

INTEGERS = {"seed", "budget", "sample", "new_tokens", "step", "examples"}  # and all that end in `_tokens`
FLOATS = {"score", "epochs", "lr", "nll", "base_nll", "rejected_nll", "base_rejected_nll", "kl", "weight_change"}
UNKNOWN = {"start_tokens", "tuning_tokens"}  # that may be missing
COMPLETE = {"objective", "eval", "item_id", "cluster"}  # texts that every line has; so it is with integers
MAPPINGS: tuple[str, ...] = (
    "attacks",
    "claims",
    "conditions",
    "controls",
    "data",
    "environment",
    "evals",
    "external",
    "file_hashes",
)
MAPPINGS += ("first_conditions", "judges", "learning", "matching", "model", "objectives", "optimisation", "rescored")
MAPPINGS += ("audit", "probe", "sequential", "texts", "triggers")
OF_TEXTS = ("conditions", "first_conditions")
TEXTS = ("command", "leeway", "started", "study_hash")


def table_fault(table: pd.DataFrame, schema: pa.Schema) -> str:
    """Return the first fault in a table's columns, or an empty text; a column of nulls has any type.

    Objectives of the ledger are names of folders; those of a comparison of other tools' logs are any text.
    """
    if table.empty:
        return ""
    for name in map(str, table.columns):
        kind, column = schema.field(name).type, table[name]
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        whole = name in INTEGERS or name.endswith("_tokens")
        if name in UNKNOWN and (pa.types.is_null(kind) or pa.types.is_integer(kind)):
            continue
        if pa.types.is_null(kind) and not whole and name not in COMPLETE:
            continue
        if whole and (fault := _whole_fault(column, kind)):
            return f"column {name} {fault}"
        if name in FLOATS and not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
            return f"column {name} is {kind}, not numbers"
        if name in FLOATS and np.isinf(column.to_numpy(dtype=float)).any():
            return f"column {name} has an infinite number"
        if not whole and name not in FLOATS:
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                return f"column {name} is {kind}, not text"
            if name in COMPLETE and column.isna().any():
                return f"column {name} has missing values"
    ledger = "step" in table and "objective" in table
    odd = next((o for o in table["objective"].unique() if not is_plain(o)), None) if ledger else None
    return f"column objective has {odd[:60]!r}, which is no name of a folder" if odd is not None else ""


def _whole_fault(column: pd.Series[Any], kind: pa.DataType) -> str:
    if not pa.types.is_integer(kind):
        return f"is {kind}, not whole numbers"
    if column.isna().any():
        return "has missing values"
    return "has a negative number" if column.min() < 0 else ""


def is_plain(name: str) -> bool:
    """Return whether a name leads to no other folder."""
    return name not in ("", ".", "..") and not any(c in name for c in "/\\\0")


def manifest_fault(manifest: dict[str, Any]) -> str:
    """Return the first key of a manifest that is not of its kind, or an empty text."""
    return next(_manifest_faults(manifest), "")


def _manifest_faults(manifest: dict[str, Any]) -> Iterator[str]:
    for key in MAPPINGS:
        value = manifest.get(key)
        if value is not None and not isinstance(value, dict):
            yield f"{key} is {type(value).__name__}, not an object"
    for key in TEXTS:
        if not isinstance(manifest.get(key) or "", str):
            yield f"{key} is not text"
    for key in OF_TEXTS:
        if not all(isinstance(v, str) for v in (manifest.get(key) or {}).values()):
            yield f"{key} has a value that is not text"
    for name, value in (manifest.get("file_hashes") or {}).items():
        known = value if isinstance(value, list) else [value]
        if not all(isinstance(v, str) for v in known) or "\0" in name:
            yield f"file_hashes: {name[:60]!r} has no digest"
    for key in ("judges", "objectives", "attacks"):
        for name, value in (manifest.get(key) or {}).items():
            own = value.get("name", "") if isinstance(value, dict) else value
            if not isinstance(own, str) or (key != "judges" and not isinstance(value, dict)):
                yield f"{key}: {name[:60]!r} is no object"
