"""The objectives of a study file: by name, with settings, under an alias, and from where they start."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args, get_type_hints

from pydantic import Field, ValidationInfo, model_validator

from leeway.objectives import Objective, load_objective, names
from leeway.part import Part, nearest
from leeway.study.parts import Tokens

SHARES = ("p", "share")  # settings that are probabilities
WRITTEN = "written"  # the context under which a study file is checked
STAGE = ("start", "reference")  # what says that an objective goes on from elsewhere


class Start(Part):
    """What a trajectory starts from instead of the base model: a saved adapter, or another's checkpoint here."""

    from_: str | None = Field(default=None, alias="from")
    budget: Tokens | None = None
    adapter: str | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Start:
        if (self.adapter is None) == (self.from_ is None):
            raise ValueError("start: give {from: OBJECTIVE, budget: …}, or {adapter: FOLDER}")
        if (self.from_ is None) != (self.budget is None):
            raise ValueError("start: budget goes with from")
        return self


class ObjectiveSpec(Part):
    """An objective under the name it has in this study, with its settings."""

    alias: str
    kind: str
    settings: dict[str, Any] = Field(default={})
    start: Start | None = None
    reference: Literal["start", "base"] = "start"

    def to_plain(self) -> str | dict[str, Any]:
        """As it is written in a study file."""
        if self.alias == self.kind:
            return {self.alias: self.settings} if self.settings else self.alias
        inner: dict[str, Any] = {self.kind: self.settings}
        if self.start:
            inner["start"] = self.start.model_dump(mode="json", by_alias=True, exclude_none=True)
            inner["reference"] = self.reference
        return {self.alias: inner}

    @model_validator(mode="after")
    def _reference_is_a_choice(self) -> ObjectiveSpec:
        if self.reference == "base" and self.start is None:
            raise ValueError("reference: base goes with a start, and without one it is the base anyway; leave it out")
        return self

    @property
    def starts_at(self) -> str:
        """What it starts from and is held against, by name."""
        if self.start is None:
            return "base"
        origin = self.start.adapter or f"{self.start.from_} at {self.start.budget}"
        return f"{origin}, reference: {self.reference}"

    def build(self) -> Objective:
        return load_objective(self.kind)(**self.settings)


def objectives(value: Any, info: ValidationInfo) -> Any:
    """`sft`, `{orpo: {weight: 0.1}}` or an alias `{orpo-0.2: {orpo: {weight: 0.2}}}` to one shape.

    A study that was checked and dumped, as workers get it, has that shape already; a study file may not have it.
    """
    if not isinstance(value, list):
        raise ValueError("give a list, such as [sft, dpo]")
    dumped = info.context != WRITTEN and all(isinstance(v, dict) and {"alias", "kind"} <= v.keys() for v in value)
    return value if dumped else [_objective(v) for v in value]


def _objective(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        return {"alias": value, "kind": _known(value)}
    if isinstance(value, dict) and len(value) > 1 and (kind := next((k for k in value if k in names()), None)):
        _no_stage(kind, value)
    if not (isinstance(value, dict) and len(value) == 1):
        raise ValueError(
            f"{value!r} is not an objective: write sft, {{orpo: {{weight: 0.1}}}} or, under a name of your own, "
            "{my-orpo: {orpo: {weight: 0.1}}}"
        )
    ((alias, inner),) = value.items()
    inner = inner or {}
    known = alias in names()
    if known and isinstance(inner, dict):
        _no_stage(alias, inner)
    if known or not isinstance(inner, dict):
        return {"alias": alias, "kind": _known(alias), "settings": _settings(alias, inner)}
    staged = {k: inner[k] for k in STAGE if k in inner}
    kinds = [k for k in inner if k not in staged]
    if len(kinds) != 1:
        _known(alias)
    kind = _known(kinds[0])
    if "start" in staged and staged["start"] is None:
        raise ValueError(f"{alias}: its start is empty; give {{from: OBJECTIVE, budget: …}} or leave it out")
    return {"alias": alias, "kind": kind, "settings": _settings(kind, inner[kind] or {}), **staged}


def _no_stage(kind: str, given: dict[str, Any]) -> None:
    """A second stage is told from the first by its name."""
    if stage := next((k for k in STAGE if k in given), None):
        raise ValueError(
            f"{kind}: a {stage} needs a name of its own: write {{my-{kind}: {{{kind}: {{}}, {stage}: …}}}}"
        )


def _known(kind: Any) -> str:
    if kind not in (known := names()):
        raise ValueError(f"no objective {kind!r}{nearest(str(kind), known)} (there are: {', '.join(known)})")
    return str(kind)


def _settings(kind: str, given: Any) -> dict[str, Any]:
    made = load_objective(kind)
    fields = [f.name for f in dataclasses.fields(made)]  # type: ignore[arg-type]
    if not isinstance(given, dict):
        raise ValueError(f"{kind}: its settings are a mapping, such as {{{next(iter(fields), 'weight')}: 0.1}}")
    for key, value in ((str(k), v) for k, v in given.items()):
        if key not in fields:
            raise ValueError(
                f"{kind}: no setting {key!r}{nearest(key, fields)} (it has: {', '.join(fields) or 'none'})"
            )
        _check_setting(kind, made, key, value)
    return given


def _check_setting(kind: str, made: Any, key: str, value: Any) -> None:
    """Words where the objective's field takes words; a number of at least 0 (a share: at most 1) otherwise."""
    words = get_args(get_type_hints(made)[key])
    if words:
        if value not in words:
            raise ValueError(f"{kind}: {key} is {value!r}; {' or '.join(map(str, words))}")
    elif (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not 0 <= value < math.inf
        or (key in SHARES and value > 1)
    ):
        most = " and at most 1" if key in SHARES else ""
        raise ValueError(f"{kind}: {key} is {value!r}; a number of at least 0{most}")
