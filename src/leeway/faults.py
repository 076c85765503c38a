"""What is wrong with a file that people write, in their words: every fault of a typed mapping, one line each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from leeway.part import nearest

LONGEST = 200  # characters of a value that a message repeats


def faults(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """All faults of a file that should have held a `root`."""
    return [line for e in error.errors() for line in _fault(e, root)]


def _fault(error: Any, root: type[BaseModel]) -> list[str]:
    path = [str(p) for p in error["loc"]]
    where = ".".join(path)
    if error["type"] == "extra_forbidden":
        known = _keys_at(path[:-1], root)
        fix = nearest(path[-1], known)
        listed = f" (known here: {', '.join(known)})"
        return [f"unknown key {where!r}{fix or listed}"]
    if error["type"] == "missing":
        return [f"{where} is missing"]
    if error["type"] in ("tuple_type", "list_type"):
        return [f"{where}: give a list, such as [{_shown(error['input'], str)}]"]
    if error["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return [
            f"{where}: give a mapping ({', '.join(_keys_at(path, root)) or 'key: value'}), not {_shown(error['input'])}"
        ]
    if error["type"] == "too_short" and error["input"]:
        return []  # its items were at fault, and are named
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        prefix = f"{where}: " if where and not message.startswith(where) else ""
        return [prefix + line for line in message.split("\n")]
    return [f"{where}: {message[0].lower() + message[1:]}, not {_shown(error['input'])}"]


def _shown(value: Any, text: Callable[[Any], str] = repr) -> str:
    """Return a value as text, cut where it would fill a screen."""
    try:
        whole = text(value)
    except ValueError:  # Python does not write integers of more than 4,300 digits
        return "a number with too many digits"
    return whole if len(whole) <= LONGEST else f"{whole[:LONGEST]}…"


def _keys_at(path: list[str], root: type[BaseModel]) -> list[str]:
    """The keys that the file knows at this place."""
    kind: Any = root
    for name in path:
        if name.isdigit():
            continue
        field = next((f for k, f in kind.model_fields.items() if name in (k, f.alias)), None)
        kind = _part(field.annotation) if field else None
        if kind is None:
            return []
    return [f.alias or k for k, f in kind.model_fields.items()]


def _part(annotation: Any) -> Any:
    """The mapping inside an annotation such as `tuple[X, ...]` or `X | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for a in get_args(annotation) if (found := _part(a))), None)
