"""What other packages bring by entry points: looked up when asked for, each fault one line that names the package."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from leeway.errors import LeewayError
from leeway.hashing import file_digest

NAME = r"[a-z0-9][a-z0-9._-]*"  # it becomes part of file names and columns


def entry_points_of(group: str, kind: str, taken: Collection[str]) -> dict[str, EntryPoint]:
    """The entry points of a group by name; raises LeewayError where one has the name of another or of one of ours."""
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=group):
        if point.name in taken or point.name in found:
            raise LeewayError(f"{kind} {point.name}: {point.value} has the name of another one", fix="rename it there")
        found[point.name] = point
    return found


def load_entry_point(point: EntryPoint, kind: str, needs: Iterable[str] = ()) -> Any:
    """What an entry point names; raises LeewayError where it cannot be had or is not what was asked for."""
    try:
        thing = point.load()
    except Exception as error:  # whatever a foreign module raises is named
        raise LeewayError(
            f"{kind} {point.name}: {point.value} cannot be loaded ({type(error).__name__}: {error})",
            fix="mend that package",
        ) from error
    needed = list(needs)
    lacks = [a for a in needed if not hasattr(thing, a)]
    if lacks or (needed and thing.name != point.name):
        why = f" (no {', '.join(lacks)})" if lacks else ""
        raise LeewayError(
            f"{kind} {point.name}: {point.value} is no {kind} of this name{why}",
            fix=f"let the entry point name one with {', '.join(needed)}",
        )
    return thing


def source_hash(thing: Any) -> str:
    """Content hash of the file in which a class or function is written."""
    path = inspect.getsourcefile(thing)
    return file_digest(Path(path)) if path else ""
