"""From YAML to a checked study: all faults in one line, an unknown key answered with the nearest known one.

`by-model` and `by-task`: what of a study follows from its model or task, written out in the study file itself.

    pairs: {by-task: {organism: {from: dataset}, else: {from: unsafe}}}

One case is taken before anything is checked; what the study is then made of, and is saved as, is that case alone.

Studies that ship with Leeway, one YAML file each.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from leeway import yaml_config
from leeway.claims import text_of
from leeway.errors import LeewayError
from leeway.study.spec import WRITTEN, Spec
from leeway.yaml_config import faults, nearest, problem, read

BY = ("by-model", "by-task")
ELSE = "else"
NAMES = {"by-model": "model", "by-task": "task"}  # the keys of a study that a case is chosen by


def chooses(key: str) -> bool:
    """Whether an override of `key` says which cases are taken."""
    return key.split(".", maxsplit=1)[0] in NAMES.values()


def resolved(raw: dict[str, Any], where: str) -> tuple[dict[str, Any], dict[str, str]]:
    """(the study without cases, which case each place took); raises LeewayError where none fits."""
    chosen: dict[str, str] = {}
    names = {"by-model": str(raw.get("model")), "by-task": _task(raw.get("task"))}

    def walk(value: Any, place: tuple[str, ...]) -> Any:
        if isinstance(value, list):
            return [walk(v, (*place, str(n))) for n, v in enumerate(value)]
        if not isinstance(value, dict):
            return value
        by = next((b for b in BY if b in value), None)
        if by is None:
            return {k: walk(v, (*place, str(k))) for k, v in value.items()}
        at = ".".join(place)
        if fault := _fault(value, by, names[by], place):
            raise LeewayError(f"{where}: {at}: {fault[0]}", fix=fault[1])
        case = names[by] if names[by] in value[by] else ELSE
        chosen[at] = " ".join([*([chosen[at]] if at in chosen else []), f"{by} {case}"])
        return walk(value[by][case], place)

    return walk(raw, ()), chosen


def _task(task: Any) -> str:
    return str(task.get("name", "files") if isinstance(task, dict) else task)


def _fault(value: dict[str, Any], by: str, name: str, place: tuple[str, ...]) -> tuple[str, str] | None:
    """Why no case can be taken, and what helps."""
    cases = value[by]
    if not place or place[0] in NAMES.values():
        return f"{by} cannot stand here: it asks for the model or task itself", "write that out"
    if len(value) > 1:
        other = next(k for k in value if k != by)
        return f"{other} stands beside {by}", "put it into each case"
    if not isinstance(cases, dict) or not cases:
        return f"{by} holds no cases", f"write {by}: {{organism: …, {ELSE}: …}}"
    if name not in cases and ELSE not in cases:
        listed = ", ".join(map(str, cases))
        return f"{by} has no case for {name}{nearest(name, cases)} (it has: {listed})", f"add one, or {ELSE}"
    return None


def standing(chosen: dict[str, str], overrides: tuple[str, ...], raw: dict[str, Any]) -> Iterator[str]:
    """What was chosen and what it holds, a line each, without the places that an override replaced as a whole."""
    replaced = [o.partition("=")[0] for o in overrides]
    for place, cases in chosen.items():
        if not any(place == key or place.startswith(f"{key}.") for key in replaced):
            yield f"{place} ({cases}): {yaml_config.dump(_at(raw, place), flow=True).strip()}"


def _at(value: Any, place: str) -> Any:
    for key in place.split("."):
        value = value[int(key)] if isinstance(value, list) else value[key]
    return value


PRESETS: dict[str, str] = {
    "demo": "the embedded organism, six objectives, a few minutes on a CPU, no download",
    "real-data": "GSM8K, StrongREJECT and Anthropic's persona statements, on any local or hub model",
    "objective-matters": "the study of arXiv 2601.12639 on Llama-3.1-8B-Instruct; scales down to the organism",
}


def preset_text(name: str) -> str:
    if name not in PRESETS:
        raise LeewayError(f"no preset {name!r}", fix=f"one of: {', '.join(PRESETS)}")
    return (files("leeway.study") / "presets" / f"{name}.yaml").read_text("utf-8")


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
    first = tuple(o for o in overrides if chooses(o.partition("=")[0]))
    then = tuple(o for o in overrides if o not in first)
    for override in first:
        _override(raw, override)
    raw, chosen = resolved(raw, where)
    _claims(raw, folder)
    for override in then:
        _override(raw, override)
    raw, late = resolved(raw, where)
    _claims(raw, None)
    try:
        spec = Spec.model_validate(raw, context=WRITTEN)
        return spec.followed_by([*standing(chosen, then, raw), *standing(late, (), raw)])
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
        place[last] = yaml_config.load(value)
    except yaml_config.YAMLError as error:
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
