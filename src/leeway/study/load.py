"""Load a study file or a preset, apply overrides and resolve `auto`.

`auto` is the value that the table `auto.yaml` has for the study's model and task. It is resolved before the study is
checked, so a saved study holds the values; `Spec.resolved_defaults` lists them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from ruamel.yaml.error import YAMLError

from leeway.claims.schema import read_source
from leeway.errors import LeewayError, all_faults
from leeway.io import expand, read_utf8
from leeway.yaml_config import dump, faults, nearest, package_data, problem, read
from leeway.yaml_config import load as load_yaml

if TYPE_CHECKING:
    from leeway.study.spec import Spec

PRESETS: dict[str, str] = {
    "demo": "the embedded organism, six objectives, a few minutes on a CPU, no download",
    "real-data": "GSM8K, StrongREJECT and Anthropic's persona statements, on any local or hub model",
    "smollm2": "a real small chat model (leeway fetch smollm2-135m), six objectives on GSM8K, on a CPU",
    "smollm2-quick": "the same in small: four objectives, two budgets, fewer prompts",
    "objective-matters": "the study of arXiv 2601.12639 on Llama-3.1-8B-Instruct; scales down to the organism",
    "ablation-kl": "KL at several weights under both reductions: where it protects, where it stops learning",
    "ablation-orpo": "ORPO at several weights, and its odds ratio alone",
    "full-parameter": "all parameters in place of an adapter, to compare with the same study under LoRA",
    "other-bases": "the six objectives on another base model, one run per model",
}
MAX_LEVELS = 20  # of an override's key; a study file has fewer
FILES = (  # places of paths in a study file; * is any item
    "task.files.*",
    "auxiliary.*",
    "auxiliary.*.file",
    "evals.capability.*.source",
    "evals.capability.*.include_path",
    "evals.jailbreak.file",
    "evals.jailbreak.templates",
    "evals.jailbreak.translator.file",
    "evals.jailbreak.judge.adapter",
    "evals.jailbreak.judge.*.adapter",
    "evals.overrefusal.judge.adapter",
    "controls.file",
    "objectives.*.*.start.adapter",
)
NO_FILES = ("organism",)  # at such a place
AUTO = "auto"
AUTO_KEYS = ("model", "task")  # of a study, that `auto` depends on


def load(name: str, overrides: tuple[str, ...] = ()) -> Spec:
    """Load a study file, or a preset by name."""
    if name in PRESETS:
        return parse(preset_text(name), f"preset {name}", overrides)
    path = expand(name)
    if not path.is_file():
        what = f"{name}: neither a study file nor a preset{nearest(name, PRESETS)}"
        raise LeewayError(what, fix="`leeway studies` lists the presets")
    return parse(read_utf8(path), str(path), overrides, path.parent)


def preset_text(name: str) -> str:
    if name not in PRESETS:
        raise LeewayError(f"no preset {name!r}", fix=f"one of: {', '.join(PRESETS)}")
    return (files("leeway.study") / "presets" / f"{name}.yaml").read_text("utf-8")


def parse(text: str, where: str, overrides: tuple[str, ...] = (), folder: Path | None = None) -> Spec:
    """Return a checked study from YAML and `key=value` overrides; raise one LeewayError that lists all errors.

    A path in the file is relative to `folder`, or, if nothing is there, to the current directory; one in an override to
    the current directory. Overrides of model and task apply before `auto` is resolved, the others after.
    """
    raw = read(text, where)
    if not isinstance(raw, dict):
        raise LeewayError(f"{where}: not a study", fix="start from `leeway studies demo`")
    if folder is not None:
        for place in FILES:
            _resolve_paths(raw, place.split("."), folder)
    keys = [_key(o) for o in overrides]
    if repeated := next((k for k in keys if keys.count(k) > 1), None):
        raise LeewayError(f"override {repeated} is given twice", fix="give it once")
    first = [o for o in overrides if _key(o).partition(".")[0] in AUTO_KEYS]
    rest = [o for o in overrides if o not in first]
    for override in first:
        apply_override(raw, override)
    places = _resolve_auto(raw, where)
    _read_claims(raw, folder)
    for override in rest:
        apply_override(raw, override)
    places = [p for p in places if not any(f"{p}.".startswith(f"{_key(o)}.") for o in rest)]
    places += _resolve_auto(raw, where)
    _read_claims(raw, None)
    values = [f"{place}: {dump(_at(raw, place), flow=True).strip()}" for place in places]
    from leeway.study.objective_spec import WRITTEN  # here, because objectives import torch, which takes seconds
    from leeway.study.spec import Spec

    try:
        return Spec.model_validate(raw, context=WRITTEN).with_resolved_defaults(values)
    except ValidationError as error:
        raise all_faults(where, faults(error, Spec)) from error


@cache
def _auto_table() -> dict[str, list[dict[str, Any]]]:
    table: dict[str, list[dict[str, Any]]] = package_data("leeway.study", "auto.yaml")
    return table


def _resolve_auto(raw: dict[str, Any], where: str) -> list[str]:
    """Replace each `auto` that the table has a place for, and return those places; raise LeewayError for no match."""
    task = raw.get("task")
    facts = {"model": raw.get("model"), "task": task.get("name", "files") if isinstance(task, dict) else task}
    places = []
    for place, parent, key in list(_autos(raw, ())):
        base = next((b for b in _auto_table() if f"{place}.".startswith(f"{b}.")), None)
        if base is None:
            continue  # such as `dtype: auto`, a value of its own
        entry = next((e for e in _auto_table()[base] if all(e.get(f, v) == v for f, v in facts.items())), None)
        if entry is None:
            near = nearest(str(facts["task"]), [e["task"] for e in _auto_table()[base] if "task" in e])
            what = f"{where}: {place}: auto has no value for model {facts['model']} and task {facts['task']}{near}"
            raise LeewayError(what, fix="write the value")
        value = _at(entry["value"], place.removeprefix(base).strip("."))
        if value is not None:
            parent[key] = deepcopy(value)
            places.append(place)
    return places


def _autos(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield (place, mapping, key) of each `auto` in a study's mappings."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        if inner == AUTO:
            yield ".".join([*path, str(key)]), value, key
        else:
            yield from _autos(inner, (*path, str(key)))


def _at(value: Any, place: str) -> Any:
    """Return the value at a place such as `optim.lr`, or None where there is none."""
    for key in place.split(".") if place else ():
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _resolve_paths(value: Any, place: list[str], folder: Path) -> None:
    """Replace the paths at a place by those of files or folders below `folder`, if they are there.

    The new path is relative to the current directory where it lies below, so that a study keeps its hash.
    """
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in [(k, v) for k, v in items if place[0] in ("*", str(k))]:
        if len(place) > 1:
            _resolve_paths(inner, place[1:], folder)
        elif isinstance(inner, str) and inner and inner not in NO_FILES and (found := folder / expand(inner)).exists():
            whole, here = Path(os.path.normpath(found.absolute())), Path.cwd()
            value[key] = str(whole.relative_to(here) if whole.is_relative_to(here) and whole != here else whole)


def _read_claims(raw: dict[str, Any], folder: Path | None) -> None:
    if isinstance(raw.get("claims"), str):
        raw["claims"] = read(*read_source(raw["claims"], folder))


def _key(override: str) -> str:
    return override.partition("=")[0]


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one `key=value` in a mapping read from YAML; dots lead to inner keys. Raises LeewayError."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise LeewayError(f"{override!r} is not an override", fix="write key=value, such as optim.lr=1e-4")
    if key.count(".") >= MAX_LEVELS:
        raise LeewayError(f"override {key[:20]}…: more than {MAX_LEVELS} levels", fix="check its dots")
    mapping: Any = raw
    *above, last = key.split(".")
    for name in above:
        mapping = mapping.setdefault(name, {}) if isinstance(mapping, dict) else None
        if not isinstance(mapping, dict):
            raise LeewayError(f"override {override!r}: {name} holds no keys", fix=f"override {name} as a whole")
    try:
        mapping[last] = load_yaml(value)
    except YAMLError as error:
        raise LeewayError(f"override {override!r}: {problem(error)}", fix="quote or correct its value") from error
