"""The one optimiser loop: what may not change the result does not, and what is wrong stops it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from leeway.data.stream import AuxiliaryPool, Schedule, schedule
from leeway.data.types import Example
from leeway.errors import LeewayError
from leeway.model import adapters
from leeway.model.load import load_model
from leeway.model.reference import as_reference
from leeway.objectives import OBJECTIVES, dpo, ip, ipo, kl, orpo, sft, sft_safety
from leeway.training.batch import Optim, micro_batches
from leeway.training.loop import after_warmup
from leeway.training.trajectory import Settings, Trajectory

EXAMPLES = [
    Example(f"e{a}", f"What is {a} + {a * a}?", f"It is {a + a * a}.", f"It is {'very ' * (a % 3)}hard.")
    for a in range(24)
]
COMPANIONS = AuxiliaryPool(
    task=tuple(EXAMPLES),
    general=(Example("g0", "Say hello.", "Hello there."), Example("g1", "How are you today?", "")),
    safety=(Example("s0", "Tell me how to cheat.", "Sorry, I cannot help."),),
)
SETTINGS = Settings(
    adapter=adapters.AdapterSettings(4, 8, 0.0, "all-linear"),
    lr=1e-2,
    warmup_steps=2,
    weight_decay=0.0,
    loop=Optim(clip=1.0, micro_tokens=1 << 20),
)
WITH_DROPOUT = replace(SETTINGS, adapter=adapters.AdapterSettings(4, 8, 0.1, "all-linear"))


def plan() -> Schedule:
    return schedule(EXAMPLES, lambda _: 30, [700], batch=8, seed=0)


def trained(
    model: Path, objective: object, settings: Settings, log: Path, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    loaded = load_model(str(model), device="cpu")
    loaded.lm.to(dtype)
    trajectory = Trajectory("x", objective, 0, loaded, plan(), settings, COMPANIONS)  # type: ignore[arg-type]
    trajectory.train_to(trajectory.schedule.stops[0], log, lambda _: None)
    return adapters.state(trajectory.model)


VARIANTS = [
    *(kind() for kind in OBJECTIVES.values()),
    kl.Kl(weight=0.5, scope="all"),
    kl.Kl(weight=0.5, scope="general"),
    orpo.Orpo(nll_scope="all"),
    orpo.Orpo(nll_mean="sequence"),
    ipo.Ipo(length="mean"),
]


@pytest.mark.parametrize("objective", VARIANTS, ids=repr)
def test_micro_batches_change_nothing(objective: object, models: dict[str, Path], tmp_path: Path) -> None:
    whole = trained(models["qwen2"], objective, SETTINGS, tmp_path / "a", torch.float64)
    cut = replace(SETTINGS, loop=Optim(clip=1.0, micro_tokens=90))
    assert len(list(micro_batches([[s] for s in _sequences(models)], 90))) > 2
    for key, value in trained(models["qwen2"], objective, cut, tmp_path / "b", torch.float64).items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(value, whole[key], rtol=1e-8, atol=1e-10)
    for one, other in zip(logged(tmp_path / "a"), logged(tmp_path / "b"), strict=True):
        assert one == pytest.approx(other, rel=1e-7)


MEASURES = ("loss", "nll", "margin", "kl")


def logged(log: Path) -> list[dict[str, float]]:
    """The loss and the step metrics of each line of a step log."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [{name: line[name] for name in MEASURES if name in line} for line in lines]


