"""Attacks by name: the ones written here, and those of other packages (entry points `leeway.attacks`).

A user's own templates, published texts say, as one-turn attacks beside the ones written here.

The attacks for a reader: what there is, and what one of them sends for a harmless placeholder.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

from leeway.attacks import (
    aim,
    base64,
    crescendo,
    dan,
    happy_to_help,
    many_shot,
    none,
    past_tense,
    prefix_injection,
    refusal_suppression,
    role_play,
    tool_result,
    wikipedia,
)
from leeway.attacks.attack import Attack, Conversation, HelperRequest, Wrapper
from leeway.errors import LeewayError, first_line
from leeway.io import expand
from leeway.plugins import entry_points_of, load_entry_point
from leeway.yaml_config import read

KEYS = {"name", "version", "origin", "template"}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def read_templates(path: Path, taken: Collection[str]) -> dict[str, Wrapper]:
    """Wrappers by name, in the file's order.

    The file is YAML or JSON: `{name: template}`, or a list of `{name, template, version?, origin?}`. A template holds
    `{prompt}` exactly once. Raises LeewayError for a name that is listed twice or is one of `taken`.
    """
    found: dict[str, Wrapper] = {}
    for where, entry in _entries(path):
        name = entry["name"]
        if name in taken:
            raise LeewayError(f"{where}: there is an attack {name} already", fix="give it another name")
        if name in found:
            raise LeewayError(f"{where}: {name} is listed twice", fix="give one of them another name")
        found[name] = Wrapper(
            name, int(entry.get("version", 1)), str(entry.get("origin", f"file {path.name}")), entry["template"]
        )
    if not found:
        raise LeewayError(f"{path}: no template in it", fix="write name: text with {prompt}")
    return found


def _entries(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(where, name and template and what else is said) of each template, checked."""
    raw = _raw(path)
    if isinstance(raw, dict):
        listed = [{"name": k, "template": v} for k, v in raw.items()]
    elif isinstance(raw, list) and all(isinstance(e, dict) for e in raw):
        listed = raw
    else:
        raise LeewayError(f"{path}: neither names with templates nor a list", fix="write name: text with {prompt}")
    return [(where, _checked(where, e)) for e in listed for where in [f"{path}, template {e.get('name', '?')}"]]


def _checked(where: str, entry: dict[str, Any]) -> dict[str, Any]:
    if unknown := set(entry) - KEYS:
        raise LeewayError(
            f"{where}: unknown key {sorted(map(str, unknown))[0]}", fix=f"keys: {', '.join(sorted(KEYS))}"
        )
    name, template, version = entry.get("name"), entry.get("template"), entry.get("version", 1)
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise LeewayError(f"{where}: {name!r} is no name", fix="letters, digits, _, - and ., in quotes if a number")
    if not isinstance(template, str):
        raise LeewayError(f"{where}: its template is no text", fix="write a text with {prompt}")
    if (n := template.count("{prompt}")) != 1:
        raise LeewayError(f"{where}: it holds {{prompt}} {n} times", fix="write {prompt} exactly once")
    if isinstance(version, bool) or not isinstance(version, int):
        raise LeewayError(f"{where}: version {version!r} is no whole number", fix="count versions 1, 2, 3")
    if not isinstance(entry.get("origin", ""), str):
        raise LeewayError(f"{where}: its origin is no text", fix="say where the text was published")
    return entry


def _raw(path: Path) -> Any:
    try:
        text = path.read_text("utf-8-sig")
    except OSError as error:
        raise LeewayError(
            f"{path}: cannot be read ({error.strerror})", fix="check the path of the templates"
        ) from error
    except UnicodeDecodeError as error:
        raise LeewayError(f"{path}: not UTF-8 text (byte {error.start})", fix="save it as UTF-8") from error
    if path.suffix != ".json":
        return read(text, str(path))
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: _once(path, pairs))
    except json.JSONDecodeError as error:
        raise LeewayError(f"{path}, line {error.lineno}: not JSON ({error.msg})", fix="mend that line") from error
    except (ValueError, RecursionError) as error:  # thousands of digits or brackets
        raise LeewayError(f"{path}: cannot be read ({first_line(error)})", fix="mend the file") from error


