"""Files: paths that people write, atomic writes, checksummed records, lock files.

A file or folder is written under a temporary `.partial-` name and renamed once it is on disk, so that a reader or a
killed process never sees half of it. Names are flushed as well, so that a power cut loses nothing that was finished.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import stat
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from leeway.errors import LeewayError, first_line
from leeway.hashing import digest

PARTIAL = ".partial-"
MAX_PATH, MAX_NAME = 4_000, 255  # bytes


def expand(path: str | Path) -> Path:
    """Return `path` with a leading `~` or `~user` replaced by that home folder.

    Raises LeewayError where there is no such user, or no home folder, and for what no file system takes as a path.
    """
    raw = str(path).encode("utf-8", "replace")
    if len(raw) > MAX_PATH or max(map(len, raw.split(b"/"))) > MAX_NAME or b"\0" in raw:
        raise LeewayError(f"{str(path)[:40]}…: not a path (too long, or with a NUL)", fix="give a file or a folder")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        home = Path(path).parts[0]
        raise LeewayError(f"{path}: no home folder for {home}", fix="write the path in full") from error


@contextmanager
def scratch_file(folder: Path, tag: str = "") -> Iterator[Path]:
    """Create an empty temporary file in `folder` (created if missing); remove it on exit if it was not published."""
    make_folder(folder)
    path = folder / f"{PARTIAL}{tag}{secrets.token_hex(6)}"
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))  # the mode obeys the umask
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def publish(scratch: Path, target: Path) -> None:
    """Flush a temporary file to disk and rename it to `target`."""
    _fsync(scratch)
    os.replace(scratch, target)
    flush_names(target.parent)


@contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """Yield a temporary path that becomes `target` on success; after an error `target` is unchanged."""
    with scratch_file(target.parent) as scratch:
        yield scratch
        publish(scratch, target)


def refuse_special(path: Path) -> None:
    """Raise LeewayError for a device or a pipe, which may be without end."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise LeewayError(f"{path}: not a regular file", fix="give a file")


def read_utf8(path: Path, encoding: str = "utf-8") -> str:
    """Return the text of a file that a person wrote; raise LeewayError if it is not UTF-8, or a device."""
    refuse_special(path)
    try:
        return path.read_text(encoding)
    except UnicodeDecodeError as error:
        raise LeewayError(f"{path}: not UTF-8 text (byte {error.start})", fix="save it as UTF-8") from error


def write_file(target: Path, content: str | bytes) -> None:
    """Write bytes, or text as UTF-8 with its line ends as given, atomically."""
    with atomic_write(target) as scratch:
        scratch.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def write_json(target: Path, value: Any) -> None:
    """Write indented JSON with sorted keys atomically."""
    write_file(target, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


@contextmanager
def atomic_folder(target: Path, is_complete: Callable[[Path], bool]) -> Iterator[Path]:
    """Yield a temporary folder that becomes `target` on success.

    A `target` that another process has completed meanwhile is kept; an incomplete one is replaced.
    """
    make_folder(target.parent)
    scratch = target.with_name(f"{PARTIAL}{secrets.token_hex(6)}")
    scratch.mkdir()
    try:
        yield scratch
        for path in (*scratch.rglob("*"), scratch):
            flush_names(path) if path.is_dir() else _fsync(path)
        if is_complete(target):
            return
        if target.exists():
            shutil.rmtree(target)
        scratch.rename(target)
        flush_names(target.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents where they are missing, and flush their names to disk."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        flush_names(path.parent)


def flush_names(folder: Path) -> None:
    """Flush the names in a folder to disk; do nothing on file systems that cannot."""
    try:
        _fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EACCES, errno.EPERM, errno.ENOTSUP):
            raise


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_partial(folder: Path, tag: str = "") -> None:
    """Remove the temporary files and folders that killed processes left below `folder`."""
    for path in folder.rglob(f"{PARTIAL}{tag}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def readable(path: Path, *errors: type[Exception]) -> Iterator[None]:
    """Turn the errors of reading a damaged file (ValueError, OSError and `errors`) into a LeewayError."""
    # of broken or deeply nested JSON, Parquet or text
    expected: tuple[type[Exception], ...] = (ValueError, OSError, RecursionError, *errors)
    refuse_special(path)
    try:
        yield
    except expected as error:
        what = f"{path}: damaged ({first_line(error)})"
        raise LeewayError(what, fix="delete it and run the same command again") from error


def with_checksum(record: dict[str, Any]) -> dict[str, Any]:
    """Return the record with a digest of itself, which `verify_checksum` checks."""
    return {**record, "seal": digest(record)}


def verify_checksum(record: dict[str, Any]) -> dict[str, Any]:
    """Return the record without its checksum; raise ValueError if it was changed after it was written."""
    if not isinstance(record, dict):
        raise ValueError("it is not an object")
    content = {k: v for k, v in record.items() if k != "seal"}
    if record.get("seal") != digest(content):
        raise ValueError("it was changed after it was written")
    return content


def open_lock(path: Path, fix: str = "give another --out") -> IO[bytes]:
    """Open a lock file for reading and writing; create it if missing, and keep its content.

    Raises LeewayError where it is a symbolic link, not a regular file, or cannot be opened; FileNotFoundError where its
    folder is gone.
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except FileNotFoundError:
        raise
    except OSError as error:
        what = "it is a symbolic link" if path.is_symlink() else error.strerror
        raise LeewayError(f"{path}: cannot be opened ({what})", fix=fix) from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise LeewayError(f"{path}: not a regular file", fix=fix)
    return os.fdopen(handle, "r+b")


def wrap_words(line: str, width: int | None) -> list[str]:
    """Return a line wrapped between words; unchanged without a width.

    Continuation lines align with the last column (text after two or more spaces) in the first half of the width; a
    line without columns is continued with an indent of two.
    """
    if width is None:
        return [line]
    columns = re.match(r".*\S\s{2,}(?=\S)", line[: width // 2])
    indent = columns.end() if columns else len(line) - len(line.lstrip()) + 2
    filled = textwrap.TextWrapper(width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)
    return filled.wrap(line) or [line]