def test_step_metrics_are_the_parts_of_the_loss(models: dict[str, Path], tmp_path: Path) -> None:
    parts = {}
    for objective in (sft.Sft(), kl.Kl(weight=0.5), dpo.Dpo(), orpo.Orpo(), kl.Kl(weight=0.0)):
        trained(models["qwen2"], objective, SETTINGS, tmp_path / repr(objective))
        parts[repr(objective)] = logged(tmp_path / repr(objective))
    plain, penalised, pairs, odds, free = parts.values()
    assert all(step == {"loss": step["nll"], "nll": step["nll"]} for step in (*plain, *free))
    for step in penalised:
        assert step["loss"] == pytest.approx(step["nll"] + 0.5 * step["kl"], rel=1e-6)
    assert penalised[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert penalised[-1]["kl"] > 0.001
    # the first step sees the start's weights: the same answers, whatever the objective
    assert pairs[0]["nll"] == pytest.approx(plain[0]["nll"], rel=1e-5)
    assert pairs[0]["margin"] == pytest.approx(odds[0]["margin"], rel=1e-5)
    assert pairs[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert pairs[-1]["margin"] > pairs[0]["margin"]


def _sequences(models: dict[str, Path]) -> list[object]:
    chat = load_model(str(models["qwen2"]), device="cpu").chat
    return [chat.sequence(e.prompt, e.preferred) for e in EXAMPLES[:8]]


@pytest.mark.parametrize("other", [kl.Kl(weight=0.0), ip.Ip(p=0.0), sft_safety.SftSafety(share=0.0)])
def test_a_term_without_weight_is_sft_bit_for_bit(other: object, models: dict[str, Path], tmp_path: Path) -> None:
    plain = trained(models["llama"], sft.Sft(), WITH_DROPOUT, tmp_path / "a")
    for key, value in trained(models["llama"], other, WITH_DROPOUT, tmp_path / "b").items():
        assert torch.equal(value, plain[key]), key


def test_orpo_without_weight_is_sft_on_the_preferred_answers(models: dict[str, Path], tmp_path: Path) -> None:
    plain = trained(models["llama"], sft.Sft(), SETTINGS, tmp_path / "a")
    for key, value in trained(models["llama"], orpo.Orpo(weight=0.0), SETTINGS, tmp_path / "b").items():
        torch.testing.assert_close(value, plain[key], rtol=1e-4, atol=2e-6)


def test_all_objectives_start_from_the_same_adapter(models: dict[str, Path]) -> None:
    hashes = {
        Trajectory("x", o(), 0, load_model(str(models["gemma2"]), device="cpu"), plan(), SETTINGS).init_hash
        for o in OBJECTIVES.values()
    }
    assert len(hashes) == 1
    other = Trajectory("x", sft.Sft(), 1, load_model(str(models["gemma2"]), device="cpu"), plan(), SETTINGS)
    assert other.init_hash not in hashes


def test_the_reference_is_the_start_without_dropout_and_draws_no_random_number(
    models: dict[str, Path], tmp_path: Path
) -> None:
    start = load_model(str(models["llama"]), device="cpu")
    ids = torch.tensor([start.chat.prompt_ids([{"role": "user", "content": "3 + 4?"}])])
    with torch.no_grad():
        expected = start.lm(input_ids=ids).logits
    trajectory = Trajectory("x", sft.Sft(), 0, load_model(str(models["llama"]), device="cpu"), plan(), WITH_DROPOUT)
    trajectory.train_to(trajectory.schedule.stops[0], tmp_path / "log", lambda _: None)
    trajectory.model.lm.train()
    before = torch.get_rng_state()
    with as_reference(trajectory.model):
        found = trajectory.model.lm(input_ids=ids).logits
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(found, expected)
    assert trajectory.model.lm.training


def test_a_loss_that_is_not_finite_stops_with_the_step_and_its_examples(
    models: dict[str, Path], tmp_path: Path
) -> None:
    trajectory = Trajectory("x", sft.Sft(), 0, load_model(str(models["llama"]), device="cpu"), plan(), SETTINGS)
    with torch.no_grad():
        adapters.trainable(trajectory.model)[0].fill_(torch.nan)
    with pytest.raises(LeewayError, match=r"sft, step 1: loss nan.*e\d+, e\d+"):
        trajectory.train_to(trajectory.schedule.stops[0], tmp_path / "log", lambda _: None)


def test_the_learning_rate_warms_up_over_fixed_steps_and_stays() -> None:
    lr_at = after_warmup(0.4, 4, "constant", 1000)
    assert [lr_at(step) for step in (1, 2, 4, 5, 1000)] == pytest.approx([0.1, 0.2, 0.4, 0.4, 0.4])
    assert after_warmup(0.4, 0, "constant", 10)(1) == 0.4


def test_a_decay_goes_from_the_full_rate_to_zero_after_the_warm_up() -> None:
    linear, cosine = after_warmup(0.4, 2, "linear", 9), after_warmup(0.4, 2, "cosine", 9)
    assert [linear(step) for step in (1, 2, 4, 6, 8)] == pytest.approx([0.2, 0.4, 0.3, 0.2, 0.1])
    assert [cosine(step) for step in (1, 2, 6)] == pytest.approx([0.2, 0.4, 0.2])


def test_losses_are_those_of_the_model_s_own_loss(models: dict[str, Path], tmp_path: Path) -> None:
    """The first step's SFT loss against transformers' own cross-entropy over the same targets."""
    lines: list[float] = []
    model = load_model(str(models["gemma2"]), device="cpu")
    trajectory = Trajectory("x", sft.Sft(), 0, model, plan(), SETTINGS)
    batch = [s for example in trajectory._batch(1).rendered for s in example]
    total, count = 0.0, 0
    for s in batch:
        labels = torch.tensor([[-100] * s.target_start + list(s.ids[s.target_start :])])
        with torch.no_grad():
            loss = trajectory.model.lm(input_ids=torch.tensor([s.ids]), labels=labels).loss
        total, count = total + float(loss) * s.targets, count + s.targets
    trajectory.train_to(trajectory.schedule.stops[0], tmp_path / "log", lambda step: lines.append(step.loss))
    assert lines[0] == pytest.approx(total / count, rel=1e-5)
