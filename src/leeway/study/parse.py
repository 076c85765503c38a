"""From YAML to a checked study: all faults in one line, an unknown key answered with the nearest known one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from leeway import loader
from leeway.claims import text_of
from leeway.errors import LeewayError
from leeway.faults import faults
from leeway.loader import problem, read
from leeway.part import nearest
from leeway.study import follow
from leeway.study.objective_spec import WRITTEN
from leeway.study.presets import PRESETS, preset_text
from leeway.study.spec import Spec

MAX_LEVELS = 20  # of a key; a study file has fewer


def parse(text: str, where: str, overrides: tuple[str, ...] = (), folder: Path | None = None) -> Spec:
    """A study from YAML and `key=value` overrides; all faults in one LeewayError.

    A path of claims is taken from `folder`, where the study file is; one in an override from where the user is.
    Overrides of model and task come first, since cases are chosen by them; the others change what was chosen.
    """
    raw = read(text, where)
    if not isinstance(raw, dict):
        raise LeewayError(f"{where}: not a study", fix="start from `leeway studies demo`")
    _once(overrides)
    first = tuple(o for o in overrides if follow.chooses(o.partition("=")[0]))
    then = tuple(o for o in overrides if o not in first)
    for override in first:
        _override(raw, override)
    raw, chosen = follow.resolved(raw, where)
    _claims(raw, folder)
    for override in then:
        _override(raw, override)
    raw, late = follow.resolved(raw, where)
    _claims(raw, None)
    try:
        spec = Spec.model_validate(raw, context=WRITTEN)
        return spec.followed_by([*follow.standing(chosen, then, raw), *follow.standing(late, (), raw)])
    except ValidationError as error:
        raise LeewayError(f"{where}: " + "; ".join(faults(error, Spec))) from error


def _claims(raw: dict[str, Any], folder: Path | None) -> None:
    """What a path or a set's name stands for, in its place."""
    if isinstance(raw.get("claims"), str):
        raw["claims"] = read(*text_of(raw["claims"], folder))


def _once(overrides: tuple[str, ...]) -> None:
    """Of two values for one key the first would be dropped without a word."""
    keys = [o.partition("=")[0] for o in overrides]
    if twice := next((k for k in keys if keys.count(k) > 1), None):
        raise LeewayError(f"override {twice} is given twice", fix="give it once")


def _override(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise LeewayError(f"{override!r} is not an override", fix="write key=value, such as optim.lr=1e-4")
    if key.count(".") >= MAX_LEVELS:
        raise LeewayError(f"override {key[:20]}…: more than {MAX_LEVELS} levels", fix="check its dots")
    place: Any = raw
    *above, last = key.split(".")
    for name in above:
        place = place.setdefault(name, {}) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            raise LeewayError(f"override {override!r}: {name} holds no keys", fix=f"override {name} as a whole")
    try:
        place[last] = loader.load(value)
    except (yaml.YAMLError, ValueError) as error:
        raise LeewayError(f"override {override!r}: {problem(error)}", fix="quote or mend its value") from error


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
    return parse(text, str(path), overrides, path.parent)
