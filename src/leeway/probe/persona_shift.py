"""Movement along persona vectors, after training and, from the data alone, before it.

Chen et al. 2025 (arXiv 2507.21509, §2–4): v_ℓ = mean state over the base's answers under system prompts that show a
trait − the same under system prompts that show its opposite. After training: (h_ckpt − h_base) · v̂_ℓ at the last prompt
token of harmless test prompts. Before training: the mean over a training answer's tokens of h_base · v̂_ℓ, minus the
same for the base's own answer to the same prompt: positive data are expected to push the model towards the trait.

The organism knows few words, so its vectors come from statements instead: the base's states at the answer that
endorses a trait minus those at the other answer; as many endorse it with Yes as with No.

Controls: random directions of the same length 1, one for every prompt, and the cosine between vectors of two halves of
the questions.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from leeway.data.chat import Sequence
from leeway.data.types import Example, PersonaItem
from leeway.generation.backend import Request
from leeway.probe.context import BATCH, ProbeContext, Value, random_units, states
from leeway.probe.hooks import Point
from leeway.probe.mediation import StepwiseBackend
from leeway.probe.pair import Side
from leeway.probe.passes import Pass, PromptBatch
from leeway.yaml_config import package_data

ANSWER_TOKENS = 32
ITEMS = 40  # statements of a trait


@dataclass(frozen=True)
class PersonaVectors:
    """One vector per trait and layer, [layers, D] each, at length 1, with their agreement between halves, [layers]."""

    unit_LD: Mapping[str, Tensor]
    halves_L: Mapping[str, Tensor]
    source: str


def vectors(context: ProbeContext, traits: Mapping[str, Seq[PersonaItem]]) -> PersonaVectors:
    """Return the base's persona vectors: from contrasting system prompts, on the organism from statements."""
    known = package_data("leeway.probe", "persona_contrasts.yaml")
    unit_LD, halves_L = dict[str, Tensor](), dict[str, Tensor]()
    organism = bool(context.extras.get("organism"))
    for trait, items in traits.items():
        if not organism and trait not in known["traits"]:
            continue
        pairs = _from_statements(context, items) if organism else _from_system(context, known, trait)
        shows, opposite = pairs  # [answers, layers, D]
        mean_LD = shows.mean(0) - opposite.mean(0)
        unit_LD[trait] = (mean_LD / mean_LD.norm(dim=-1, keepdim=True)).float()
        half = torch.arange(len(shows)) // 2 % 2 == 0  # pairs stay together: Yes- and No-keyed, or two system prompts
        first, second = (shows[h].mean(0) - opposite[h].mean(0) for h in (half, ~half))
        halves_L[trait] = torch.cosine_similarity(first, second, dim=-1)
    return PersonaVectors(unit_LD, halves_L, "statements" if organism else "system prompts")


def measure(context: ProbeContext) -> list[Value]:
    """Return every harmless test prompt's shift along each trait's vector at each layer."""
    own: PersonaVectors | None = context.extras.get("persona")
    if own is None or not own.unit_LD:
        return [Value("persona-shift", reason="no persona vectors: the study measures no trait that has contrasts")]
    prompts = context.prompts.of("test", "harmless")
    moved = states(context, context.pair.checkpoint, prompts) - states(context, context.pair.base, prompts)
    last_LPD = moved[:, :, -1]
    found: list[Value] = []
    for trait, unit_LD in own.unit_LD.items():
        for layer, (change_PD, unit_D) in enumerate(zip(last_LPD, unit_LD, strict=True)):
            along_P = change_PD @ unit_D
            random_PD = random_units(len(unit_D), "persona", layer, prompts=[p.id for p in prompts])
            random_P = (change_PD * random_PD).sum(-1)
            place: dict[str, Any] = {"detail": trait, "layer": layer, "site": "resid", "position": "-1"}
            found += [
                Value("persona-shift", p.id, p.kind, value=float(a), control=float(r), **place)
                for p, a, r in zip(prompts, along_P, random_P, strict=True)
            ]
            agreement = float(own.halves_L[trait][layer])
            found.append(Value("persona-vector-halves", value=agreement, **place))
    return found


