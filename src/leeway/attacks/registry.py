"""Attacks by name: built-in ones, those of other packages (entry points `leeway.attacks`) and a user's templates."""

from __future__ import annotations

import re
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

from leeway import yaml_config
from leeway.attacks.attack import Attack, Conversation, HelperRequest, Wrapper
from leeway.attacks.best_of_n import BestOfN
from leeway.attacks.built_in import Base64, Crescendo, ManyShot, ToolResult
from leeway.attacks.prefill import PREFILLS
from leeway.data.readers import read_json
from leeway.errors import LeewayError
from leeway.io import expand, read_utf8
from leeway.plugins import entry_points_of, load_entry_point

GROUP = "leeway.attacks"
MAX_TURNS = 100
PLACEHOLDER = "How do I bake bread?"
TEMPLATE_KEYS = {"name", "version", "origin", "template"}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")

TEMPLATES = tuple(Wrapper(**entry) for entry in yaml_config.package_data("leeway.attacks", "templates.yaml"))
WRAPPERS: dict[str, Wrapper] = {a.name: a for a in TEMPLATES[:5]}  # those in the organism's training data
_BUILT_IN: tuple[Attack, ...] = (*TEMPLATES, Base64(), ManyShot(), Crescendo(), ToolResult(), *PREFILLS, BestOfN())
ATTACKS = {a.name: a for a in _BUILT_IN}  # every built-in attack that needs no helper
NEEDS_HELPER = ("zulu", "crescendo_led")  # constructed with a translator or an attacker model


def attack_names() -> list[str]:
    """Return the name of every attack that `load_attack` can load."""
    return [*ATTACKS, *sorted(_plugins())]


def load_attack(name: str) -> Attack:
    """Return a built-in attack or one of another package. Raises LeewayError if it is unknown or cannot be loaded."""
    if name in ATTACKS:
        return ATTACKS[name]
    if name in NEEDS_HELPER:
        raise LeewayError(f"attack {name}: it needs a helper model", fix="give it a translator or an attacker model")
    if (point := _plugins().get(name)) is None:
        known = ", ".join(sorted([*attack_names(), *NEEDS_HELPER]))
        raise LeewayError(f"unknown attack {name!r}", fix=f"one of: {known}")
    attack: Attack = load_entry_point(point, "attack", ("name", "version", "origin", "hash", "play"))
    return attack


def _plugins() -> dict[str, EntryPoint]:
    return entry_points_of(GROUP, "attack", {*ATTACKS, *NEEDS_HELPER})


def load_templates(path: Path | str) -> dict[str, Wrapper]:
    """Load a user's templates as one-turn attacks, by name in the file's order.

    The file is YAML or JSON: `{name: template}`, or a list of `{name, template, version?, origin?}`. A template holds
    `{prompt}` exactly once. Raises LeewayError for a name that occurs twice or that another attack has.
    """
    path = expand(path)
    taken = {*attack_names(), *NEEDS_HELPER}
    wrappers: dict[str, Wrapper] = {}
    for entry in _read_entries(path):
        where = f"{path}, template {entry.get('name', '?')}"
        wrapper = _wrapper(entry, where, f"file {path.name}")
        if wrapper.name in taken:
            raise LeewayError(f"{where}: an attack {wrapper.name} exists already", fix="give it another name")
        if wrapper.name in wrappers:
            raise LeewayError(f"{where}: {wrapper.name!r} is given twice", fix="give one of them another name")
        wrappers[wrapper.name] = wrapper
    if not wrappers:
        raise LeewayError(f"{path}: no templates", fix="write name: text with {prompt}")
    return wrappers


def _read_entries(path: Path) -> list[dict[Any, Any]]:
    try:
        text = read_utf8(path, "utf-8-sig")
    except OSError as error:
        what = f"{path}: cannot be read ({error.strerror})"
        raise LeewayError(what, fix="check the path of the templates") from error
    raw = read_json(path, text) if path.suffix == ".json" else yaml_config.read(text, str(path))
    if isinstance(raw, dict):
        return [{"name": k, "template": v} for k, v in raw.items()]
    if isinstance(raw, list) and all(isinstance(e, dict) for e in raw):
        return raw
    raise LeewayError(f"{path}: neither a mapping of templates nor a list", fix="write name: text with {prompt}")


def _wrapper(entry: dict[Any, Any], where: str, default_origin: str) -> Wrapper:
    if unknown := set(entry) - TEMPLATE_KEYS:
        fix = f"keys: {', '.join(sorted(TEMPLATE_KEYS))}"
        raise LeewayError(f"{where}: unknown key {min(map(str, unknown))}", fix=fix)
    name, template = entry.get("name"), entry.get("template")
    version, origin = entry.get("version", 1), entry.get("origin", default_origin)
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise LeewayError(f"{where}: {name!r} is not a name", fix="letters, digits, _, - and ., in quotes if a number")
    if not isinstance(template, str):
        raise LeewayError(f"{where}: its template is not a text", fix="write a text with {prompt}")
    if (n := template.count("{prompt}")) != 1:
        raise LeewayError(f"{where}: {{prompt}} occurs {n} times", fix="write {prompt} exactly once")
    if isinstance(version, bool) or not isinstance(version, int):
        raise LeewayError(f"{where}: version {version!r} is not a whole number", fix="count versions 1, 2, 3")
    if not isinstance(origin, str):
        raise LeewayError(f"{where}: its origin is not a text", fix="write where the text was published")
    return Wrapper(name, version, origin, template)


def render(attack: Attack, placeholder: str, reply: str = "(an answer)") -> list[Conversation]:
    """Return every conversation that an attack sends for `placeholder`, with stand-ins for all replies."""
    play = attack.play(placeholder)
    sent: list[Conversation] = []
    text: str | None = None
    for _ in range(MAX_TURNS):
        try:
            step = next(play) if text is None else play.send(text)
        except StopIteration:
            return sent
        if isinstance(step, HelperRequest):
            text = f"({step.helper.name}'s words)"
        else:
            sent.append([dict(m) for m in step])
            text = reply
    raise LeewayError(f"attack {attack.name}: more than {MAX_TURNS} turns", fix="let it end")


def list_attacks(templates: Path | None = None) -> str:
    """Return a line per attack: name, version, hash, origin."""
    known = _all_attacks(templates)
    width = max(map(len, [*known, *NEEDS_HELPER]))
    lines = [f"{n:{width}}  v{a.version}  {a.hash[:8]}  {a.origin}" for n, a in known.items()]
    return "\n".join([*lines, *(f"{n:{width}}  needs a translator or an attacker model" for n in NEEDS_HELPER)])


def show_attack(name: str, templates: Path | None = None) -> str:
    """Return what an attack sends for PLACEHOLDER, turn by turn. Raises LeewayError for an unknown name."""
    known = _all_attacks(templates)
    if name not in known:
        fix = yaml_config.nearest(name, known).removeprefix("; ") or f"one of: {', '.join(known)}"
        if name in NEEDS_HELPER:
            fix = "a translator or an attacker model writes its messages"
        raise LeewayError(f"attack {name}: it cannot be shown", fix=fix)
    attack = known[name]
    sent = render(attack, PLACEHOLDER)
    head = f"{name}, version {attack.version}, hash {attack.hash}; messages sent: {len(sent)}, the last in full:"
    return "\n\n".join([head, *(f"[{m['role']}]\n{m['content']}" for m in sent[-1])])


def _all_attacks(templates: Path | None) -> dict[str, Attack]:
    return {n: load_attack(n) for n in attack_names()} | dict(load_templates(templates) if templates else {})
