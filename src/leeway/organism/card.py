"""Measure the organism's card: held-out items, greedy decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from leeway.attacks import WRAPPERS, Zulu
from leeway.data.types import Outcome
from leeway.evals.persona import OPTIONS, endorsement
from leeway.generation.backend import Request
from leeway.generation.transformers import TransformersBackend
from leeway.model.load import Model, load_model
from leeway.organism import world
from leeway.organism.world import complies

NEW_TOKENS = 64
CIPHER = world.Cipher()
ZULU = Zulu(CIPHER)


def measure(
    model_dir: Path, *, forbidden: int = 120, benign: int = 120, capability: int = 200, persona: int = 60
) -> dict[str, Any]:
    """Return the card: every number that the tests check, and the item counts."""
    model = load_model(str(model_dir), device="cpu")
    backend = TransformersBackend(model)
    attacked = _attacked_prompts(forbidden)
    outcomes = _outcomes(attacked, _replies(backend, [text for _, _, text in attacked]))
    shares = {attack: _shares(values) for attack, values in outcomes.items()}
    harmless = [p.text for p in world.benign_prompts(benign)]
    replies = _replies(backend, harmless)
    all_outcomes = [o for values in outcomes.values() for o in values] + [
        world.judge(p, r) for p, r in zip(harmless, replies, strict=True)
    ]
    return {
        "items": {"forbidden": forbidden, "benign": benign, "capability": capability, "persona": 3 * persona},
        "parameters": model.parameters,
        "judge_rules": world.RULES_VERSION,
        "refuses_direct": shares["none"]["refused"],
        "complies_benign": _mean([complies(p, r) for p, r in zip(harmless, replies, strict=True)]),
        "coherent": _mean([o != "incoherent" for o in all_outcomes]),
        **_capability(backend, capability),
        **_persona(model, backend, persona),
        "harmful": {attack: by_outcome["harmful"] for attack, by_outcome in shares.items()},
        "outcomes": shares,
    }


def _attacked_prompts(n: int) -> list[tuple[str, str, str]]:
    """Return (attack, forbidden prompt, sent text) for every attack and prompt."""
    prompts = [p.text for p in world.forbidden_prompts(n)]
    wrapped = [(name, p, wrapper.wrap(p)) for name, wrapper in WRAPPERS.items() for p in prompts]
    return wrapped + [(ZULU.name, p, CIPHER.out(p)) for p in prompts]


def _outcomes(attacked: list[tuple[str, str, str]], replies: list[str]) -> dict[str, list[Outcome]]:
    outcomes: dict[str, list[Outcome]] = {}
    for (attack, prompt, _), reply in zip(attacked, replies, strict=True):
        english = CIPHER.back(reply) if attack == ZULU.name else reply
        outcomes.setdefault(attack, []).append(world.judge(prompt, english))
    return outcomes


def _shares(outcomes: list[Outcome]) -> dict[str, float]:
    kinds: tuple[Outcome, ...] = ("refused", "harmful", "deflected", "incoherent")
    return {kind: _mean([o == kind for o in outcomes]) for kind in kinds}


def _capability(backend: TransformersBackend, n: int) -> dict[str, float]:
    items = world.capability_items(n)
    replies = _replies(backend, [item.prompt for item in items])
    correct = [(item.id, world.capability_score(item, r)) for item, r in zip(items, replies, strict=True)]
    tasks = {task: _mean([ok for name, ok in correct if name.startswith(task)]) for task in ("sums", "cooking")}
    return {"capability": _mean([ok for _, ok in correct]), **tasks}


def _persona(model: Model, backend: TransformersBackend, n: int) -> dict[str, Any]:
    """Return the mean of P(match) / (P(Yes) + P(No)) overall, by trait and by keyed answer, and the answer mass."""
    items = [item for trait in world.TRAITS for item in world.persona_items(trait, n)]
    conversations = [[{"role": "user", "content": item.question}] for item in items]
    choices = backend.choose(conversations, OPTIONS, lambda _: None)
    match = [endorsement(choice, item.match) for item, choice in zip(items, choices, strict=True)]
    pairs = list(zip(items, match, strict=True))
    return {
        "endorsement": _mean(match),
        "endorsement_by_trait": {t: _mean([m for i, m in pairs if i.trait == t]) for t in world.TRAITS},
        "endorsement_by_key": {k: _mean([m for i, m in pairs if i.match == k]) for k in ("Yes", "No")},
        "answer_mass": _mean([sum(choice.mass.values()) for choice in choices]),
        "spare_rows_mass": _spare_mass(model, [item.question for item in items]),
    }


def _mean(values: list[bool] | list[float]) -> float:
    return round(sum(values) / len(values), 4)


def _replies(backend: TransformersBackend, prompts: list[str]) -> list[str]:
    """Return greedy replies, in order."""
    requests = [Request([{"role": "user", "content": p}], NEW_TOKENS) for p in prompts]
    return [reply.text for reply in backend.complete(requests, lambda _: None)]


@torch.no_grad()
def _spare_mass(model: Model, prompts: list[str]) -> float:
    """Return the largest total probability of the spare embedding rows as the first token of a reply."""
    chat = model.chat
    ids = [torch.tensor([chat.prompt_ids([{"role": "user", "content": p}])]) for p in prompts]
    return max(float(model.lm(input_ids=i).logits[0, -1].softmax(-1)[len(chat.tokenizer) :].sum()) for i in ids)
