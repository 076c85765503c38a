"""Hostile variants of valid files: edits of their text, edits of their values, and values drawn by hypothesis."""

from __future__ import annotations

import copy
import datetime
import json
import random
from collections.abc import Callable
from functools import partial
from typing import Any

from hypothesis import strategies as st
from pydantic import BaseModel

from leeway.yaml_config import dump

HUGE = 10**30
HOSTILE_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3.5, -0.0, 1e-300, 1e300, float("nan"), float("inf"), -float("inf")),
    *(HUGE, -HUGE, 2**31, 2**53 + 1, 2**63, 2**64),
    *(
        "",
        " ",
        "\n",
        "auto",
        "all",
        "none",
        "null",
        "true",
        "organism",
        "base",
        "largest",
        "NaN",
        "1e5",
        "0x10",
        "=1+1",
    ),
    *("~", "~root/x", "~nosuch/x", "/", "/dev/zero", "/dev/stdin", "/etc/passwd", "../../..", ".", "a/b", "http://x"),
    *("\x1b[2J\x1b]0;owned\x07", "\u202egpj", "\u200b", "\x00", "\ud800", "{{ 7*7 }}", "{prompt}", "%s%n", "${HOME}"),
    *("a" * 5_000, "a/" * 3_000, "(" * 300, "é" * 300, "((a+)+)+$", "x" * 300 + ".jsonl", "[" * 200),
    *([], {}, [[]], [None], [{}], {"": ""}, {"a": None}, [1, "a", None], ["sft", "sft"], {1: 2}, {None: 1}, {True: 1}),
    *(
        [[[[[[[[]]]]]]]],
        {"a": {"b": {"c": {"d": {}}}}},
        ["a"] * 300,
        list(range(2_000)),
        {f"k{n}": n for n in range(300)},
    ),
    *(datetime.date(2026, 1, 1), datetime.datetime(2026, 1, 1), b"\xff\x00", 1j.real, -1.5, 0.1, 0.99, 1.01),
)
TOKENS = (
    *("!!python/object/apply:os.system [id]", "!!python/name:os.system", "!!binary aGk=", "!!float x", "!!int 1_0"),
    *("!!set {a, b}", "!!omap [a: 1]", "!!timestamp x", "!<tag:x> y", "!x y", "&a [*a]", "&a {b: *a}", "*nowhere"),
    *("<<: {a: 1}", "<<: *x", "? [a]", "? {a: b}\n: c", "%YAML 9.9", "%TAG ! x", "---", "...", "--- a\n--- b", "\t"),
    *("\x00", "\x1b", "\ufeff", "\u2028", "\x85", "\r", "|", ">", "|9", "'", '"', '"\\x', '"\\ud800"', "`", "@", "%"),
    *("[" * 60, "{" * 60, "- " * 200, "a: " * 40, "]", "}", ":", ",", "#", "0o9", "0b2", "1:30:00", ".nan", ".inf"),
    *("9" * 5_000, "1e999999", "-" * 100, "\\", "é", "日本", "\U0001f600", "2001-99-99", "=", "~", "yes", "0777"),
)


def mutant_text(rng: random.Random, text: str) -> bytes:
    """Return a text with one to four edits, as bytes that may be no UTF-8."""
    for _ in range(rng.randint(1, 4)):
        text = rng.choice(TEXT_EDITS)(rng, text)
    data = text.encode("utf-8", "surrogatepass")
    return _flip(rng, data) if rng.random() < 0.1 else data


def _insert(rng: random.Random, text: str) -> str:
    at = rng.randint(0, len(text))
    return text[:at] + rng.choice(TOKENS) + text[at:]


def _replace_value(rng: random.Random, text: str) -> str:
    lines = text.split("\n")
    n = rng.randrange(len(lines))
    head, colon, _ = lines[n].partition(": ")
    lines[n] = f"{head}{colon or ': '}{rng.choice(TOKENS)}"
    return "\n".join(lines)


def _lines(edit: Callable[[random.Random, list[str]], None], rng: random.Random, text: str) -> str:
    lines = text.split("\n")
    edit(rng, lines)
    return "\n".join(lines)


def _drop_line(rng: random.Random, lines: list[str]) -> None:
    del lines[rng.randrange(len(lines))]


def _repeat_line(rng: random.Random, lines: list[str]) -> None:
    lines.insert(rng.randint(0, len(lines)), rng.choice(lines or [""]))


def _indent(rng: random.Random, lines: list[str]) -> None:
    if lines:
        n = rng.randrange(len(lines))
        lines[n] = rng.choice(["  ", "\t", " "]) + lines[n] if rng.random() < 0.5 else lines[n].lstrip()


def _swap(rng: random.Random, lines: list[str]) -> None:
    rng.shuffle(lines)


