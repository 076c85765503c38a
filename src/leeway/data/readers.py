"""Read records from LEEWAY_DATA, a user's file or the hub; each error names the file and the record."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import math
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from leeway.errors import HALF_CHARACTER, LeewayError, first_line
from leeway.io import expand, read_utf8

Record = dict[str, Any]
MAX_LINE = 64 << 20  # characters: a compressed file of a megabyte can hold a line of a gigabyte
MAX_NAMES = 50  # columns that an error lists
MAX_TEXT = 2 << 30  # characters of a .json file, which is read as a whole


@dataclass(frozen=True)
class Source:
    """One public file: its path under LEEWAY_DATA, and its place on the hub, if it is published there."""

    local: tuple[str, ...]  # the first that exists is read
    hub_id: str | None = None
    config: str | None = None
    split: str = "train"
    hub_file: str | None = None  # one file of a repository without a loading configuration


class Loaded(NamedTuple):
    """Records and their origin: a path, or a hub id with its revision."""

    records: list[Record]
    origin: str


def load(source: Source, *, revision: str | None = None) -> Loaded:
    """Load from `LEEWAY_DATA` if it is set, else from the hub; never fall back from one to the other."""
    root = os.environ.get("LEEWAY_DATA")
    if not root and source.hub_id is None:
        what = f"{source.local[0]} is not on the hub"
        raise LeewayError(what, fix="set LEEWAY_DATA to a folder that holds it under that path")
    if not root:
        return _hub(source, revision)
    for name in source.local:
        path = expand(root) / name
        if path.is_file():
            return Loaded(list(read(path)), f"LEEWAY_DATA/{name}")
    hub = f", or unset LEEWAY_DATA to load {source.hub_id} from the hub" if source.hub_id else ""
    raise LeewayError(f"LEEWAY_DATA={root}: no {source.local[0]} in it", fix=f"put it there{hub}")


def read(path: Path) -> Iterator[Record]:
    """Yield the records of a .jsonl, .json (a list), .csv or .tsv file, or .gz of it; errors name the line."""
    if not path.is_file():
        tried = "" if path.is_absolute() else f" ({path.absolute()})"
        fix = "check that path" + ("; a study's are relative to its file, or to the current folder" if tried else "")
        raise LeewayError(f"{path}: no such file{tried}", fix=fix)
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
        return _jsonl(path, _lines(path, f))
    if kind == ".json":
        text = f.read(MAX_TEXT + 1)
        if len(text) > MAX_TEXT:
            raise LeewayError(f"{path}: over {MAX_TEXT >> 30} GiB of text", fix="use .jsonl, which is read by line")
        return _json(path, text)
    if kind in (".csv", ".tsv"):
        return _csv(path, _lines(path, f), "\t" if kind == ".tsv" else ",")
    raise LeewayError(f"{path}: unknown kind of file", fix="use .jsonl, .json, .csv or .tsv (or .gz of it)")


def _lines(path: Path, f: Any) -> Iterator[str]:
    """Yield the lines of a file; raise LeewayError for one that is longer than MAX_LINE, before it is read whole."""
    number = 0
    while line := f.readline(MAX_LINE):
        number += 1
        if len(line) == MAX_LINE:
            raise LeewayError(f"{path}, line {number}: over {MAX_LINE >> 20} MiB", fix="correct that line")
        yield line


def _refuse_half_characters(record: Record, where: str) -> None:
    """Raise LeewayError for half a surrogate pair, which JSON can spell and no tokenizer or file accepts."""
    left: list[tuple[str, Any]] = [(f"its {name}", value) for name, value in record.items()]
    left += [("a key", name) for name in record]
    while left:
        name, value = left.pop()
        if isinstance(value, dict):
            left += [(name, inner) for inner in (*value, *value.values())]
        elif isinstance(value, list):
            left += [(name, inner) for inner in value]
        elif isinstance(value, str) and (half := HALF_CHARACTER.search(value)):
            what = f"{where}: {name} holds \\u{ord(half[0]):04x}, one half of a character"
            raise LeewayError(what, fix="correct that record")


def _jsonl(path: Path, lines: Any) -> Iterator[Record]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line, object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise LeewayError(f"{path}, line {number}: {unreadable(error)}", fix="correct that line") from error
        if not isinstance(record, dict):
            raise LeewayError(f"{path}, line {number}: not a JSON object", fix="write one {…} on each line")
        yield record


def read_json(path: Path, text: str | None = None) -> Any:
    """Parse a JSON file (or its `text`); raise LeewayError if it is broken or repeats a key."""
    try:
        return json.loads(read_utf8(path) if text is None else text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise LeewayError(f"{path}{line}: {unreadable(error)}", fix="correct or remove that record") from error


def _json(path: Path, text: str) -> Iterator[Record]:
    records = read_json(path, text)
    if not isinstance(records, list) or not all(isinstance(r, dict) for r in records):
        raise LeewayError(f"{path}: not a JSON list of objects", fix="write [{…}, …], or use .jsonl")
    yield from records


def unreadable(error: ValueError | RecursionError) -> str:
    """Return why JSON is not read: broken, a repeated key, thousands of digits or of brackets."""
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON ({error.msg} at column {error.colno})"
    if isinstance(error, RepeatedKeyError):
        return str(error)
    return "nested too deep" if isinstance(error, RecursionError) else "a number with too many digits"


class RepeatedKeyError(ValueError):
    """A key that a JSON object has twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise RepeatedKeyError(f"{_repeated([key for key, _ in pairs])[0]!r} is given twice")
    return record


