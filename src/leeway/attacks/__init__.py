"""Jailbreak attacks, with versioned texts and a content hash on every row."""

from leeway.attacks.attack import (
    Attack,
    AttackFailed,
    Conversation,
    DrawnAttack,
    Helper,
    HelperRequest,
    Message,
    Play,
    Wrapper,
)
from leeway.attacks.best_of_n import BestOfN
from leeway.attacks.built_in import Base64, Crescendo, LedCrescendo, ManyShot, Passage, ToolResult, Transcript, Zulu
from leeway.attacks.prefill import Prefill
from leeway.attacks.registry import ATTACKS, NEEDS_HELPER, WRAPPERS, attack_names, load_attack, load_templates, render

__all__ = ["ATTACKS", "NEEDS_HELPER", "WRAPPERS", "attack_names", "load_attack", "load_templates", "render"]
__all__ += ["Attack", "AttackFailed", "Conversation", "Helper", "HelperRequest", "Message", "Passage", "Play"]
__all__ += ["Base64", "BestOfN", "Crescendo", "DrawnAttack", "LedCrescendo", "ManyShot", "Prefill", "ToolResult"]
__all__ += ["Transcript", "Wrapper", "Zulu"]