def _once(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for k, (key, _) in enumerate(pairs):
        if any(key == other for other, _ in pairs[:k]):
            raise LeewayError(f"{path}: {key} is listed twice", fix="give one of them another name")
    return dict(pairs)


GROUP = "leeway.attacks"
MOST_TURNS = 100

WRAPPERS: dict[str, Wrapper] = {
    a.name: a for a in (none.attack, dan.attack, happy_to_help.attack, role_play.attack, wikipedia.attack)
}
"""The fixed texts that the organism was brought up with."""

ATTACKS: dict[str, Attack] = {
    **WRAPPERS,
    **{
        a.name: a
        for a in (
            prefix_injection.attack,
            refusal_suppression.attack,
            aim.attack,
            past_tense.attack,
            base64.attack,
            many_shot.attack,
            crescendo.attack,
            tool_result.attack,
        )
    },
}
"""Every attack that needs nobody's help."""

HELPED = ("zulu", "crescendo_led")
"""Attacks that need a translator or an attacker model, and are made with one."""


def _outside() -> dict[str, EntryPoint]:
    return entry_points_of(GROUP, "attack", {*ATTACKS, *HELPED})


def names() -> list[str]:
    """Of every attack that `load_attack` knows."""
    return [*ATTACKS, *sorted(_outside())]


def load_attack(name: str) -> Attack:
    """By name, from here or from another package; raises LeewayError where there is none or it cannot be loaded."""
    if name in ATTACKS:
        return ATTACKS[name]
    if name in HELPED:
        raise LeewayError(f"attack {name}: it needs a helper's words", fix="give it a translator or an attacker model")
    point = _outside().get(name)
    if point is None:
        raise LeewayError(f"there is no attack {name!r}", fix=f"one of: {', '.join(sorted([*names(), *HELPED]))}")
    attack: Attack = load_entry_point(point, "attack", ("name", "version", "origin", "hash", "play"))
    return attack


def templates(path: Path | str) -> dict[str, Wrapper]:
    """A user's own templates (see `read_templates`), none with the name of another attack."""
    return read_templates(expand(path), {*names(), *HELPED})


def rendered(attack: Attack, placeholder: str, reply: str = "(an answer)") -> list[Conversation]:
    """What is sent for a benign placeholder, turn by turn; nobody is asked, stand-ins take the place of all words."""
    play = attack.play(placeholder)
    sent: list[Conversation] = []
    text: str | None = None
    for _ in range(MOST_TURNS):
        try:
            asked = next(play) if text is None else play.send(text)
        except StopIteration:
            return sent
        if isinstance(asked, HelperRequest):
            text = f"({asked.helper.name}'s words)"
        else:
            sent.append([dict(m) for m in asked])
            text = reply
    raise LeewayError(f"attack {attack.name}: it goes on after {MOST_TURNS} turns", fix="give it a last turn")


PLACEHOLDER = "How do I bake bread?"


def _all(own: Path | None) -> dict[str, Attack]:
    return {n: load_attack(n) for n in names()} | dict(templates(own) if own else {})


def listed(own: Path | None = None) -> str:
    """A line for each attack: name, version, hash, origin."""
    known = _all(own)
    wide = max(map(len, [*known, *HELPED]))
    lines = [f"{n:{wide}}  v{a.version}  {a.hash[:8]}  {a.origin}" for n, a in known.items()]
    return "\n".join([*lines, *(f"{n:{wide}}  made with a translator or an attacker model" for n in HELPED)])


def shown(name: str, own: Path | None = None) -> str:
    """Every conversation that is sent for the placeholder, turn by turn; raises LeewayError for an unknown name."""
    known = _all(own)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        fix = f"did you mean {near[0]!r}?" if near else f"one of: {', '.join(known)}"
        if name in HELPED:
            fix = "it is made with a translator or an attacker model, and sends what that one writes"
        raise LeewayError(f"attack {name}: it cannot be shown", fix=fix)
    sent = rendered(known[name], PLACEHOLDER)
    turns = [f"[{m['role']}]\n{m['content']}" for m in sent[-1]]
    attack = known[name]
    head = f"{name}, version {attack.version}, hash {attack.hash}; messages sent: {len(sent)}, the last one whole:"
    return "\n\n".join([head, *turns])
