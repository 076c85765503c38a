"""What is trained on, as a person can check it in ten seconds: rendered text with the targets marked."""

from __future__ import annotations

from leeway.study.prepare import chat_for, prepare
from leeway.study.spec import Spec
from leeway.training.trajectory import render

OPEN, CLOSE = "⟦", "⟧"


def show(spec: Spec, n: int) -> str:
    """The first `n` examples of the first seed's stream under every objective, targets between ⟦ and ⟧."""
    prepared = prepare(spec)
    seed = spec.seeds[0]
    slots = [slot for step in prepared.schedules[seed].steps for slot in step][:n]
    lines = [
        f"{spec.name}: the first {len(slots)} of the stream, seed {seed}; targets stand between {OPEN} and {CLOSE}"
    ]
    for alias, objective in prepared.objectives.items():
        chat = chat_for(prepared.chat, objective)
        for slot in slots:
            lines.append(f"\n── {alias} · {slot.example.id}")
            for s in render(objective, chat, slot, seed):
                prompt, answer = (
                    chat.tokenizer.decode(list(part)) for part in (s.ids[: s.target_start], s.ids[s.target_start :])
                )
                lines.append(f"{prompt}{OPEN}{answer}{CLOSE}")
                lines.append(f"   {s.target_start} prompt tokens, {s.targets} target tokens")
    return "\n".join(lines)
