"""Contexts of a probe built by hand, and the refusal logit by enumeration: a plain forward pass per opening's token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from leeway.model import adapters
from leeway.model.load import Model, load_model
from leeway.organism import world
from leeway.probe.context import ProbeContext
from leeway.probe.pair import ModelPair
from leeway.probe.prompts import Positions, ProbePrompt, PromptSets, harmful_prompts, harmless_prompts, split_prompts
from leeway.probe.refusal_logit import OpeningTree

OPENINGS = ("Sorry", "I cannot", "It is", "Yes", "no")  # of a few tokens each in the tiny models
TEXTS = (
    "How many apples are there?",
    "3 + 4?",
    "Help.",
    "The answer is 7, and how many apples are there? 3 + 4 = 7. The answer is 12. Yes no? " * 2,
    "no",
    "How are 12 apples 7?",
    "Yes Yes",
    "I cannot help. Sorry, how many?",
)


def tiny_prompts() -> PromptSets:
    """Eight harmful and eight harmless prompts of very different lengths; nothing in them is either."""
    kinds = [ProbePrompt(f"{kind}/{i}", f"{kind[-2:]} {t}", kind, str(i % 2)) for kind in KINDS for i, t in TEXTS_BY_ID]
    return PromptSets({split: tuple(kinds) for split in ("direction", "selection", "test")}, {})


KINDS = ("harmful", "harmless")
TEXTS_BY_ID = tuple(enumerate(TEXTS))


def tiny_context(pair: ModelPair) -> ProbeContext:
    chat = pair.checkpoint.model.chat
    return ProbeContext(pair, tiny_prompts(), OpeningTree.of(chat, OPENINGS), Positions.of(chat))


def adapted(folder: Path, kind: adapters.Kind, seed: int = 0, size: float = 0.5) -> Model:
    """Load a model with an adapter whose every value differs from its start; `full` moves every weight."""
    model = load_model(str(folder), device="cpu", dtype="float32")
    adapters.attach(model, adapters.AdapterSettings(4, 8, 0.1, "all-linear", kind), seed=0)
    drawn = torch.Generator().manual_seed(seed)
    for p in adapters.trainable(model):
        spread = float(p.data.std()) if p.data.any() else 0.5  # LoRA's second matrix starts at 0
        p.data += size * spread * torch.randn(p.shape, generator=drawn)
    model.lm.requires_grad_(False)
    return model


def organism_context(checkpoint: Model, base: Model | None = None, *, count: int = 16) -> ProbeContext:
    """Return a context on the organism's prompts; directions are for the caller to compute."""
    harmful, harmless = harmful_prompts("organism", None)[0], harmless_prompts("organism")[0]
    tested = [p.id for p in world.forbidden_prompts(100)]
    sets = split_prompts(harmful, harmless, tested, {}, count=count, selection=8)
    pair = ModelPair.of(checkpoint, base)
    chat = checkpoint.chat
    return ProbeContext(pair, sets, OpeningTree.of(chat), Positions.of(chat))


@torch.no_grad()
def enumerated_logit(model: Model, tree: OpeningTree, ids: Sequence[int]) -> float:
    """Return the refusal logit by forward passes without padding, tree, hooks or cache."""
    logp = []
    for node in tree.nodes:
        scores_V = model.lm(torch.tensor([[*ids, *node]])).logits[0, -1].double()
        scores_V[list(model.head.blocked)] = -torch.inf
        logp.append(scores_V.log_softmax(0))
    paths = [sum(float(logp[tree.steps[k][0]][tree.steps[k][1]]) for k in path) for path in tree.paths]
    p = float(torch.tensor(paths, dtype=torch.float64).exp().sum())
    return float(torch.logit(torch.tensor(p, dtype=torch.float64)))
