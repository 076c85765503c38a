"""What every mapping of a file that people write is, and how a misspelt word finds its nearest known one.

What is wrong with a file that people write, in their words: every fault of a typed mapping, one line each.

How every YAML file that people write is read: floats as in YAML 1.2, no key twice, a fault in one line.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Annotated, Any, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from leeway.errors import LeewayError


class ConfigModel(BaseModel):
    """A mapping of such a file."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth(cls, value: Any, info: ValidationInfo) -> Any:
        """`true` is no 1, and `no`, which YAML reads as false, no word."""
        if isinstance(value, bool) and bool not in _kinds(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError(f"{str(value).lower()} is no value here; a word such as yes or no goes into quotes")
        return value


def _kinds(annotation: Any) -> set[Any]:
    """The types inside an annotation."""
    return {annotation}.union(*(_kinds(a) for a in get_args(annotation))) if get_args(annotation) else {annotation}


def nearest(word: str, known: Any) -> str:
    found = difflib.get_close_matches(word, [str(k) for k in known], n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""


def tokens(value: Any) -> Any:
    """`25k`, `0.5M` or a number of tokens."""
    if isinstance(value, bool):
        raise ValueError(f"{str(value).lower()} is no number of tokens; give one, such as 25k")
    if isinstance(value, str) and (found := re.fullmatch(r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*([kKmM]?)\s*", value)):
        count = Decimal(found[1]) * {"": 1, "k": 1_000, "m": 1_000_000}[found[2].lower()]
        return int(count) if count == int(count) else float(count)
    return value


MAX_COUNT = 2**53  # beyond it a float, as JSON and tables hold numbers, does not count exactly
MAX_FLOAT32 = 3.4e38
Tokens = Annotated[int, BeforeValidator(tokens), Field(gt=0, le=MAX_COUNT)]


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


# YAML 1.2, 10.3.2; an integer matches YAML's own pattern before it
FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9]+(?:\.[0-9]*(?:[eE][-+]?[0-9]+)?|[eE][-+]?[0-9]+)|\.(?:inf|Inf|INF))$"
    r"|\.(?:nan|NaN|NAN)$"
)


class Loader(yaml.SafeLoader):
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
                    raise RepeatedError(None, None, f"{key.value!r} is given twice", key.start_mark)
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))


class RepeatedError(yaml.constructor.ConstructorError):
    """A key that a mapping holds twice."""


MAX_DEPTH = 50
MAX_NODES = 100_000  # after every alias is replaced by what it stands for


class SizeError(yaml.constructor.ConstructorError):
    """A text that is nested too deep, refers to itself, or grows without bound when its aliases are replaced."""


def load(text: str, loader: type[yaml.SafeLoader] = Loader) -> Any:
    """Return what a YAML text holds; raise yaml.YAMLError or ValueError where it is no YAML, or is too large.

    The size is checked on the nodes, in which an alias is a reference, before any value is built from them.
    """
    parser = loader(text)
    try:
        node = parser.get_single_node()
        if node is None:
            return None
        _refuse_oversized(node)
        return parser.construct_document(node)
    except (KeyError, AttributeError) as error:  # the library's own, for `!!bool x` and `!!timestamp x`
        raise yaml.constructor.ConstructorError(None, None, "a tag that does not fit its value") from error
    except RecursionError as error:
        raise SizeError(None, None, "nested too deep", None) from error
    finally:
        parser.dispose()


def _refuse_oversized(root: Any) -> None:
    """Raise SizeError for a self-reference, more than MAX_DEPTH levels, or more than MAX_NODES expanded nodes."""
    sizes: dict[int, int] = {}  # by node: it and all below it, aliases expanded
    above: set[int] = set()

    def size(node: Any) -> int:
        if id(node) in above:
            raise SizeError(None, None, "an alias refers to a value that contains it", node.start_mark)
        if len(above) > MAX_DEPTH:
            raise SizeError(None, None, f"nested deeper than {MAX_DEPTH} levels", node.start_mark)
        if id(node) not in sizes:
            above.add(id(node))
            sizes[id(node)] = 1 + sum(size(child) for child in _children(node))
            above.remove(id(node))
        if sizes[id(node)] > MAX_NODES:
            raise SizeError(None, None, f"more than {MAX_NODES:,} values, aliases included", node.start_mark)
        return sizes[id(node)]

    size(root)


def _children(node: Any) -> list[Any]:
    if isinstance(node, yaml.MappingNode):
        return [child for pair in node.value for child in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def problem(error: Exception) -> str:
    """What is wrong with a text, in a line."""
    said = " ".join(str(getattr(error, "problem", None) or error).split())
    return said if isinstance(error, (RepeatedError, SizeError)) else f"not YAML ({said})"


def read(text: str, where: str) -> Any:
    """What a YAML text holds; raises LeewayError with the line at fault."""
    try:
        return load(text)
    except (yaml.YAMLError, ValueError) as error:  # a ValueError: a date that does not exist, an endless number
        mark = getattr(error, "problem_mark", None)
        at = f", line {mark.line + 1}" if mark else ""
        raise LeewayError(f"{where}{at}: {problem(error)}", fix="mend that line") from error
