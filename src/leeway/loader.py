"""How every YAML file that people write is read: floats as in YAML 1.2, no key twice, a fault in one line."""

from __future__ import annotations

import re
from typing import Any

import yaml

from leeway.errors import LeewayError

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
