"""Ways to ask a forbidden prompt: one file each, versioned text, a content hash on every row."""

from __future__ import annotations

from leeway.attacks.attack import Attack, AttackFailed, Conversation, Helper, HelperRequest, Message, Play, Wrapper
from leeway.attacks.base64 import Base64
from leeway.attacks.crescendo import Crescendo, LedCrescendo, Transcript
from leeway.attacks.many_shot import ManyShot
from leeway.attacks.registry import ATTACKS, HELPED, WRAPPERS, load_attack, names, rendered, templates
from leeway.attacks.tool_result import ToolResult
from leeway.attacks.zulu import Passage, Translator, Zulu

__all__ = [
    "ATTACKS",
    "HELPED",
    "WRAPPERS",
    "Attack",
    "AttackFailed",
    "Base64",
    "Conversation",
    "Crescendo",
    "Helper",
    "HelperRequest",
    "LedCrescendo",
    "ManyShot",
    "Message",
    "Passage",
    "Play",
    "ToolResult",
    "Transcript",
    "Translator",
    "Wrapper",
    "Zulu",
    "load_attack",
    "names",
    "rendered",
    "templates",
]
