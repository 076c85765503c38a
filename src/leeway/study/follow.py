"""`by-model` and `by-task`: what of a study follows from its model or task, written out in the study file itself.

    pairs: {by-task: {organism: {from: dataset}, else: {from: unsafe}}}

One case is taken before anything is checked; what the study is then made of, and is saved as, is that case alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from leeway.errors import LeewayError
from leeway.part import nearest

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
            held = yaml.safe_dump(_at(raw, place), default_flow_style=True, sort_keys=False, width=2**31)
            yield f"{place} ({cases}): {held.removesuffix('...' + chr(10)).strip()}"


def _at(value: Any, place: str) -> Any:
    for key in place.split("."):
        value = value[int(key)] if isinstance(value, list) else value[key]
    return value
