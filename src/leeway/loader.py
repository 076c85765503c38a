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


def problem(error: Exception) -> str:
    """What is wrong with a text, in a line."""
    said = " ".join(str(getattr(error, "problem", None) or error).split())
    return said if isinstance(error, RepeatedError) else f"not YAML ({said})"


def read(text: str, where: str) -> Any:
    """What a YAML text holds; raises LeewayError with the line at fault."""
    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError) as error:  # a ValueError: a date that does not exist, an endless number
        mark = getattr(error, "problem_mark", None)
        at = f", line {mark.line + 1}" if mark else ""
        raise LeewayError(f"{where}{at}: {problem(error)}", fix="mend that line") from error
