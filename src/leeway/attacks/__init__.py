"""Ways to ask a forbidden prompt: one file each, versioned text, a content hash on every row."""

from __future__ import annotations

from leeway.attacks import dan, happy_to_help, none, role_play, wikipedia
from leeway.attacks.attack import Attack, AttackFailed, Conversation, Message, Play, Wrapper
from leeway.attacks.zulu import Translator, Zulu

__all__ = [
    "WRAPPERS",
    "Attack",
    "AttackFailed",
    "Conversation",
    "Message",
    "Play",
    "Translator",
    "Wrapper",
    "Zulu",
]

WRAPPERS: dict[str, Wrapper] = {
    a.name: a for a in (none.attack, dan.attack, happy_to_help.attack, role_play.attack, wikipedia.attack)
}
