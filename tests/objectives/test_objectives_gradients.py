"""Gradients of every objective against finite differences in float64: its pure loss, and the whole of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from handmade import EXAMPLES, gradient_error, world
from torch import Tensor

from leeway.data.chat import Chat
from leeway.objectives import OBJECTIVES, Objective, dpo, ipo, kl, kto, orpo, sft, sft_safety, simpo

BOUND = 1e-9
WHOLE: list[tuple[Objective, float]] = [  # with what the objective's own pass over the batch found
    *((kind(), 0.0) for kind in OBJECTIVES.values()),
    (dpo.Dpo(beta=0.5, nll=0.7), 0.0),
    (ipo.Ipo(beta=0.5, length="mean"), 0.0),
    (simpo.Simpo(beta=3.0, gamma=1.0, nll=0.5), 0.0),
    (kto.Kto(beta=0.5, desirable=1.5, undesirable=0.5), 0.8),
    (kto.Kto(beta=0.5), -0.8),
    (orpo.Orpo(weight=0.5, nll_scope="all"), 0.0),
    (orpo.Orpo(weight=0.5, nll_mean="sequence"), 0.0),
    (orpo.Orpo(weight=0.5, nll_scope="all", nll_mean="sequence"), 0.0),
    (orpo.Orpo(weight=0.5, nll=0.0), 0.0),
    (kl.Kl(weight=0.5), 0.0),
    (kl.Kl(weight=0.5, direction="forward"), 0.0),
    (kl.Kl(weight=0.5, scope="all"), 0.0),
    (kl.Kl(weight=0.5, scope="all", direction="forward"), 0.0),
    (kl.Kl(weight=0.5, scope="general"), 0.0),
    (sft_safety.SftSafety(share=1.0), 0.0),
]

REF = torch.tensor([[-4.0, -2.5], [-3.5, -5.0]], dtype=torch.float64)
PURE: dict[str, Callable[[Tensor], Tensor]] = {  # of a [2, 2] tensor: two numbers of each of two pairs
    "dpo": lambda x: dpo.loss(*x, *REF, beta=0.3).sum(),
    "ipo": lambda x: ipo.loss(*x, *REF, beta=0.3).sum(),
    "simpo": lambda x: simpo.loss(*x, beta=2.0, gamma=0.4).sum(),
    "kto": lambda x: kto.loss(*(x - REF), z0=0.2, beta=0.3, weights=(1.5, 0.5)).sum(),
    "orpo": lambda x: orpo.loss(*x).sum(),
    "kl": lambda x: kl.loss(x[0], x[1].exp(), weight=0.3).sum(),
}


@pytest.mark.parametrize("name", PURE)
def test_the_gradient_of_a_pure_loss_by_finite_differences(
    name: str, record_property: Callable[[str, object], None]
) -> None:
    x = torch.tensor([[-3.1, -2.2], [-4.3, -0.7]], dtype=torch.float64)
    error = gradient_error(PURE[name], x)
    record_property("measured", f"gradient of {name}.loss against finite differences: {error:.1e} ({BOUND:.0e})")
    assert error < BOUND


@pytest.mark.parametrize(("objective", "baseline"), WHOLE, ids=repr)
def test_the_gradient_of_a_whole_objective_by_finite_differences(
    objective: Objective, baseline: float, tiny_chat: Chat, record_property: Callable[[str, object], None]
) -> None:
    w = world(objective, tiny_chat, baseline=baseline)
    error = gradient_error(w.loss, w.hidden_TD)
    record_property("measured", f"gradient of {objective!r} against finite differences: {error:.1e} ({BOUND:.0e})")
    assert error < BOUND


def gradient(objective: Objective, chat: Chat, *, at_reference: bool = False) -> tuple[Tensor, Tensor]:
    """(loss, its gradient for the hidden states)."""
    w = world(objective, chat)
    at = (w.reference_TD if at_reference else w.hidden_TD).clone().requires_grad_()
    loss = w.loss(at)
    (found,) = torch.autograd.grad(loss, at)
    return loss.detach(), found


def test_kl_without_weight_is_sft_bit_for_bit_in_value_and_gradient(tiny_chat: Chat) -> None:
    for a, b in zip(gradient(kl.Kl(weight=0.0), tiny_chat), gradient(sft.Sft(), tiny_chat), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_at_the_reference_a_kl_adds_nothing_in_value_or_gradient(direction: str, tiny_chat: Chat) -> None:
    heavy = kl.Kl(weight=1000.0, direction=direction)  # type: ignore[arg-type]
    for a, b in zip(
        gradient(heavy, tiny_chat, at_reference=True),
        gradient(kl.Kl(weight=0.0), tiny_chat, at_reference=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
    assert not torch.allclose(gradient(heavy, tiny_chat)[0], gradient(sft.Sft(), tiny_chat)[0])


def test_the_two_directions_of_a_kl_differ(tiny_chat: Chat) -> None:
    reverse, forward = (gradient(kl.Kl(weight=1.0, direction=t), tiny_chat) for t in ("reverse", "forward"))  # type: ignore[arg-type]
    assert not torch.allclose(reverse[0], forward[0])
    assert not torch.allclose(reverse[1], forward[1])


def test_where_a_kl_is_taken_its_gradient_falls(tiny_chat: Chat) -> None:
    """What is only measured is moved by a KL, and by nothing where that has no weight; targets are learned anyway."""
    for over in ("all", "general"):
        batch = world(kl.Kl(scope=over), tiny_chat).batch  # type: ignore[arg-type]
        assert batch.target_T is not None
        moved = gradient(kl.Kl(weight=1.0, scope=over), tiny_chat)[1].abs().sum(-1) > 0  # type: ignore[arg-type]
        unmoved = gradient(kl.Kl(weight=0.0, scope=over), tiny_chat)[1].abs().sum(-1) > 0  # type: ignore[arg-type]
        assert moved.all()
        assert torch.equal(unmoved, batch.target_T)


def test_orpos_odds_ratio_stays_on_answers_where_its_nll_runs_over_prompts(tiny_chat: Chat) -> None:
    target_T = world(orpo.Orpo(nll_scope="all"), tiny_chat).batch.target_T
    assert target_T is not None
    assert (gradient(orpo.Orpo(nll_scope="all"), tiny_chat)[1].abs().sum(-1) > 0).all()
    only_odds = gradient(orpo.Orpo(nll_scope="all", nll=0.0), tiny_chat)[1].abs().sum(-1) > 0
    assert torch.equal(only_odds, target_T)


@pytest.mark.parametrize("objective", [dpo.Dpo(beta=0.7), simpo.Simpo(gamma=0.0)], ids=repr)
def test_a_swapped_pair_negates_the_margin_from_rendering_to_loss(objective: Objective, tiny_chat: Chat) -> None:
    """The loss of one pair is softplus(-margin), its states those of the same tokens either way round."""
    example = EXAMPLES[1]
    there = world(objective, tiny_chat, examples=[example])
    turned = replace(example, preferred=example.dispreferred or "", dispreferred=example.preferred)
    back = world(objective, tiny_chat, examples=[turned])
    first = there.batch.sequence_T == 0
    order = torch.cat([(~first).nonzero(), first.nonzero()])[:, 0]
    assert torch.equal(back.batch.measured_T, there.batch.measured_T[order])
    back = replace(back, reference_TD=there.reference_TD[order])
    losses = there.loss(there.hidden_TD).item(), back.loss(there.hidden_TD[order]).item()
    margins = [-math.log(math.expm1(loss)) for loss in losses]
    assert margins[0] == pytest.approx(-margins[1], rel=1e-9)
    assert abs(margins[0]) > 0.1