def _cut(rng: random.Random, text: str) -> str:
    return text[: rng.randint(0, len(text))]


def _character(rng: random.Random, text: str) -> str:
    at = rng.randint(0, len(text))
    return text[:at] + chr(rng.choice([0, 9, 13, 27, 39, 34, 91, 123, 58, 0x2028, 0xD800, 0x1F600])) + text[at + 1 :]


def _double(_: random.Random, text: str) -> str:
    return text + "\n" + text


TEXT_EDITS: tuple[Callable[[random.Random, str], str], ...] = (
    *(_insert, _insert, _replace_value, _replace_value, _cut, _character, _double),
    *(partial(_lines, edit) for edit in (_drop_line, _repeat_line, _indent, _swap)),
)


def _flip(rng: random.Random, data: bytes) -> bytes:
    flipped = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        if flipped:
            flipped[rng.randrange(len(flipped))] = rng.randrange(256)
    return bytes(flipped)


def flipped(rng: random.Random, data: bytes) -> bytes:
    """Return bytes that are changed, cut, repeated or replaced."""
    how = rng.randrange(6)
    if how == 0:
        return data[: rng.randint(0, len(data))]
    if how == 1:
        return data + data
    if how == 2:
        return rng.choice([b"", b"\x00" * 64, b"PK\x03\x04", b"\x1f\x8b\x08", b"PAR1PAR1", b"[" * 100_000, b"null"])
    if how == 3:
        at = rng.randint(0, len(data))
        return data[:at] + rng.randbytes(rng.randint(1, 64)) + data[at:]
    return _flip(rng, data)


def mutant_value(rng: random.Random, value: Any) -> Any:
    """Return a copy of nested mappings and lists with one to three places changed."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        places = list(_places(value))
        if not places:
            return rng.choice(HOSTILE_VALUES)
        inside, key = rng.choice(places)
        how = rng.random()
        if how < 0.55:
            inside[key] = copy.deepcopy(rng.choice(HOSTILE_VALUES))
        elif how < 0.65:
            del inside[key]
        elif how < 0.75:
            other, theirs = rng.choice(places)
            inside[key] = copy.deepcopy(other[theirs]) if theirs in _keys(other) else None
        elif how < 0.85 and isinstance(inside, dict):
            inside[_hashable(rng.choice(HOSTILE_VALUES))] = inside.pop(key)
        elif how < 0.93 and isinstance(inside, list):
            inside.insert(rng.randint(0, len(inside)), copy.deepcopy(inside[key]))
        elif isinstance(inside[key], str) and inside[key]:
            text = inside[key]
            at = rng.randint(0, len(text))
            inside[key] = text[:at] + rng.choice(["\x1b", "\u202e", "x", "", "0", "-", "\n", "'"]) + text[at + 1 :]
        else:
            inside[key] = [inside[key]]
    return value


def _keys(inside: Any) -> Any:
    return inside.keys() if isinstance(inside, dict) else range(len(inside))


def _hashable(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | None | datetime.date) else str(value)


def _places(value: Any) -> Any:
    """Yield (container, key) of every value in nested mappings and lists."""
    for key in list(_keys(value)) if isinstance(value, dict | list) else ():
        yield value, key
        yield from _places(value[key])


def as_yaml(value: Any) -> bytes:
    """Return a value as YAML; as JSON, which is YAML too, where the writer has no form for it."""
    try:
        return dump(value).encode("utf-8", "surrogatepass")
    except Exception:  # noqa: BLE001 - the writer's own limits, not what is tested
        return json.dumps(value, default=str, skipkeys=True).encode("utf-8", "surrogatepass")


def junk() -> st.SearchStrategy[Any]:
    """Return any value that YAML can hold."""
    texts = st.text(max_size=30) | st.sampled_from([v for v in HOSTILE_VALUES if isinstance(v, str)])
    plain = st.none() | st.booleans() | st.integers() | st.floats() | texts | st.sampled_from(HOSTILE_VALUES)
    return st.recursive(plain, lambda s: st.lists(s, max_size=4) | st.dictionaries(texts, s, max_size=4), max_leaves=8)


def like(model: type[BaseModel], depth: int = 3) -> st.SearchStrategy[Any]:
    """Return mappings with the keys of a model and any values, those of inner models in inner mappings."""
    keys = {field.alias or name: field.annotation for name, field in model.model_fields.items()}
    values = {key: _of(annotation, depth) for key, annotation in keys.items()}
    return st.fixed_dictionaries({}, optional=values)


def _of(annotation: Any, depth: int) -> st.SearchStrategy[Any]:
    inner = _models_in(annotation) if depth else []
    own = [like(m, depth - 1) for m in inner]
    return st.one_of(junk(), *own, *(st.lists(o, max_size=3) for o in own))


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    from typing import get_args

    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for a in get_args(annotation) for m in _models_in(a)]
