"""The files of a report, put into a run directory without touching a user's files.

The report records the path and digest of every file that it writes in `.report-files.json`. A later report replaces a
file only if its content is the recorded one (or already the new one), and removes a recorded file that is not made any
more only if its content is unchanged. Anything else at a path to be written is a user's file, and an error before
anything is written. No symbolic link below the run directory is followed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from leeway.errors import LeewayError
from leeway.hashing import file_digest
from leeway.io import write_file, write_json

RECORD = ".report-files.json"
STALE = ("tables/*.csv", "tables/*.tex", "figures/*.svg", "figures/*.png", "figures/*.pdf")  # what may be removed


def replace_files(folder: Path, files: Mapping[str, str | bytes]) -> None:
    """Write `files`, content by path relative to `folder`, and remove what only an earlier report wrote.

    Raises LeewayError, with nothing changed, where a path is a symbolic link, leads through one, or holds another file.
    """
    made = {name: text.encode("utf-8") if isinstance(text, str) else text for name, text in files.items()}
    digests = {name: _digest_of(content) for name, content in made.items()}
    before = _recorded(folder)
    for name in [RECORD, *made]:
        _check_target(folder, name, {*before.get(name, []), digests.get(name, "")})
    # both contents are the report's own until all are written: it may be killed in between
    both = {n: sorted({*before.get(n, []), *([digests[n]] if n in digests else [])}) for n in {*before, *digests}}
    _record(folder, both)
    for name in sorted(before.keys() - made.keys()):
        _remove_stale(folder, name, before[name])
    for name, content in made.items():
        write_file(folder / name, content)
    _record(folder, {name: [found] for name, found in digests.items()})


def _digest_of(content: bytes) -> str:
    """As `file_digest` of a file with this content."""
    return hashlib.sha256(content).hexdigest()[:16]


def _record(folder: Path, digests: Mapping[str, list[str]]) -> None:
    write_json(folder / RECORD, digests)


def _recorded(folder: Path) -> dict[str, list[str]]:
    """Digests by path; empty where no record can be read: then no file counts as the report's."""
    path = folder / RECORD
    try:
        found = {} if path.is_symlink() else json.loads(path.read_text("utf-8"))
        return {str(name): [str(d) for d in digests] for name, digests in found.items()}
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return {}


def _check_target(folder: Path, name: str, own: set[str]) -> None:
    path = folder / name
    if link := _link(folder, path):
        raise LeewayError(f"{link} is a symbolic link", fix="move it away, and run the report again")
    if name != RECORD and path.exists() and not (path.is_file() and file_digest(path) in own):
        raise LeewayError(f"{path} is not a file that the report wrote", fix="move it away, and run the report again")


def _remove_stale(folder: Path, name: str, own: list[str]) -> None:
    """Remove a file of an earlier report, which would look current; one that was edited since stays."""
    path = folder / name
    named = any(Path(name).match(kind) for kind in STALE) and len(Path(name).parts) == 2
    if named and not _link(folder, path) and path.is_file() and file_digest(path) in own:
        path.unlink()


def _link(folder: Path, path: Path) -> Path | None:
    """The first symbolic link on the way from `folder` to `path`, `path` included."""
    way = [path, *path.parents]
    below = way[: way.index(folder)] if folder in way else way
    return next((p for p in reversed(below) if p.is_symlink()), None)
