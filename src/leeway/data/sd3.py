"""The Short Dark Triad (Jones & Paulhus 2014, Assessment 21:28): 27 statements rated from 1 to 5.

A published instrument: its items are read at run time and never shipped. Published copies differ in which items are
reverse-keyed, so the keys are the file's own, and the file's hash stands in the origin.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from leeway.data.items import LikertItem
from leeway.data.read import field
from leeway.errors import LeewayError
from leeway.hashing import file_digest
from leeway.paths import expand

NAME = "dark_triad/sd3_items.json"
SHAPE = '{"items": [{"id": …, "trait": …, "text": …, "key": 1 or -1}, …]}'


def sd3() -> tuple[list[LikertItem], str]:
    """The items in the file's order and where they came from; ids are `<trait>/<id>`, traits in lower case."""
    root = os.environ.get("LEEWAY_DATA")
    if not root:
        raise LeewayError(
            "the Short Dark Triad is not shipped and is on no hub", fix=f"set LEEWAY_DATA to a folder that holds {NAME}"
        )
    path = expand(root) / NAME
    if not path.is_file():
        raise LeewayError(f"LEEWAY_DATA={root}: there is no {NAME}", fix=f"write it as {SHAPE}")
    items = [_item(record, n, path) for n, record in enumerate(_records(path), 1)]
    for what in ("id", "text"):
        seen = [getattr(i, what) for i in items]
        twice = next((s for s in seen if seen.count(s) > 1), None)
        if twice is not None:
            raise LeewayError(f"{path}: the {what} {twice!r} stands there twice", fix="remove one of the two")
    return items, f"LEEWAY_DATA/{NAME} ({file_digest(path)})"


def _records(path: Path) -> list[Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except UnicodeDecodeError as error:
        raise LeewayError(f"{path}: not UTF-8 text (byte {error.start})", fix="save it as UTF-8") from error
    except json.JSONDecodeError as error:
        raise LeewayError(f"{path}, line {error.lineno}: not JSON ({error.msg})", fix="mend that line") from error
    records = found.get("items") if isinstance(found, dict) else None
    if not isinstance(records, list) or not records:
        raise LeewayError(f"{path}: it holds no list of items", fix=f"write it as {SHAPE}")
    return records


def _item(record: Any, n: int, path: Path) -> LikertItem:
    where = f"{path}, item {n}"
    if not isinstance(record, dict):
        raise LeewayError(f"{where}: not an object", fix=f"write the file as {SHAPE}")
    trait, key = field(record, ("trait",), where).lower(), record.get("key")
    if isinstance(key, bool) or key not in (1, -1):
        raise LeewayError(
            f"{where}: its key is {key!r}", fix="1 where agreeing endorses the trait, -1 where it denies it"
        )
    name = field(record, ("id",), where)
    return LikertItem(f"{trait}/{name}", trait, field(record, ("text",), where), 1 if key == 1 else -1)
