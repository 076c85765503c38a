"""Paths that people write in study files, on the command line and in environment variables."""

from __future__ import annotations

from pathlib import Path

from leeway.errors import LeewayError


def expand(path: str | Path) -> Path:
    """Return `path` with a leading `~` or `~user` replaced by that home folder.

    Raises LeewayError where there is no such user, or no home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        home = Path(path).parts[0]
        raise LeewayError(f"{path}: no home folder for {home}", fix="write the path in full") from error
