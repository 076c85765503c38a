"""The streamed head against the plain way: values, gradients, soft-capping, blocked ids, chunks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from leeway.model import token_stats as head_module
from leeway.model.token_stats import Head, token_logps, token_logps_and_kl


def gradients_are_right(f: Callable[..., Any], *inputs: Tensor) -> bool:
    """Compare autograd with differences along one random direction of all inputs and outputs.

    A wrong entry anywhere changes that projection; every entry on its own costs twenty times as much.
    """
    return torch.autograd.gradcheck(f, inputs, fast_mode=True)


def inputs(vocabulary: int = 11, tokens: int = 7, width: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    make = {"generator": g, "dtype": torch.float64}
    hidden = torch.randn(tokens, width, **make).requires_grad_()
    return (
        hidden,
        torch.randn(vocabulary, width, **make),
        torch.randint(vocabulary, (tokens,), generator=g),
        torch.randn(tokens, width, **make),
    )


@pytest.fixture(params=[(1, 4), (3, 3), (1000, 1000)])
def chunk(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of so many tokens, blocks of so many words."""
    tokens, words = request.param
    monkeypatch.setattr(head_module, "ROWS", tokens)
    monkeypatch.setattr(head_module, "BLOCK_ELEMENTS", tokens * words)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.usefixtures("chunk")
def test_log_probabilities_are_those_of_a_plain_softmax(softcap: float | None) -> None:
    hidden, weight, targets, _ = inputs()
    logits = hidden @ weight.T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    plain = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(token_logps(hidden, targets, Head(weight, softcap)), plain)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.usefixtures("chunk")
def test_kl_is_the_full_vocabulary_divergence(direction: Any) -> None:
    hidden, weight, targets, reference = inputs()
    _, found = token_logps_and_kl(hidden, targets, Head(weight), reference, direction)
    policy = torch.distributions.Categorical(logits=hidden @ weight.T)
    ref = torch.distributions.Categorical(logits=reference @ weight.T)
    a, b = (policy, ref) if direction == "reverse" else (ref, policy)
    torch.testing.assert_close(found, torch.distributions.kl_divergence(a, b))


def test_the_two_directions_are_told_apart() -> None:
    hidden, weight, targets, reference = inputs()
    both = [token_logps_and_kl(hidden, targets, Head(weight), reference, d)[1] for d in ("reverse", "forward")]
    assert not torch.allclose(*both)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_kl_is_zero_in_value_and_gradient_at_equality(direction: Any) -> None:
    hidden, weight, targets, _ = inputs()
    _, divergence = token_logps_and_kl(hidden, targets, Head(weight), hidden, direction)
    divergence.sum().backward()
    assert hidden.grad is not None
    torch.testing.assert_close(divergence, torch.zeros_like(divergence), atol=1e-12, rtol=0)
    torch.testing.assert_close(hidden.grad, torch.zeros_like(hidden.grad), atol=1e-12, rtol=0)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.usefixtures("chunk")
def test_gradients_by_finite_differences(direction: Any, softcap: float | None) -> None:
    hidden, weight, targets, reference = inputs()
    head = Head(weight, softcap)
    assert gradients_are_right(lambda h: token_logps_and_kl(h, targets, head, reference, direction), hidden)
    assert gradients_are_right(lambda h: token_logps(h, targets, head), hidden)


@pytest.mark.usefixtures("chunk")
def test_a_trained_head_gets_its_gradient_too() -> None:
    hidden, weight, targets, _ = inputs()
    weight.requires_grad_()
    assert gradients_are_right(lambda w: token_logps(hidden.detach(), targets, Head(w)), weight)


