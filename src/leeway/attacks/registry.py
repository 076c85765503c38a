"""Attacks by name: the ones written here, and those of other packages (entry points `leeway.attacks`)."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path

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
from leeway.attacks.attack import Aside, Attack, Conversation, Wrapper
from leeway.attacks.files import read_templates
from leeway.errors import LeewayError
from leeway.outside import loaded, points
from leeway.paths import expand

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
    return points(GROUP, "attack", {*ATTACKS, *HELPED})


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
    attack: Attack = loaded(point, "attack", ("name", "version", "origin", "hash", "play"))
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
        if isinstance(asked, Aside):
            text = f"({asked.helper.name}'s words)"
        else:
            sent.append([dict(m) for m in asked])
            text = reply
    raise LeewayError(f"attack {attack.name}: it goes on after {MOST_TURNS} turns", fix="give it a last turn")
