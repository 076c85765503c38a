"""The `objectives:` list of a study file: names, settings, aliases and second stages."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_type_hints

from pydantic import Field, ValidationInfo

from leeway.io import expand
from leeway.model import adapters
from leeway.objectives import Objective, load_objective, names
from leeway.yaml_config import MAX_FLOAT32, ConfigModel, Tokens, nearest

ALIAS = re.compile(r"[a-z0-9][a-z0-9._-]*")
MAX_ALIAS = 64  # characters: it is part of file names
PROBABILITIES = ("p", "share")  # settings that are at most 1
WRITTEN = "written"  # the validation context of a file that a person wrote
STAGE_KEYS = ("start", "reference")  # of an objective that is a second stage


class StartSpec(ConfigModel):
    """What a trajectory starts from instead of the base model: a checkpoint of this study, or a saved adapter."""

    from_: str | None = Field(default=None, alias="from")
    budget: Tokens | None = None
    adapter: str | None = None

    def _faults(self) -> Iterator[str]:
        if (self.adapter is None) == (self.from_ is None):
            yield "start: give {from: OBJECTIVE, budget: …}, or {adapter: FOLDER}"
        elif (self.from_ is None) != (self.budget is None):
            yield "start: from and budget need each other"


class ObjectiveSpec(ConfigModel):
    """An objective with its settings, under its name in this study."""

    alias: str
    kind: str
    settings: dict[str, Any] = Field(default={})
    start: StartSpec | None = None
    reference: Literal["start", "base"] = "start"

    def _faults(self) -> Iterator[str]:
        if self.reference == "base" and self.start is None:
            yield "reference: base needs a start; without one the reference is the base; leave it out"

    @property
    def starts_at(self) -> str:
        """Return where it starts and what its reference is, as text."""
        if self.start is None:
            return "base"
        origin = self.start.adapter or f"{self.start.from_} at {self.start.budget}"
        return f"{origin}, reference: {self.reference}"

    def build(self) -> Objective:
        return load_objective(self.kind)(**self.settings)

    def to_plain(self) -> str | dict[str, Any]:
        """Return the objective as a study file has it."""
        if self.alias == self.kind:
            return {self.alias: self.settings} if self.settings else self.alias
        inner: dict[str, Any] = {self.kind: self.settings}
        if self.start:
            inner["start"] = self.start.model_dump(mode="json", by_alias=True, exclude_none=True)
            inner["reference"] = self.reference
        return {self.alias: inner}


def parse_objectives(value: Any, info: ValidationInfo) -> Any:
    """Bring `sft`, `{orpo: {weight: 0.1}}` and `{my-orpo: {orpo: {weight: 0.2}}}` into one shape.

    A study that was checked and dumped, as workers get it, has that shape already; a study file must not.
    """
    if not isinstance(value, list):
        raise ValueError("give a list, such as [sft, dpo]")
    dumped = info.context != WRITTEN and all(isinstance(v, dict) and {"alias", "kind"} <= v.keys() for v in value)
    return value if dumped else [_parse_objective(v) for v in value]


def _parse_objective(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        return {"alias": value, "kind": _known_kind(value)}
    if isinstance(value, dict) and len(value) > 1 and (kind := next((k for k in value if k in names()), None)):
        _refuse_stage(kind, value)
    if not (isinstance(value, dict) and len(value) == 1):
        raise ValueError(
            f"{value!r} is not an objective: write sft, {{orpo: {{weight: 0.1}}}} or, under a name of your own, "
            "{my-orpo: {orpo: {weight: 0.1}}}"
        )
    ((alias, inner),) = value.items()
    inner = inner or {}
    known = alias in names()
    if known and isinstance(inner, dict):
        _refuse_stage(alias, inner)
    if known or not isinstance(inner, dict):
        return {"alias": alias, "kind": _known_kind(alias), "settings": _settings(alias, inner)}
    stage = {k: inner[k] for k in STAGE_KEYS if k in inner}
    kinds = [k for k in inner if k not in stage]
    if len(kinds) != 1:
        _known_kind(alias)
    kind = _known_kind(kinds[0])
    if "start" in stage and stage["start"] is None:
        raise ValueError(f"{alias}: its start is empty; give {{from: OBJECTIVE, budget: …}} or leave it out")
    return {"alias": alias, "kind": kind, "settings": _settings(kind, inner[kind] or {}), **stage}


def _refuse_stage(kind: str, given: dict[str, Any]) -> None:
    """Raise where a second stage has no alias: its name would be the first stage's."""
    if key := next((k for k in STAGE_KEYS if k in given), None):
        raise ValueError(f"{kind}: a {key} needs a name of its own: write {{my-{kind}: {{{kind}: {{}}, {key}: …}}}}")


