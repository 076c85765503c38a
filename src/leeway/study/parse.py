"""From YAML to a checked study: all faults in one line, an unknown key answered with the nearest known one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from leeway.errors import LeewayError
from leeway.study.objective_spec import WRITTEN
from leeway.study.part import nearest
from leeway.study.presets import PRESETS, preset_text
from leeway.study.spec import FLOAT, Spec


class _Loader(yaml.SafeLoader):
    """YAML with two differences: floats are read as in YAML 1.2 (`1e-4` is one), and no key may be repeated."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - the library's own name for them
        first: [(tag, pattern) for tag, pattern in known if tag != "tag:yaml.org,2002:float"]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[Any] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if (key.tag, key.value) in seen:
                    raise _RepeatedError(None, None, f"{key.value!r} is given twice", key.start_mark)
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))


class _RepeatedError(yaml.constructor.ConstructorError):
    """A key that a mapping holds twice."""


def parse(text: str, where: str, overrides: tuple[str, ...] = ()) -> Spec:
    """A study from YAML and `key=value` overrides; all faults in one LeewayError."""
    try:
        raw = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:  # a ValueError: a date that does not exist, an endless number
        mark = getattr(error, "problem_mark", None)
        at = f", line {mark.line + 1}" if mark else ""
        raise LeewayError(f"{where}{at}: {_problem(error)}", fix="mend that line") from error
    if not isinstance(raw, dict):
        raise LeewayError(f"{where}: not a study", fix="start from `leeway studies demo`")
    for override in overrides:
        _override(raw, override)
    try:
        return Spec.model_validate(raw, context=WRITTEN)
    except ValidationError as error:
        faults = [line for e in error.errors() for line in _fault(e)]
        raise LeewayError(f"{where}: " + "; ".join(faults)) from error


def _override(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise LeewayError(f"{override!r} is not an override", fix="write key=value, such as optim.lr=1e-4")
    place: Any = raw
    *above, last = key.split(".")
    for name in above:
        place = place.setdefault(name, {}) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            raise LeewayError(f"override {override!r}: {name} holds no keys", fix=f"override {name} as a whole")
    try:
        place[last] = yaml.load(value, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise LeewayError(f"override {override!r}: {_problem(error)}", fix="quote or mend its value") from error


def _problem(error: Exception) -> str:
    """What is wrong with a text, in a line."""
    said = " ".join(str(getattr(error, "problem", None) or error).split())
    return said if isinstance(error, _RepeatedError) else f"not YAML ({said})"


def _fault(error: Any) -> list[str]:
    path = [str(p) for p in error["loc"]]
    where = ".".join(path)
    if error["type"] == "extra_forbidden":
        known = _keys_at(path[:-1])
        fix = nearest(path[-1], known)
        listed = f" (known here: {', '.join(known)})"
        return [f"unknown key {where!r}{fix or listed}"]
    if error["type"] == "missing":
        return [f"{where} is missing"]
    if error["type"] in ("tuple_type", "list_type"):
        return [f"{where}: give a list, such as [{error['input']}]"]
    if error["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return [f"{where}: give a mapping ({', '.join(_keys_at(path)) or 'key: value'}), not {error['input']!r}"]
    if error["type"] == "too_short" and error["input"]:
        return []  # its items were at fault, and are named
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        prefix = f"{where}: " if where and not message.startswith(where) else ""
        return [prefix + line for line in message.split("\n")]
    return [f"{where}: {message[0].lower() + message[1:]}, not {error['input']!r}"]


def _keys_at(path: list[str]) -> list[str]:
    """The keys that the study file knows at this place."""
    kind: Any = Spec
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


def load(name: str, overrides: tuple[str, ...] = ()) -> Spec:
    """A study file, or a preset by name."""
    if name in PRESETS:
        return parse(preset_text(name), f"preset {name}", overrides)
    path = Path(name)
    if not path.is_file():
        raise LeewayError(
            f"{name}: neither a study file nor a preset{nearest(name, PRESETS)}",
            fix="`leeway studies` lists the presets",
        )
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise LeewayError(f"{path}: not UTF-8 text (byte {error.start})", fix="save it as UTF-8") from error
    return parse(text, str(path), overrides)
