"""The eval protocol: items to requests, responses to scores; and the row, one item's result at one checkpoint.

Evals of other packages (entry points `leeway.evals`): axes of measurement beside ours.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from leeway.errors import LeewayError
from leeway.generation.backend import NOT_FINITE, OVERLONG, Backend
from leeway.plugins import NAME, entry_points_of, load_entry_point

NO_ANSWER = "no answer: "
Tick = Callable[[int], None]


def open_question(reason: str | None) -> bool:
    """Whether another try may answer it: an endpoint failed, not a model without numbers or room."""
    return reason is not None and reason.startswith(NO_ANSWER) and not any(f in reason for f in (NOT_FINITE, OVERLONG))


@dataclass(frozen=True)
class Row:
    """One item's result. Unscored rows carry NaN and a reason: a failure is never a 0 or a 1."""

    eval: str
    attack: str
    item_id: str
    cluster: str
    sample: int
    prompt: str
    response: str
    outcome: str | None
    score: float
    unscored_reason: str | None
    judge: str
    judge_raw: str
    template_hash: str
    new_tokens: int

    def __post_init__(self) -> None:
        if math.isnan(self.score) == (self.unscored_reason is None):
            raise ValueError(f"{self.eval} {self.item_id}: a row is either scored or says why it is not")


class Eval(Protocol):
    """One axis of measurement."""

    @property
    def name(self) -> str:
        """The axis: `capability`, `jailbreak`, `persona`."""
        ...

    @property
    def key(self) -> str:
        """The name of this eval's rows among a checkpoint's: unique in a study."""
        ...

    @property
    def hash(self) -> str:
        """Content hash of items, prompts and judge: rows are only pooled under equal ones."""
        ...

    def __len__(self) -> int:
        """How many answers it asks for."""
        ...

    def run(self, backend: Backend, tick: Tick) -> list[Row]:
        """Every item once, in the items' order."""
        ...


@runtime_checkable
class Divisible(Protocol):
    """An eval whose items may be asked a part at a time: what a design that stops early needs."""

    def clusters(self) -> list[str]:
        """The cluster of each item, as its rows name it."""
        ...

    def part(self, clusters: Collection[str]) -> Eval:
        """The same eval of the items of these clusters alone."""
        ...


GROUP = "leeway.evals"
AXES = ("capability", "jailbreak", "overrefusal", "persona", "persona-check", "persona-sd3", "persona-self")
NEEDS = ("name", "key", "hash", "run", "__len__")


def load_eval(name: str, settings: Mapping[str, Any] | None = None) -> Eval:
    """What an installed package's entry point makes when it is called with the settings.

    Raises LeewayError where there is none of this name, it takes no such setting, or it makes no eval of this name.
    """
    found = entry_points_of(GROUP, "eval", AXES)
    if name not in found:
        known = ", ".join(sorted(found)) or "none is installed"
        raise LeewayError(f"evals.further: there is no eval {name!r}", fix=f"one of: {known}")
    make = load_entry_point(found[name], "eval")
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