def _known_kind(kind: Any) -> str:
    if kind not in (known := names()):
        raise ValueError(f"no objective {kind!r}{nearest(str(kind), known)} (there are: {', '.join(known)})")
    return str(kind)


def _settings(kind: str, given: Any) -> dict[str, Any]:
    objective = load_objective(kind)
    known = [f.name for f in dataclasses.fields(objective)]  # type: ignore[arg-type]
    if not isinstance(given, dict):
        raise ValueError(f"{kind}: its settings are a mapping, such as {{{next(iter(known), 'weight')}: 0.1}}")
    for key, value in ((str(k), v) for k, v in given.items()):
        if key not in known:
            raise ValueError(f"{kind}: no setting {key!r}{nearest(key, known)} (it has: {', '.join(known) or 'none'})")
        _check_setting(kind, objective, key, value)
    return given


def _check_setting(kind: str, objective: Any, key: str, value: Any) -> None:
    """Require one of the words of a Literal field, else a number of at least 0 (a probability: at most 1)."""
    words = get_args(get_type_hints(objective)[key])
    if words:
        if value not in words:
            raise ValueError(f"{kind}: {key} is {value!r}; {' or '.join(map(str, words))}")
        return
    number, is_probability = isinstance(value, (int, float)) and not isinstance(value, bool), key in PROBABILITIES
    if not (number and 0 <= value <= MAX_FLOAT32) or (is_probability and value > 1):
        most = " and at most 1" if is_probability else ""
        raise ValueError(f"{kind}: {key} is {value!r}; a number of at least 0{most}")


def check_aliases(objectives: tuple[ObjectiveSpec, ...]) -> tuple[ObjectiveSpec, ...]:
    aliases = [o.alias for o in objectives]
    repeated = sorted({a for a in aliases if aliases.count(a) > 1})
    faults = [f"{a!r} is listed twice; give one an alias" for a in repeated]
    faults += [f"{a!r} is the base model's name" for a in aliases if a == "base"]
    faults += [f"alias {a!r} must be lower-case letters, digits, . _ -" for a in aliases if not ALIAS.fullmatch(a)]
    faults += [f"alias {a!r} has {len(a)} characters; at most {MAX_ALIAS}" for a in aliases if len(a) > MAX_ALIAS]
    if faults:
        raise ValueError("\n".join(faults))
    return objectives


def start_faults(objectives: tuple[ObjectiveSpec, ...], budgets: tuple[int, ...], *, full: bool) -> Iterator[str]:
    """Yield what is wrong with the starts: missing ones, and ones that do not have the parameters to train.

    Control tokens are new rows of the embedding, so a stage must have those of its start. `full`: all weights train.
    """
    control: dict[str, tuple[str, ...]] = {}  # of the objectives listed before
    for o in objectives:
        own = o.build().control_tokens
        if o.start and o.start.adapter is not None:
            yield from _adapter_faults(o.alias, o.start.adapter, own, full=full)
        elif o.start:
            origin = str(o.start.from_)
            if origin not in control:
                yield f"{o.alias}: start.from {origin!r} is not listed before it{nearest(origin, control)}"
            if o.start.budget not in budgets:
                yield f"{o.alias}: start.budget {o.start.budget} is not among the budgets {list(budgets)}"
            if own != control.get(origin, own):
                yield _control_fault(o.alias, origin, own)
        control[o.alias] = own


def _adapter_faults(alias: str, name: str, control: tuple[str, ...], *, full: bool) -> Iterator[str]:
    folder, where = expand(name), f"{alias}: start.adapter {name!r}"
    if not (name.strip() and folder.is_dir()):
        yield f"{where} is not a folder: give the folder of a saved adapter"
        return
    config = folder / adapters.CONFIG
    is_adapter = config.is_file()
    if not (is_adapter and (folder / adapters.WEIGHTS).is_file()) and not any(folder.glob("model*.safetensors")):
        yield f"{where} holds no weights: give the folder of a saved adapter"
    elif is_adapter == full:
        kinds = ("an adapter", "whole weights") if full else ("whole weights", "an adapter")
        yield f"{where} holds {kinds[0]}, and {kinds[1]} would be trained"
    if is_adapter and not full:
        try:
            trained = bool(json.loads(config.read_text("utf-8")).get("trainable_token_indices"))
        except (OSError, ValueError, AttributeError, RecursionError):
            yield f"{where}: its {adapters.CONFIG} is damaged"
        else:
            if trained != bool(control):
                yield _control_fault(alias, name, control)


def _control_fault(alias: str, start: str, control: tuple[str, ...]) -> str:
    has = "no" if control else "trained"
    fix = "the base model or from cft" if control else "the base model or from an objective without them"
    return f"{alias}: its start {start!r} has {has} control tokens; start it from {fix}"
