"""Entry points of other packages: each is loaded when it is needed, and an error names its package in one line."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from leeway.errors import LeewayError
from leeway.hashing import file_digest

NAME = r"[a-z0-9][a-z0-9._-]*"  # part of file names and columns


def entry_points_of(group: str, kind: str, taken: Collection[str]) -> dict[str, EntryPoint]:
    """Return the entry points of a group by name; raise LeewayError for a name that is `taken` or repeated."""
    points: dict[str, EntryPoint] = {}
    for point in entry_points(group=group):
        if point.name in taken or point.name in points:
            what = f"{kind} {point.name}: the name of {point.value} is taken"
            raise LeewayError(what, fix="rename it in its package")
        points[point.name] = point
    return points


def load_entry_point(point: EntryPoint, kind: str, attributes: Collection[str] = ()) -> Any:
    """Return the object of an entry point; raise LeewayError if it does not load or lacks one of `attributes`."""
    try:
        thing = point.load()
    except Exception as error:  # another package's module may raise anything
        what = f"{kind} {point.name}: {point.value} cannot be loaded ({type(error).__name__}: {error})"
        raise LeewayError(what, fix="correct that package") from error
    missing = [a for a in attributes if not hasattr(thing, a)]
    if missing:
        what = f"{kind} {point.name}: {point.value} does not implement {kind} (no {', '.join(missing)})"
        raise LeewayError(what, fix=f"implement {', '.join(attributes)}")
    if attributes and thing.name != point.name:
        what = f"{kind} {point.name}: {point.value} has another name, {thing.name!r}"
        raise LeewayError(what, fix="give the entry point that name")
    return thing


def source_hash(thing: Any) -> str:
    """Return the content hash of the file that defines a class or function."""
    path = inspect.getsourcefile(thing)
    return file_digest(Path(path)) if path else ""
