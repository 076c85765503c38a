"""Objectives: arithmetic worked by hand, and the laws each of them obeys."""

from __future__ import annotations

import math

import pytest
import torch

from leeway.data.items import Example
from leeway.model.forward import TokenStats, Totals
from leeway.objectives import OBJECTIVES, cft, dpo, ip, kl, orpo, sft


def stats(values: list[list[float]], kl_T: list[float] | None = None) -> TokenStats:
    """Token statistics of sequences given as lists of log-probabilities."""
    logp_T = torch.tensor([v for s in values for v in s], dtype=torch.float64, requires_grad=True)
    sequence_T = torch.tensor([i for i, s in enumerate(values) for _ in s])
    totals = Totals(len(logp_T), len(values), len(logp_T), len(logp_T), len(logp_T))
    extra = None if kl_T is None else torch.tensor(kl_T, dtype=torch.float64)
    return TokenStats(logp_T, sequence_T, len(values), totals, extra)


def pairs(values: list[list[float]]) -> TokenStats:
    """The same, for pairs: examples are two sequences each."""
    s = stats(values)
    preferred = sum(len(v) for v in values[0::2])
    return TokenStats(
        s.logp_T,
        s.sequence_T,
        s.sequences,
        Totals(len(s.logp_T), len(values) // 2, preferred, len(s.logp_T), preferred),
    )


def test_sft_is_the_mean_per_token_not_per_sequence() -> None:
    # (0.5 + 1.5 + 4) / 3 tokens = 2; a mean over sequences would give (1 + 4) / 2 = 2.5
    assert sft.Sft().loss(stats([[-0.5, -1.5], [-4.0]])).item() == pytest.approx(2.0)


def test_dpo_on_scaled_margins() -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    gains = torch.tensor([0.0, 10.0, 20.0], dtype=torch.float64)
    losses = dpo.loss(gains, zero, zero, zero, beta=0.1)
    assert losses.tolist() == pytest.approx([0.6931, 0.3133, 0.1269], abs=5e-5)


def test_dpo_at_its_reference_is_ln_2() -> None:
    policy = pairs([[-1.0, -2.0], [-3.0], [-0.1], [-5.0, -5.0]])
    assert dpo.Dpo().loss(policy, policy).item() == pytest.approx(math.log(2))


def test_dpo_by_hand() -> None:
    # sums: chosen -3, rejected -4; reference -5 and -4: margin = 0.1 * ((-3+5) - (-4+4)) = 0.2
    policy, reference = pairs([[-1.0, -2.0], [-4.0]]), pairs([[-2.0, -3.0], [-4.0]])
    assert dpo.Dpo(beta=0.1).loss(policy, reference).item() == pytest.approx(math.log1p(math.exp(-0.2)))


def test_swapping_a_pair_negates_dpos_margin() -> None:
    a, b, c, d = (torch.tensor([v], dtype=torch.float64) for v in (-1.0, -2.0, -3.0, -5.0))
    assert dpo.margins(a, b, c, d, 0.1).item() == pytest.approx(-dpo.margins(b, a, d, c, 0.1).item())


def test_dpo_is_unmoved_by_the_shared_prompt_and_orpo_is_moved() -> None:
    prompt = [-0.7, -0.9]
    bare, with_prompt = pairs([[-1.0], [-2.0, -1.0]]), pairs([[*prompt, -1.0], [*prompt, -2.0, -1.0]])
    zero, zero_with = pairs([[-1.5], [-1.0, -1.0]]), pairs([[*prompt, -1.5], [*prompt, -1.0, -1.0]])
    assert dpo.Dpo().loss(bare, zero).item() == pytest.approx(dpo.Dpo().loss(with_prompt, zero_with).item())
    assert orpo.Orpo().loss(bare).item() != pytest.approx(orpo.Orpo().loss(with_prompt).item())


def test_orpo_odds_ratio_by_hand() -> None:
    chosen = torch.tensor([-1.2], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([-2.3], dtype=torch.float64, requires_grad=True)
    assert orpo.log_odds_ratio(chosen, rejected).item() == pytest.approx(1.35273, abs=5e-6)
    loss = orpo.loss(chosen, rejected)
    assert loss.item() == pytest.approx(0.22995, abs=5e-6)
    loss.sum().backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert chosen.grad.item() == pytest.approx(-0.29396, abs=5e-6)
    assert rejected.grad.item() == pytest.approx(0.22831, abs=5e-6)


def test_orpo_without_weight_is_sft_on_the_preferred_answers() -> None:
    policy = pairs([[-1.0, -3.0], [-2.0], [-0.5], [-9.0]])
    assert orpo.Orpo(weight=0.0).loss(policy).item() == pytest.approx((1.0 + 3.0 + 0.5) / 3)


@pytest.mark.parametrize("a", [-1e-8, -1e-4, -0.5, -math.log(2), -1.0, -20.0, -80.0])
def test_log1mexp_is_stable_in_float32(a: float) -> None:
    exact = math.log(-math.expm1(a)) if a > -1 else math.log1p(-math.exp(a))
    value = torch.tensor(a, dtype=torch.float32, requires_grad=True)
    out = orpo.log1mexp(value)
    out.backward()
    assert out.item() == pytest.approx(exact, rel=1e-5, abs=1e-37)
    assert value.grad is not None
    assert math.isfinite(value.grad.item())


def test_orpo_is_finite_where_the_model_is_certain() -> None:
    policy = pairs([[0.0, 0.0], [-50.0]])
    loss = orpo.Orpo().loss(TokenStats(policy.logp_T.float(), policy.sequence_T, 2, policy.totals))
    assert math.isfinite(loss.item())


def test_kl_adds_its_weight_times_the_mean_divergence() -> None:
    policy = stats([[-1.0, -2.0], [-3.0]], kl_T=[0.3, 0.0, 0.6])
    assert kl.Kl(weight=0.5).loss(policy).item() == pytest.approx(2.0 + 0.5 * 0.3)


def test_kl_without_weight_is_sft_bit_for_bit() -> None:
    policy = stats([[-1.0, -2.0], [-3.0]], kl_T=[0.3, 0.1, 0.6])
    assert kl.Kl(weight=0.0).loss(policy).item() == sft.Sft().loss(policy).item()


def test_micro_batches_add_up_to_the_batch(tiny_chat: object) -> None:
    """Each loss is normalised by the whole batch: two halves with the batch's totals sum to the batch's loss."""
    del tiny_chat
    values, refs = (
        [[-1.0, -2.0], [-3.0], [-0.5], [-2.5, -2.0, -1.0]],
        [[-2.0, -2.0], [-1.0], [-0.7], [-2.0, -2.0, -2.0]],
    )
    whole, reference = pairs(values), pairs(refs)

    def half(v: list[list[float]]) -> TokenStats:
        s = pairs(v)
        return TokenStats(s.logp_T, s.sequence_T, 2, whole.totals, torch.full_like(s.logp_T, 0.25))

    full = TokenStats(whole.logp_T, whole.sequence_T, 4, whole.totals, torch.full_like(whole.logp_T, 0.25))
    for kind in OBJECTIVES.values():
        objective = kind()
        parts = sum(objective.loss(half(values[k : k + 2]), half(refs[k : k + 2])).item() for k in (0, 2))
        assert parts == pytest.approx(objective.loss(full, reference).item()), objective.name


def test_what_each_objective_trains_on(tiny_chat: object) -> None:
    import numpy as np

    from leeway.data.chat import Chat

    assert isinstance(tiny_chat, Chat)
    example = Example("e", "How many?", "Two.", "Three.")
    good, bad = tiny_chat.ids("Two.[end]"), tiny_chat.ids("Three.[end]")

    def targets(objective: object, chat: Chat = tiny_chat, seed: int = 0) -> list[tuple[int, ...]]:
        return [s.ids[s.target_start :] for s in objective.render(example, chat, np.random.default_rng(seed))]  # type: ignore[attr-defined]

    assert targets(sft.Sft()) == [good]
    assert targets(kl.Kl()) == [good]
    assert targets(dpo.Dpo()) == [good, bad]
    assert targets(orpo.Orpo()) == [good, bad]
    conditional = tiny_chat.with_control_tokens(cft.Cft.control_tokens)
    assert targets(cft.Cft(), conditional) == [good, bad]
    safe, unsafe = conditional.tokenizer.convert_tokens_to_ids(list(cft.Cft.control_tokens))
    rendered = cft.Cft().render(example, conditional, np.random.default_rng(0))
    assert [safe in s.ids and unsafe not in s.ids for s in rendered] == [True, False]
    assert [unsafe in s.ids and safe not in s.ids for s in rendered] == [False, True]
    assert all(targets(ip.Ip(), seed=k) == [good] for k in range(8))


def test_ip_with_probability_zero_is_sft_and_with_one_always_injects(tiny_chat: object) -> None:
    import numpy as np

    example = Example("e", "How many?", "Two.", None)
    plain = sft.Sft().render(example, tiny_chat, np.random.default_rng(0))  # type: ignore[arg-type]
    for seed in range(20):
        assert ip.Ip(p=0.0).render(example, tiny_chat, np.random.default_rng(seed)) == plain  # type: ignore[arg-type]
        assert ip.Ip(p=1.0).render(example, tiny_chat, np.random.default_rng(seed)) != plain  # type: ignore[arg-type]
    share = sum(ip.Ip().render(example, tiny_chat, np.random.default_rng(s)) != plain for s in range(400))  # type: ignore[arg-type]
    assert 150 < share < 250
