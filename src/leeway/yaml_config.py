"""YAML files that people write: reading YAML 1.2 safely, and the base class of their typed mappings.

Every problem is one line: what and where. Size, depth and self-references are checked before a value is built.
"""

from __future__ import annotations

import difflib
import io
import itertools
import re
import warnings
from collections.abc import Callable, Iterator
from decimal import Decimal
from importlib.resources import files
from typing import Annotated, Any, ClassVar, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic.functional_validators import AfterValidator, BeforeValidator
from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, ReusedAnchorWarning, YAMLError
from ruamel.yaml.nodes import MappingNode, SequenceNode
from ruamel.yaml.scanner import Scanner

from leeway.errors import HALF_CHARACTER, LeewayError

MAX_COUNT = 2**53  # the largest count that a float, and so JSON and tables, holds exactly
MAX_FLOAT32 = 3.4e38
MAX_CHARACTERS = 8 << 20  # of a YAML text, of which a second reads about 100,000
MAX_DEPTH = 50
MAX_NODES = 100_000  # with every alias expanded
MAX_PLACES = 2  # of a key that belongs elsewhere; more are no hint
MAX_SHOWN = 200  # characters of a value in a message
MAX_FAULT = 1000  # characters of one fault, which may quote a value that no person wrote
UNFOLDED = 2**31  # line width: ruamel.yaml folds some quoted texts wrongly


def read(text: str, where: str) -> Any:
    """Return the value of a YAML text; raise LeewayError with the file and the line."""
    try:
        return load(text)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f", line {mark.line + 1}" if mark else ""
        raise LeewayError(f"{where}{at}: {problem(error)}", fix="correct that line") from error


def load(text: str) -> Any:
    """Return the value of a YAML 1.2 text; raise YAMLError for a text that is not valid, or too large.

    The size is checked on the nodes, in which an alias is a reference, before any value is built from them.
    """
    if len(text) > MAX_CHARACTERS:
        raise SizeError(f"over {MAX_CHARACTERS >> 20} MiB of text")
    parser = YAML(typ="safe", pure=True)
    parser.Scanner = _Scanner
    try:
        with warnings.catch_warnings():  # an anchor may be given again, and the warning quotes the file unescaped
            warnings.simplefilter("ignore", ReusedAnchorWarning)
            node = parser.compose(text)
        if node is None:
            return None
        _check_nodes(node)
        return parser.constructor.construct_document(node)
    except RecursionError as error:
        raise SizeError("nested too deep") from error
    except (KeyError, AttributeError) as error:  # the library's own, for `!!bool x`
        raise MarkedYAMLError(problem="a tag that does not fit its value") from error
    except ValueError as error:  # a date that does not exist, a number of thousands of digits
        raise MarkedYAMLError(problem=str(error)) from error


def package_data(package: str, name: str) -> Any:
    """Return the value of a YAML file that ships in `package`."""
    return load((files(package) / name).read_text("utf-8"))


def dump(value: Any, *, flow: bool = False) -> str:
    """Return a value as YAML with its keys in order; `flow` writes it in one line."""
    writer = YAML(typ="safe", pure=True)
    writer.default_flow_style = flow
    writer.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    writer.width = UNFOLDED
    text = io.StringIO()
    writer.dump(value, text)
    return text.getvalue().removesuffix("...\n")


def problem(error: YAMLError) -> str:
    """Return what is wrong with a YAML text, in a line."""
    text = " ".join(str(getattr(error, "problem", None) or error).split())
    if isinstance(error, DuplicateKeyError) and (key := re.match(r'found duplicate key "(.*?)" with value', text)):
        return f"{key[1]!r} is given twice"
    return text if isinstance(error, SizeError) else f"not YAML ({_cut(text)})"


class SizeError(MarkedYAMLError):
    """A text that is nested too deep, refers to itself, or grows beyond MAX_NODES when its aliases are expanded."""

    def __init__(self, problem: str, mark: Any = None) -> None:
        super().__init__(problem=problem, problem_mark=mark)


