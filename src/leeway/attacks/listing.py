"""The attacks for a reader: what there is, and what one of them sends for a harmless placeholder."""

from __future__ import annotations

import difflib
from pathlib import Path

from leeway.attacks.attack import Attack
from leeway.attacks.registry import HELPED, load_attack, names, rendered, templates
from leeway.errors import LeewayError

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
