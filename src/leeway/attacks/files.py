"""A user's own templates, published texts say, as one-turn attacks beside the ones written here."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from leeway import loader
from leeway.attacks.attack import Wrapper
from leeway.errors import LeewayError, first_line

KEYS = {"name", "version", "origin", "template"}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def read_templates(path: Path, taken: Collection[str]) -> dict[str, Wrapper]:
    """Wrappers by name, in the file's order.

    The file is YAML or JSON: `{name: template}`, or a list of `{name, template, version?, origin?}`. A template holds
    `{prompt}` exactly once. Raises LeewayError for a name that is listed twice or is one of `taken`.
    """
    found: dict[str, Wrapper] = {}
    for where, entry in _entries(path):
        name = entry["name"]
        if name in taken:
            raise LeewayError(f"{where}: there is an attack {name} already", fix="give it another name")
        if name in found:
            raise LeewayError(f"{where}: {name} is listed twice", fix="give one of them another name")
        found[name] = Wrapper(
            name, int(entry.get("version", 1)), str(entry.get("origin", f"file {path.name}")), entry["template"]
        )
    if not found:
        raise LeewayError(f"{path}: no template in it", fix="write name: text with {prompt}")
    return found


def _entries(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(where, name and template and what else is said) of each template, checked."""
    raw = _raw(path)
    if isinstance(raw, dict):
        listed = [{"name": k, "template": v} for k, v in raw.items()]
    elif isinstance(raw, list) and all(isinstance(e, dict) for e in raw):
        listed = raw
    else:
        raise LeewayError(f"{path}: neither names with templates nor a list", fix="write name: text with {prompt}")
    return [(where, _checked(where, e)) for e in listed for where in [f"{path}, template {e.get('name', '?')}"]]


def _checked(where: str, entry: dict[str, Any]) -> dict[str, Any]:
    if unknown := set(entry) - KEYS:
        raise LeewayError(
            f"{where}: unknown key {sorted(map(str, unknown))[0]}", fix=f"keys: {', '.join(sorted(KEYS))}"
        )
    name, template, version = entry.get("name"), entry.get("template"), entry.get("version", 1)
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise LeewayError(f"{where}: {name!r} is no name", fix="letters, digits, _, - and ., in quotes if a number")
    if not isinstance(template, str):
        raise LeewayError(f"{where}: its template is no text", fix="write a text with {prompt}")
    if (n := template.count("{prompt}")) != 1:
        raise LeewayError(f"{where}: it holds {{prompt}} {n} times", fix="write {prompt} exactly once")
    if isinstance(version, bool) or not isinstance(version, int):
        raise LeewayError(f"{where}: version {version!r} is no whole number", fix="count versions 1, 2, 3")
    if not isinstance(entry.get("origin", ""), str):
        raise LeewayError(f"{where}: its origin is no text", fix="say where the text was published")
    return entry


def _raw(path: Path) -> Any:
    try:
        text = path.read_text("utf-8-sig")
    except OSError as error:
        raise LeewayError(
            f"{path}: cannot be read ({error.strerror})", fix="check the path of the templates"
        ) from error
    except UnicodeDecodeError as error:
        raise LeewayError(f"{path}: not UTF-8 text (byte {error.start})", fix="save it as UTF-8") from error
    try:
        if path.suffix == ".json":
            return json.loads(text, object_pairs_hook=lambda pairs: _once(path, pairs))
        return loader.load(text, _Once)
    except json.JSONDecodeError as error:
        raise LeewayError(f"{path}, line {error.lineno}: not JSON ({error.msg})", fix="mend that line") from error
    except (ValueError, RecursionError) as error:  # a date that does not exist, thousands of digits or brackets
        raise LeewayError(f"{path}: cannot be read ({first_line(error)})", fix="mend the file") from error
    except _Twice as error:
        raise LeewayError(f"{path}: {error} is listed twice", fix="give one of them another name") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f", line {mark.line + 1}" if mark else ""
        raise LeewayError(f"{path}{at}: not YAML ({getattr(error, 'problem', None)})", fix="mend that line") from error


class _Twice(yaml.YAMLError):
    """A key that a mapping has twice: the library would keep the last one alone."""


def _once(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for k, (key, _) in enumerate(pairs):
        if any(key == other for other, _ in pairs[:k]):
            raise LeewayError(f"{path}: {key} is listed twice", fix="give one of them another name")
    return dict(pairs)


class _Once(yaml.SafeLoader):
    """A loader that takes no key twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(k, deep=True) for k, _ in node.value]
        for k, key in enumerate(keys):
            if key in keys[:k]:
                raise _Twice(str(key))
        return super().construct_mapping(node, deep)