class _Scanner(Scanner):
    """Stops at MAX_DEPTH open brackets: the time of the library's scanner grows with their square."""

    def fetch_flow_collection_start(self, token: Any, to_push: str) -> None:
        if self.flow_level >= MAX_DEPTH:
            raise SizeError(f"nested deeper than {MAX_DEPTH} levels", self.reader.get_mark())
        super().fetch_flow_collection_start(token, to_push)


def _check_nodes(root: Any) -> None:
    """Raise SizeError for a self-reference, more than MAX_DEPTH levels, or more than MAX_NODES expanded nodes.

    Raises MarkedYAMLError for one half of a surrogate pair, which no file and no tokenizer accepts.
    """
    sizes: dict[int, int] = {}  # by node: it and all below it, aliases expanded
    above: set[int] = set()

    def size(node: Any) -> int:
        if id(node) in above:
            raise SizeError("an alias refers to a value that contains it", node.start_mark)
        if len(above) > MAX_DEPTH:
            raise SizeError(f"nested deeper than {MAX_DEPTH} levels", node.start_mark)
        if id(node) not in sizes:
            above.add(id(node))
            children = node.value if isinstance(node, MappingNode | SequenceNode) else []
            if isinstance(node.value, str) and (half := HALF_CHARACTER.search(node.value)):
                what = f"\\u{ord(half[0]):04x} is one half of a character"
                raise MarkedYAMLError(problem=what, problem_mark=node.start_mark)
            children = itertools.chain(*children) if isinstance(node, MappingNode) else children  # keys and values
            sizes[id(node)] = 1 + sum(map(size, children))
            above.remove(id(node))
        if sizes[id(node)] > MAX_NODES:
            raise SizeError(f"more than {MAX_NODES:,} values, aliases included", node.start_mark)
        return sizes[id(node)]

    size(root)


class ConfigModel(BaseModel):
    """A typed mapping of such a file: unknown keys, non-finite numbers and stray booleans are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    RENAMED: ClassVar[dict[str, str]] = {}  # other tools' names for keys of the whole file, and their places in it

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_boolean(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse `true` where pydantic would read it as 1, and integers that no table holds."""
        if isinstance(value, bool) and bool not in _types_in(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError(f"{str(value).lower()} is not a valid value; quote it if it is text")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError("a number with too many digits")
        return value

    @model_validator(mode="after")
    def _refuse_faults(self) -> Self:
        if found := [*self._faults()]:
            raise ValueError("\n".join(found))
        return self

    def _faults(self) -> Iterator[str]:
        """Yield what is wrong with the mapping as a whole, a line each."""
        yield from ()


def _types_in(annotation: Any) -> set[Any]:
    return {annotation}.union(*(_types_in(a) for a in get_args(annotation))) if get_args(annotation) else {annotation}


def tokens(value: Any) -> Any:
    """Return `25k`, `0.5M` or a number as a number of tokens; anything else unchanged, for pydantic to refuse."""
    if isinstance(value, bool):
        raise ValueError(f"{str(value).lower()} is not a number of tokens; give one, such as 25k")
    if isinstance(value, str) and (parts := re.fullmatch(r"\s*(\d{1,20}(?:\.\d{1,20})?)\s*([kKmM]?)\s*", value)):
        count = Decimal(parts[1]) * {"": 1, "k": 1_000, "m": 1_000_000}[parts[2].lower()]
        return int(count) if count == int(count) else float(count)
    return value


Tokens = Annotated[int, BeforeValidator(tokens), Field(gt=0, le=MAX_COUNT)]


def _unique(values: tuple[Any, ...]) -> tuple[Any, ...]:
    names = [getattr(v, "name", v) for v in values]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]!r} is listed twice")
    return values


Unique = AfterValidator(_unique)
AsList = BeforeValidator(lambda value: value if isinstance(value, (list, tuple)) else [value])