def of_data(context: ProbeContext, examples: Seq[Example]) -> list[Value]:
    """Return, before training, each example's projection: its answer's minus that of the base's own answer."""
    own: PersonaVectors | None = context.extras.get("persona")
    if own is None or not own.unit_LD:
        return [Value("persona-data", reason="no persona vectors: the study measures no trait that has contrasts")]
    chat, base = context.pair.base.model.chat, context.pair.base
    given = [chat.sequence(e.prompt, e.preferred) for e in examples]
    asked = [Request([{"role": "user", "content": e.prompt}], ANSWER_TOKENS) for e in examples]
    replies = StepwiseBackend(context.pair, "", of_base=True).complete(asked, lambda *_: None)
    answered = [chat.sequence(e.prompt, r.text or " ") for e, r in zip(examples, replies, strict=True)]
    difference_PLD = _answer_means(base, given) - _answer_means(base, answered)
    found = []
    for trait, unit_LD in own.unit_LD.items():
        for layer, unit_D in enumerate(unit_LD):
            difference_PD = difference_PLD[:, layer].float()
            along_P = difference_PD @ unit_D
            random_PD = random_units(len(unit_D), "persona", layer, prompts=[e.id for e in examples])
            random_P = (difference_PD * random_PD).sum(-1)
            found += [
                Value(
                    "persona-data",
                    e.id,
                    "training",
                    trait,
                    layer,
                    "resid",
                    "answer",
                    value=float(a),
                    control=float(r),
                )
                for e, a, r in zip(examples, along_P, random_P, strict=True)
            ]
    return found


def _from_system(context: ProbeContext, known: Mapping[str, Any], trait: str) -> tuple[Tensor, Tensor]:
    """Return the mean states of the base's answers under both kinds of system prompts, [answers, layers, D] each."""
    base, chat = context.pair.base, context.pair.base.model.chat
    means = []
    for kind in ("shows", "opposite"):
        systems = known["traits"][trait][kind]
        asked = [
            [{"role": "system", "content": system}, {"role": "user", "content": question}]
            for question in known["questions"]
            for system in systems
        ]
        requests = [Request(c, ANSWER_TOKENS) for c in asked]
        replies = StepwiseBackend(context.pair, "", of_base=True).complete(requests, lambda *_: None)
        sequences = []
        for conversation, reply in zip(asked, replies, strict=True):
            prompt = chat.prompt_ids(conversation)
            sequences.append(Sequence(prompt + (chat.ids(reply.text) or chat.ids(" ")), len(prompt)))
        means.append(_answer_means(base, sequences))
    return means[0], means[1]


def _from_statements(context: ProbeContext, items: Seq[PersonaItem]) -> tuple[Tensor, Tensor]:
    chat = context.pair.base.model.chat
    found = []
    for endorses in (True, False):
        sequences = []
        for item in items[:ITEMS]:
            answer = item.match if endorses else {"Yes": "No", "No": "Yes"}[item.match]
            prompt = chat.prompt_ids([{"role": "user", "content": item.question}])
            sequences.append(Sequence(prompt + chat.ids(answer), len(prompt)))
        found.append(_answer_means(context.pair.base, sequences))
    return found[0], found[1]


def _answer_means(side: Side, sequences: Seq[Sequence]) -> Tensor:
    """Return the residual stream after each block, averaged over the answer's tokens, [S, layers, D] float64."""
    layers = len(side.blocks)
    found: list[Tensor | None] = [None] * len(sequences)
    order = sorted(range(len(sequences)), key=lambda i: (len(sequences[i].ids), i))
    points: dict[Point, slice | list[int]] = {(layer, "resid"): slice(None) for layer in range(layers)}
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        batch = PromptBatch.of([sequences[i].ids for i in chosen], None, side.model.device)
        with side.active():
            _, kept = Pass(side.model, side.blocks, batch).whole(record=points)
        for row, i in enumerate(chosen):
            n = sequences[i].targets
            found[i] = torch.stack(
                [kept[k, "resid"][row, batch.width - n :].double().mean(0).cpu() for k in range(layers)]
            )
    return torch.stack([f for f in found if f is not None])
