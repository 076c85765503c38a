"""What is trained on, as a person can check it in ten seconds: rendered text with the targets marked."""

from __future__ import annotations

from leeway.study.prepare import prepare
from leeway.study.spec import Spec

OPEN, CLOSE = "⟦", "⟧"


def show(spec: Spec, n: int) -> str:
    """The first `n` examples of the first seed's stream under every objective, targets between ⟦ and ⟧."""
    prepared = prepare(spec)
    seed = spec.seeds[0]
    slots = [slot for step in prepared.schedules[next(iter(prepared.objectives)), seed].steps for slot in step][:n]
    lines = [
        f"{spec.name}: the first {len(slots)} of the stream, seed {seed}; targets stand between {OPEN} and {CLOSE}"
    ]
    for alias in prepared.objectives:
        renderer = prepared.renderer(alias, seed)
        chat = renderer.chat
        for slot in slots:
            lines.append(f"\n── {alias} · {slot.example.id}")
            for s in renderer.rendered(slot):
                prompt, answer = (
                    chat.tokenizer.decode(list(part)) for part in (s.ids[: s.target_start], s.ids[s.target_start :])
                )
                lines.append(f"{prompt}{OPEN}{answer}{CLOSE}")
                lines.append(f"   {s.target_start} prompt tokens, {s.targets} target tokens")
    return "\n".join(lines)