def nearest(word: str, known: Any) -> str:
    """Return `; did you mean …?` with the most similar known word, or nothing."""
    matches = difflib.get_close_matches(word, [str(k) for k in known], n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def faults(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """Return all validation errors of a file against the model `root`, one line each."""
    errors: list[Any] = [e | {"loc": tuple(p for p in e["loc"] if not _is_branch(p))} for e in error.errors()]
    places = [e["loc"] for e in errors if e["loc"][-1:] != ("bool",)]
    # of a key that is a mapping or a boolean, report the mapping's errors only
    errors = [
        e for e in errors if e["loc"][-1:] != ("bool",) or all(p[: len(e["loc"]) - 1] != e["loc"][:-1] for p in places)
    ]
    return [shorten(line) for e in errors for line in _fault(e, root)]


def _is_branch(part: Any) -> bool:
    """Return whether a part of an error's place is pydantic's name for a model in a union, not a key of the file."""
    return isinstance(part, str) and part.startswith("function-") and part.endswith("]")


def _fault(error: Any, root: type[BaseModel]) -> list[str]:
    path = [str(p) for p in error["loc"]]
    where, shown = ".".join(map(_cut, path)), _cut(_text(error["input"]))
    if error["type"] == "extra_forbidden":
        return [f"unknown key {where!r}{_hint(path, root)}"]
    if error["type"] == "missing":
        return [f"{where} is missing"]
    if error["type"] in ("tuple_type", "list_type"):
        return [f"{where}: give a list, such as [{_cut(_text(error['input'], str))}]"]
    if error["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return [f"{where}: give a mapping ({', '.join(_keys_at(path, root)) or 'key: value'}), not {shown}"]
    if error["type"] == "too_short" and error["input"]:
        return []  # the errors of its items are listed
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        prefix = f"{where}: " if where and not message.startswith(where) else ""
        return [prefix + line for line in message.split("\n")]
    return [f"{where}: {message[0].lower() + message[1:]}, not {shown}"]


def _hint(path: list[str], root: type[BaseModel]) -> str:
    """Return where an unknown key may belong: other tools' names first, then similar keys, then its place elsewhere."""
    known, key = _keys_at(path[:-1], root), path[-1]
    if place := getattr(root, "RENAMED", {}).get(key.lower()):
        return f"; did you mean {place!r}?"
    if near := nearest(key, known):
        return near
    places = [place for place in _places(root) if place.rpartition(".")[2] == key]
    if 0 < len(places) <= MAX_PLACES:
        return f"; did you mean {' or '.join(map(repr, places))}?"
    return f" (known here: {', '.join(known)})"


def _places(model: Any, prefix: str = "") -> Iterator[str]:
    """Yield the place of every key of a model and of the mappings in it, such as `optim.lr`."""
    for name, field in model.model_fields.items():
        place = f"{prefix}{field.alias or name}"
        yield place
        if inner := _model_in(field.annotation):
            yield from _places(inner, f"{place}.")


def _text(value: Any, text: Callable[[Any], str] = repr) -> str:
    try:
        return text(value)
    except ValueError:  # Python does not write integers of more than 4,300 digits
        return "a number with too many digits"


def _cut(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


def shorten(fault: str) -> str:
    """Return a fault whose middle is left out if it is long: it begins with its place and ends with its fix."""
    half = MAX_FAULT // 2
    return fault if len(fault) <= MAX_FAULT else f"{fault[:half]} … {fault[-half:]}"


def _keys_at(path: list[str], root: type[BaseModel]) -> list[str]:
    """Return the keys of the mapping at a place in the file."""
    model: Any = root
    for name in path:
        if name.isdigit():
            continue
        field = next((f for k, f in model.model_fields.items() if name in (k, f.alias)), None)
        model = _model_in(field.annotation) if field else None
        if model is None:
            return []
    return [f.alias or k for k, f in model.model_fields.items()]


def _model_in(annotation: Any) -> Any:
    """Return the model inside an annotation such as `tuple[X, ...]` or `X | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for a in get_args(annotation) if (model := _model_in(a))), None)