def _repeated(names: Iterable[str]) -> list[str]:
    return [name for name, n in Counter(names).items() if n > 1]


def _csv(path: Path, lines: Any, delimiter: str) -> Iterator[Record]:
    reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
    try:
        columns = reader.fieldnames or []
        if repeated := _repeated(filter(None, columns)):
            raise LeewayError(f"{path}, line 1: column {repeated[0]!r} is given twice", fix="rename one of the two")
        for record in reader:
            if None in record or None in record.values():
                where = f"{path}, line {reader.line_num}"
                raise LeewayError(f"{where}: not {len(columns)} columns", fix="correct that line")
            yield record
    except csv.Error as error:
        raise LeewayError(f"{path}, line {reader.line_num}: {error}", fix="correct that line") from error


def field(record: Record, names: tuple[str, ...], where: str) -> str:
    """Return the first of these columns that has text, stripped; raise LeewayError if none has, and for NaN."""
    for name in names:
        value = record.get(name)
        refuse_not_finite(value, name, where)
        if isinstance(value, (str, int, float)) and str(value).strip():
            return str(value).strip()
    empty = next((n for n in names if n in record), None)
    has = columns_of(record)
    what = f"{where}: its {empty} is empty" if empty else f"{where}: no {' or '.join(names)} in it (it has: {has})"
    raise LeewayError(what, fix="correct that record")


def columns_of(record: Record) -> str:
    """Return a record's columns for an error, the first MAX_NAMES of them."""
    names = [*map(str, itertools.islice(record, MAX_NAMES)), *["…"] * (len(record) > MAX_NAMES)]
    return ", ".join(names) or "nothing"


def refuse_not_finite(value: Any, name: str, where: str) -> None:
    """Raise LeewayError for NaN or an infinity, which other tools write for a missing text."""
    if isinstance(value, float) and not math.isfinite(value):
        raise LeewayError(f"{where}: its {name} is {value}, not text", fix="correct or remove that record")


def _hub(source: Source, revision: str | None) -> Loaded:
    import datasets
    from huggingface_hub.utils import logging as hub_logging

    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        if source.hub_file:
            url = f"hf://datasets/{source.hub_id}{f'@{revision}' if revision else ''}/{source.hub_file}"
            data = datasets.load_dataset("json", data_files=url, split="train")
        else:
            data = datasets.load_dataset(source.hub_id, source.config, split=source.split, revision=revision)
    except Exception as error:
        what = f"data set {source.hub_id}: cannot be loaded from the hub ({type(error).__name__}: {first_line(error)})"
        fix = "check the network, or set LEEWAY_DATA to a folder that holds " + source.local[0]
        raise LeewayError(what, fix=fix) from error
    commit = next(iter(getattr(data, "download_checksums", None) or {}), None)
    return Loaded([dict(r) for r in data], f"hub {source.hub_id} revision {revision or 'main'} {commit or ''}".strip())
