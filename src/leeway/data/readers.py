"""Read records from a local folder (`LEEWAY_DATA`), a user's file or the hub, and name what is wrong with them."""

from __future__ import annotations

import csv
import gzip
import json
import math
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leeway.errors import LeewayError, first_line
from leeway.io import expand

Record = dict[str, Any]
HALF = re.compile("[\\ud800-\\udfff]")


@dataclass(frozen=True)
class Source:
    """One public file: where it lies under LEEWAY_DATA, and where on the hub."""

    local: tuple[str, ...]  # the first that exists is read
    hub_id: str
    config: str | None = None
    split: str = "train"
    hub_file: str | None = None  # one file of a repository without a loading configuration


@dataclass(frozen=True)
class Loaded:
    """Records and where they came from: a path with its size, or a hub id with its revision."""

    records: list[Record]
    origin: str


def load(source: Source, *, revision: str | None = None) -> Loaded:
    """From `LEEWAY_DATA` where it is set, else from the hub; never one silently for the other."""
    root = os.environ.get("LEEWAY_DATA")
    if not root:
        return _hub(source, revision)
    for name in source.local:
        path = expand(root) / name
        if path.is_file():
            return Loaded(list(read(path)), f"LEEWAY_DATA/{name}")
    raise LeewayError(
        f"LEEWAY_DATA={root}: there is no {source.local[0]}",
        fix=f"put it there, or unset LEEWAY_DATA to load {source.hub_id} from the hub",
    )


def read(path: Path) -> Iterator[Record]:
    """Records of a .jsonl, .json (a list), .csv or .tsv file, plain or .gz; a broken line is named by its number."""
    if not path.is_file():
        raise LeewayError(f"{path}: no such file", fix="check that path")
    kind = next((s for s in reversed(path.suffixes) if s != ".gz"), "")
    try:
        with (
            gzip.open(path, "rt", encoding="utf-8-sig", newline="")
            if path.suffix == ".gz"
            else path.open(encoding="utf-8-sig", newline="") as f
        ):
            for number, record in enumerate(_records(path, kind, f), 1):
                _refuse_half_characters(record, f"{path}, record {number}")
                yield record
    except UnicodeDecodeError as error:
        raise LeewayError(f"{path}: not UTF-8 text (byte {error.start})", fix="save it as UTF-8") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise LeewayError(f"{path}: broken gzip file ({error})", fix="fetch it again") from error


def _records(path: Path, kind: str, f: Any) -> Iterator[Record]:
    if kind == ".jsonl":
        return _jsonl(path, f)
    if kind == ".json":
        return _json(path, f.read())
    if kind in (".csv", ".tsv"):
        return _csv(path, f, "\t" if kind == ".tsv" else ",")
    raise LeewayError(f"{path}: unknown kind of file", fix="use .jsonl, .json, .csv or .tsv (or .gz of it)")


def _refuse_half_characters(record: Record, where: str) -> None:
    """JSON can spell one half of a surrogate pair, which is no text: no tokenizer and no file takes it."""
    for name, value in record.items():
        if isinstance(value, str) and (half := HALF.search(value)):
            raise LeewayError(
                f"{where}: its {name} holds \\u{ord(half[0]):04x}, one half of a character", fix="mend that record"
            )


def _jsonl(path: Path, lines: Any) -> Iterator[Record]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise LeewayError(
                f"{path}, line {number}: not JSON ({error.msg} at column {error.colno})",
                fix="mend or remove that line",
            ) from error
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
            raise LeewayError(f"{path}, line {number}: {unreadable(error)}", fix="mend or remove that line") from error
        if not isinstance(record, dict):
            raise LeewayError(f"{path}, line {number}: not a JSON object", fix="write one {…} on each line")
        yield record


def _json(path: Path, text: str) -> Iterator[Record]:
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise LeewayError(f"{path}, line {error.lineno}: not JSON ({error.msg})", fix="mend that line") from error
    except (ValueError, RecursionError) as error:
        raise LeewayError(f"{path}: {unreadable(error)}", fix="mend or remove that record") from error
    if not isinstance(records, list) or not all(isinstance(r, dict) for r in records):
        raise LeewayError(f"{path}: not a JSON list of objects", fix="write [{…}, …], or use .jsonl")
    yield from records


def unreadable(error: ValueError | RecursionError) -> str:
    """Return why JSON that may be well formed is not read."""
    return "nested too deep" if isinstance(error, RecursionError) else "a number with too many digits"


def _csv(path: Path, lines: Any, delimiter: str) -> Iterator[Record]:
    reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
    try:
        for record in reader:
            if None in record or None in record.values():
                raise LeewayError(
                    f"{path}, line {reader.line_num}: not {len(reader.fieldnames or [])} columns",
                    fix="mend that line",
                )
            yield record
    except csv.Error as error:
        raise LeewayError(f"{path}, line {reader.line_num}: {error}", fix="mend that line") from error


def field(record: Record, names: tuple[str, ...], where: str) -> str:
    """The first of these columns that the record has, as stripped text; raises LeewayError for none, and for NaN."""
    for name in names:
        value = record.get(name)
        refuse_not_finite(value, name, where)
        if isinstance(value, (str, int, float)) and str(value).strip():
            return str(value).strip()
    empty = next((n for n in names if n in record), None)
    has = ", ".join(map(str, record)) or "nothing"
    raise LeewayError(
        f"{where}: its {empty} is empty" if empty else f"{where}: no {' or '.join(names)} in it (it has: {has})",
        fix="mend that record",
    )


def refuse_not_finite(value: Any, name: str, where: str) -> None:
    """Raise LeewayError for NaN or an infinity, which other tools write for a missing text."""
    if isinstance(value, float) and not math.isfinite(value):
        raise LeewayError(f"{where}: its {name} is {value}, not text", fix="mend or remove that record")


def _hub(source: Source, revision: str | None) -> Loaded:
    import datasets
    from huggingface_hub.utils import logging as hub_logging

    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]

    try:
        if source.hub_file:
            at = f"@{revision}" if revision else ""
            data = datasets.load_dataset(
                "json", data_files=f"hf://datasets/{source.hub_id}{at}/{source.hub_file}", split="train"
            )
        else:
            data = datasets.load_dataset(source.hub_id, source.config, split=source.split, revision=revision)
    except Exception as error:
        raise LeewayError(
            f"data set {source.hub_id}: cannot be loaded from the hub ({type(error).__name__}: {first_line(error)})",
            fix="check the network, or set LEEWAY_DATA to a folder that holds " + source.local[0],
        ) from error
    commit = next(iter(getattr(data, "download_checksums", None) or {}), None)
    return Loaded([dict(r) for r in data], f"hub {source.hub_id} revision {revision or 'main'} {commit or ''}".strip())
