"""The learning check of one checkpoint: likelihoods and KL against plain logits, and the change in weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from leeway.data.types import Example
from leeway.model import adapters
from leeway.model.adapters import AdapterSettings
from leeway.model.forward import layout_of
from leeway.model.load import Model, SharedBaseModel, load_model
from leeway.training.batch import Optim
from leeway.training.learning import LearningItems, base_stats, measure

TASK = tuple(Example(f"t{a}", f"{a} + 4?", f"It is {a + 4}.", f"{'Very ' * a}hard.") for a in range(3))
ITEMS = LearningItems(TASK, (Example("g0", "Hi?", "Hello there."),))
SETTINGS = AdapterSettings(4, 8, 0.1, "all-linear")
PREFIX = "Be brief. "


def trained(model: Model, kind: str, tokens: tuple[str, ...] = ()) -> None:
    """Attach an adapter and move it, as training would."""
    adapters.attach(model, AdapterSettings(**{**SETTINGS.__dict__, "kind": kind}), seed=0, control_tokens=tokens)
    generator = torch.Generator().manual_seed(1)
    for p in adapters.trainable(model):
        p.data += 0.05 * torch.randn(p.shape, generator=generator)


def optim(model: Model, kind: str) -> Optim:
    return Optim(1.0, 64, layout=layout_of("auto", model, kind))


@torch.no_grad()
def logprobs(model: Model, prompt: str, answer: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (log-probabilities at the answer's tokens [M, V], their ids [M]), by the model's own forward pass."""
    s = model.chat.with_prefix(PREFIX).sequence(prompt, answer)
    logits = model.lm(input_ids=torch.tensor([s.ids])).logits[0].double()
    return logits[s.start - 1 : -1].log_softmax(-1), torch.tensor(s.ids[s.start :])


def nll(model: Model, prompt: str, answer: str) -> float:
    logp_MV, ids_M = logprobs(model, prompt, answer)
    return -float(logp_MV.gather(-1, ids_M[:, None]).mean())


@pytest.mark.parametrize(
    ("arch", "kind"), [("llama", "lora"), ("qwen2", "rslora"), ("llama", "dora"), ("qwen2", "full"), ("gemma2", "lora")]
)
def test_likelihoods_and_kl_are_those_of_plain_logits(models: dict[str, Path], arch: str, kind: str) -> None:
    shared = SharedBaseModel(load_model(str(models[arch]), device="cpu"), trained=kind == "full")
    model = shared.checkout()
    base = base_stats(model, ITEMS, PREFIX, optim(model, kind), whole=kind == "full")
    texts = [(e.prompt, e.preferred) for e in (*ITEMS.task, *ITEMS.general)]
    reference = [logprobs(model, *text)[0] for text in texts]
    base_nll = [nll(model, *text) for text in texts]
    model = shared.checkout()
    trained(model, kind)
    found = measure(model, base, ITEMS, PREFIX, optim(model, kind))
    assert [r["prompts"] for r in found] == ["task"] * 3 + ["general"]
    for k, (record, text) in enumerate(zip(found, texts, strict=True)):
        ours_MV = logprobs(model, *text)[0]
        kl = float((ours_MV.exp() * (ours_MV - reference[k])).sum(-1).mean())
        assert kl > 1e-4
        assert record["kl"] == pytest.approx(kl, rel=1e-3)
        assert record["nll"] == pytest.approx(nll(model, *text), rel=1e-5)
        assert record["base_nll"] == pytest.approx(base_nll[k], rel=1e-5)
    for record, e in zip(found, TASK, strict=False):
        assert record["rejected_nll"] == pytest.approx(nll(model, e.prompt, str(e.dispreferred)), rel=1e-5)
    assert "rejected_nll" not in found[3]


def test_an_untrained_adapter_is_the_base(models: dict[str, Path]) -> None:
    shared = SharedBaseModel(load_model(str(models["llama"]), device="cpu"))
    model = shared.checkout()
    base = base_stats(model, ITEMS, "", optim(model, "lora"), whole=False)
    model = shared.checkout()
    adapters.attach(model, SETTINGS, seed=0, control_tokens=("<SAFE>",))
    for record in measure(model, base, ITEMS, "", optim(model, "lora")):
        assert record["kl"] < 1e-8
        assert record["nll"] == pytest.approx(record["base_nll"], abs=1e-6)
    assert adapters.relative_change(model, {}) == 0.0


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "full"])
def test_change_in_weights_is_that_of_the_merged_model(models: dict[str, Path], kind: str) -> None:
    shared = SharedBaseModel(load_model(str(models["llama"]), device="cpu"), trained=kind == "full")
    before = {n: p.clone() for n, p in shared.checkout().lm.named_parameters()}
    model = shared.checkout()
    trained(model, kind, ("<SAFE>",) if kind == "full" else ())
    found = adapters.relative_change(model, shared.originals)
    lm = model.lm if kind == "full" else model.lm.merge_and_unload()
    matrices = [
        (before[n], p.detach()[: len(before[n])])
        for n, p in lm.named_parameters()
        if p.dim() == 2 and (kind == "full" or ("embed" not in n and "lm_head" not in n))
    ]
    moved = sum(float((after - base).square().sum()) for base, after in matrices)
    assert found == pytest.approx((moved / sum(float(base.square().sum()) for base, _ in matrices)) ** 0.5, rel=1e-4)
