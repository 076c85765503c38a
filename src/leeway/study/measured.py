"""The measures that a study will have, by the names of `leeway.stats`: what its claims may be about."""

from __future__ import annotations

from collections.abc import Iterator

from leeway.study.eval_parts import Evals

NO_ATTACK = "none"


def measured(evals: Evals) -> list[str]:
    """Names, and `name:*` where the parts are known only once the items are read."""
    return list(_measured(evals))


def _measured(evals: Evals) -> Iterator[str]:
    if evals.capability:
        yield from ("accuracy", "accuracy:*")
    if jailbreak := evals.jailbreak:
        if any(a != NO_ATTACK for a in jailbreak.attacks):
            yield "asr"
        yield from (f"asr:{a}" for a in jailbreak.attacks)
        yield from ("refusal", "coherence")
    if evals.overrefusal:
        yield from ("overrefusal", "overrefusal:*", "coherence-benign")
    if persona := evals.persona:
        yield "endorsement"
        yield from (f"endorsement:{t}" for t in persona.traits)
        if persona.sd3:
            yield from ("sd3", "sd3:*")
        if persona.self_report:
            yield from ("self-description", "self-description:*")