def other_weight(vocabulary: int = 11, width: int = 5) -> Tensor:
    return torch.randn(vocabulary, width, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.usefixtures("chunk")
def test_the_reference_is_read_through_its_own_head(direction: Any) -> None:
    hidden, weight, targets, reference = inputs()
    head = Head(weight, reference=Head(other_weight()))
    _, found = token_logps_and_kl(hidden, targets, head, reference, direction)
    policy = torch.distributions.Categorical(logits=hidden @ weight.T)
    ref = torch.distributions.Categorical(logits=reference @ other_weight().T)
    a, b = (policy, ref) if direction == "reverse" else (ref, policy)
    torch.testing.assert_close(found, torch.distributions.kl_divergence(a, b))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.usefixtures("chunk")
def test_gradients_by_finite_differences_where_the_head_trains(direction: Any, softcap: float | None) -> None:
    """For the hidden states and the weight, against a reference that keeps a head of its own."""
    hidden, weight, targets, reference = inputs()
    frozen = Head(other_weight(), softcap)

    def stats(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return token_logps_and_kl(h, targets, Head(w, softcap, reference=frozen), reference, direction)

    assert gradients_are_right(stats, hidden, weight.requires_grad_())


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_gradients_by_finite_differences_where_the_head_is_the_embedding(direction: Any) -> None:
    """One weight both embeds the tokens that are read and predicts the next: its two gradients add up."""
    _, weight, targets, reference = inputs()
    read, mix = targets.flip(0), torch.randn(5, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    frozen = Head(weight.clone())

    def stats(w: Tensor) -> tuple[Tensor, Tensor]:
        return token_logps_and_kl(torch.tanh(w[read] @ mix), targets, Head(w, reference=frozen), reference, direction)

    assert gradients_are_right(stats, weight.requires_grad_())


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_kl_of_a_trained_head_is_zero_in_value_and_gradient_at_its_start(direction: Any) -> None:
    hidden, weight, targets, _ = inputs()
    head = Head(weight.requires_grad_(), reference=Head(weight.detach().clone()))
    _, divergence = token_logps_and_kl(hidden, targets, head, hidden, direction)
    divergence.sum().backward()
    assert torch.equal(divergence, torch.zeros_like(divergence))
    for gradient in (hidden.grad, weight.grad):
        assert gradient is not None
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-12, rtol=0)


def test_a_blocked_id_has_no_share_in_the_distribution() -> None:
    hidden, weight, targets, reference = inputs()
    head, targets = Head(weight), targets.clamp(max=8)
    fewer = replace(head, weight_VD=weight[:9])
    blocked = replace(head, blocked=(9, 10))
    torch.testing.assert_close(token_logps(hidden, targets, blocked), token_logps(hidden, targets, fewer))
    for a, b in zip(
        token_logps_and_kl(hidden, targets, blocked, reference, "reverse"),
        token_logps_and_kl(hidden, targets, fewer, reference, "reverse"),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_a_small_kl_survives_half_precision_states(
    direction: Any, dtype: torch.dtype, record_property: Callable[[str, object], None]
) -> None:
    """Logits near 30 rounded to bfloat16 are off by up to 0.06; what two near policies differ by is smaller."""
    g = torch.Generator().manual_seed(5)
    hidden = torch.randn(64, 32, generator=g).to(dtype)
    near = (hidden.float() + 0.02 * torch.randn(64, 32, generator=g)).to(dtype)
    weight, targets = (2 * torch.randn(101, 32, generator=g)).to(dtype), torch.randint(101, (64,), generator=g)
    _, found = token_logps_and_kl(hidden, targets, Head(weight), near, direction)
    states, head = (hidden.double(), near.double()), Head(weight.double())
    _, exact = token_logps_and_kl(states[0], targets, head, states[1], direction)
    error = float((found.sum() / exact.sum() - 1).abs())
    record_property("measured", f"KL {direction} of {dtype} states against float64: {error:.1e} (1e-4)")
    assert found.dtype == torch.float32
    assert error < 1e-4
    rounded = [(h.float() @ weight.float().T).to(dtype).double().log_softmax(-1) for h in (hidden, near)]
    p, q = rounded if direction == "reverse" else rounded[::-1]
    assert abs(float((p.exp() * (p - q)).sum() / exact.sum()) - 1) > 1e-3


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("shift", [-1000.0, -10.0, 10.0])
def test_words_that_weigh_nothing_do_not_blur_a_small_kl(
    direction: Any, shift: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first blocks' logits are shifted, a tenth more in the reference: in float32 as in float64 all the same.

    Where the shift is down they have no share in either; where it is up they have nearly all, and the others none.
    """
    monkeypatch.setattr("leeway.model.token_stats.BLOCK_ELEMENTS", 1 << 14)  # 256 words
    g = torch.Generator().manual_seed(1)
    weight, targets = 0.3 * torch.randn(4096, 17, generator=g), torch.randint(4096, (64,), generator=g)
    weight[:, -1] = 0.0
    weight[:1024, -1] = shift
    hidden = torch.cat([torch.randn(64, 16, generator=g), torch.ones(64, 1)], 1)
    near = torch.cat([hidden[:, :-1] + 1e-3 * torch.randn(64, 16, generator=g), torch.full((64, 1), 1.1)], 1)
    found = []
    for kind in (torch.float32, torch.float64):
        h = hidden.to(kind, copy=True).requires_grad_()
        _, kl_T = token_logps_and_kl(h, targets, Head(weight.to(kind)), near.to(kind), direction)
        kl_T.sum().backward()
        assert h.grad is not None
        found.append((kl_T.detach().double(), h.grad.double()[:, :-1]))
    (kl_T, g_TD), (exact_T, exact_TD) = found
    assert float((kl_T - exact_T).abs().max()) < 1e-6
    assert float((g_TD - exact_TD).abs().max()) < 1e-6


def test_no_tokens_are_no_error() -> None:
    hidden = torch.randn(0, 8, requires_grad=True)
    logp_T, kl_T = token_logps_and_kl(
        hidden, torch.zeros(0, dtype=torch.long), Head(torch.randn(10, 8)), torch.zeros(0, 8), "reverse"
    )
    (logp_T.sum() + kl_T.sum()).backward()
    assert logp_T.shape == kl_T.shape == (0,)
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, 8)


def test_the_greedy_token_is_the_first_of_the_largest_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several blocks: equal words, the largest in each block, and a state that is not finite."""
    monkeypatch.setattr(head_module, "BLOCK_ELEMENTS", 40)  # 8 words
    torch.manual_seed(0)
    weight_VD = torch.randn(30, 6)
    weight_VD[21] = weight_VD[3] = weight_VD[2]
    hidden_BD = torch.cat([weight_VD[[2, 9, 29, 17]], torch.full((1, 6), torch.nan)])
    head = Head(weight_VD, blocked=(9,))
    token_B, largest_B = head.greedy(hidden_BD)
    logits_BV = head.logits(hidden_BD)
    assert torch.equal(token_B[:4], logits_BV[:4].argmax(-1))
    assert torch.equal(largest_B[:4], logits_BV[:4].amax(-1))
    assert bool(largest_B[4].isnan())
