"""Evals of other packages (entry points `leeway.evals`): axes of measurement beside ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from leeway.errors import LeewayError
from leeway.evals.eval import Eval
from leeway.outside import NAME, loaded, points

GROUP = "leeway.evals"
AXES = ("capability", "jailbreak", "overrefusal", "persona", "persona-check", "persona-sd3", "persona-self")
NEEDS = ("name", "key", "hash", "run", "__len__")


def load_eval(name: str, settings: Mapping[str, Any] | None = None) -> Eval:
    """What an installed package's entry point makes when it is called with the settings.

    Raises LeewayError where there is none of this name, it takes no such setting, or it makes no eval of this name.
    """
    found = points(GROUP, "eval", AXES)
    if name not in found:
        known = ", ".join(sorted(found)) or "none is installed"
        raise LeewayError(f"evals.further: there is no eval {name!r}", fix=f"one of: {known}")
    make = loaded(found[name], "eval")
    try:
        made: Eval = make(**(settings or {}))
    except (TypeError, ValueError) as error:
        raise LeewayError(f"evals.further: {name}: {error}", fix="see that package for its settings") from error
    lacks = [a for a in NEEDS if not hasattr(made, a)]
    if lacks or made.name != name or not re.fullmatch(NAME, made.key):
        why = f"no {', '.join(lacks)}" if lacks else f"its name is {made.name!r}, its key {made.key!r}"
        raise LeewayError(
            f"evals.further: {name}: {found[name].value} makes no eval of this name ({why})",
            fix="let it make an object with name, key, hash, run and a length, both names in lower case",
        )
    return made
