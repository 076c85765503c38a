"""Objectives: arithmetic worked by hand, and the laws each of them obeys."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from handmade import EXAMPLES, SAFETY, stats, with_auxiliary

from leeway.data.chat import Chat
from leeway.data.types import Example
from leeway.model.forward import TokenStats
from leeway.objectives import (
    OBJECTIVES,
    Objective,
    cft,
    dpo,
    ip,
    ipo,
    kl,
    kto,
    orpo,
    sft,
    sft_both,
    sft_refusal,
    sft_safety,
    simpo,
)

POLICY = [[-1.0, -2.0], [-4.0], [-0.5], [-2.5, -2.0, -1.0]]  # two pairs, preferred first: sums -3 -4, -0.5 -5.5
REFERENCE = [[-2.0, -2.0], [-4.5], [-0.75], [-2.0, -2.0, -2.0]]  # sums -4 -4.5, -0.75 -6
# log-ratios r: 1 and 0.5, 0.25 and 0.5; h = r+ - r-: 0.5 and -0.25; means -1.5 -4, -0.5 -11/6
WITH_PROMPT = [[-0.25, -1.0, -2.0], [-4.0], [-0.75, -0.5], [-2.5, -2.0, -1.0]]  # one prompt token before the preferred


def pairs(values: list[list[float]]) -> TokenStats:
    return stats(values, per_example=2)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def odds(a: float) -> float:
    """log odds of a mean log-probability."""
    return a - math.log(1 - math.exp(a))


DPO_BY_HAND = (math.log1p(math.exp(-0.25)) + math.log1p(math.exp(0.125))) / 2  # beta 0.5: margins 0.25 and -0.125
SIMPO_BY_HAND = (math.log1p(math.exp(-4.5)) + math.log1p(math.exp(-13 / 6))) / 2  # 2 * 2.5 - 0.5 and 2 * 4/3 - 0.5
RATIO_BY_HAND = sum(math.log1p(math.exp(-d)) for d in (odds(-1.5) - odds(-4.0), odds(-0.5) - odds(-11 / 6))) / 2
BY_HAND: list[tuple[Objective, TokenStats, float]] = [
    (sft.Sft(), stats([[-1.0, -2.0], [-0.5]]), 3.5 / 3),
    (ip.Ip(), stats([[-1.0, -2.0], [-0.5]]), 3.5 / 3),
    (sft_safety.SftSafety(), stats([[-1.0, -2.0], [-0.5], [-4.0]]), 7.5 / 4),
    (sft_refusal.SftRefusal(), pairs(POLICY), 13 / 7),
    (sft_both.SftBoth(), pairs(POLICY), 13 / 7),
    (cft.Cft(), pairs(POLICY), 13 / 7),
    (dpo.Dpo(beta=0.5), pairs(POLICY), DPO_BY_HAND),
    (dpo.Dpo(beta=0.5, nll=0.3), pairs(POLICY), DPO_BY_HAND + 0.3 * 3.5 / 3),
    (ipo.Ipo(beta=0.5), pairs(POLICY), (0.25 + 1.5625) / 2),  # (0.5 - 1)^2 and (-0.25 - 1)^2
    (ipo.Ipo(beta=0.5, length="mean"), pairs(POLICY), (1 + (11 / 12) ** 2) / 2),  # h = 0.5 - 0.5 and 0.25 - 0.5/3
    (simpo.Simpo(beta=2.0, gamma=0.5), pairs(POLICY), SIMPO_BY_HAND),
    (simpo.Simpo(beta=2.0, gamma=0.5, nll=2.0), pairs(POLICY), SIMPO_BY_HAND + 7 / 3),
    (orpo.Orpo(weight=0.4), pairs(POLICY), 3.5 / 3 + 0.4 * RATIO_BY_HAND),
    (orpo.Orpo(weight=0.4, nll=0.5), pairs(POLICY), 1.75 / 3 + 0.4 * RATIO_BY_HAND),
    (orpo.Orpo(weight=0.4, nll=0.0), pairs(POLICY), 0.4 * RATIO_BY_HAND),
    (orpo.Orpo(weight=0.4, nll_mean="sequence"), pairs(POLICY), 1.0 + 0.4 * RATIO_BY_HAND),  # (1.5 + 0.5) / 2
    (
        orpo.Orpo(weight=0.4, nll_scope="all"),
        stats(WITH_PROMPT, per_example=2, prompt=[1, 0, 1, 0]),
        4.5 / 5 + 0.4 * RATIO_BY_HAND,
    ),
    (
        orpo.Orpo(weight=0.4, nll_scope="all", nll_mean="sequence"),
        stats(WITH_PROMPT, per_example=2, prompt=[1, 0, 1, 0]),
        (3.25 / 3 + 1.25 / 2) / 2 + 0.4 * RATIO_BY_HAND,
    ),
    # z0 = 0.3, beta = 0.5: 0.5 (r - z0) is 0.35 and -0.025 for the preferred, 0.1 twice for the others
    (
        kto.Kto(beta=0.5, desirable=1.0, undesirable=2.0),
        stats(POLICY, per_example=2, baseline=0.3),
        (sigmoid(-0.35) + sigmoid(0.025) + 2 * 2 * sigmoid(0.1)) / 4,
    ),
    (  # a reference point below zero is zero: 0.5 r is 0.5 and 0.125, 0.25 twice
        kto.Kto(beta=0.5),
        stats(POLICY, per_example=2, baseline=-0.3),
        (sigmoid(-0.5) + sigmoid(-0.125) + 2 * sigmoid(0.25)) / 4,
    ),
    (kl.Kl(weight=0.5), stats([[-1.0, -2.0], [-3.0]], kl=[[0.3, 0.0], [0.6]]), 2.0 + 0.5 * 0.3),
    (
        kl.Kl(weight=0.5, scope="all"),  # two prompt tokens are measured too: KL 2.0 / 5, NLL over the targets alone
        stats([[-7.0, -1.0, -2.0], [-8.0, -3.0]], kl=[[0.1, 0.3, 0.0], [1.0, 0.6]], prompt=[1, 1]),
        2.0 + 0.5 * 2.0 / 5,
    ),
    (
        kl.Kl(weight=0.5, scope="general"),  # the second of each two sequences has no target: KL 0.8 / 3
        stats(
            [[-1.0, -2.0], [-9.0], [-3.0], [-9.0, -9.0]],
            per_example=2,
            kl=[[5.0, 5.0], [0.5], [5.0], [0.2, 0.1]],
            prompt=[0, 1, 0, 2],
        ),
        2.0 + 0.5 * 0.8 / 3,
    ),
    # per sequence: sums of 0.3 and 0.6, 1.4 in all with the prompts, 0.8 on general prompts; two examples each
    (kl.Kl(weight=0.5, reduction="sequence"), stats([[-1.0, -2.0], [-3.0]], kl=[[0.3, 0.0], [0.6]]), 2.0 + 0.5 * 0.45),
    (
        kl.Kl(weight=0.5, scope="all", reduction="sequence"),
        stats([[-7.0, -1.0, -2.0], [-8.0, -3.0]], kl=[[0.1, 0.3, 0.0], [0.4, 0.6]], prompt=[1, 1]),
        2.0 + 0.5 * 1.4 / 2,
    ),
    (
        kl.Kl(weight=0.5, scope="general", reduction="sequence"),
        stats(
            [[-1.0, -2.0], [-9.0], [-3.0], [-9.0, -9.0]],
            per_example=2,
            kl=[[5.0, 5.0], [0.5], [5.0], [0.2, 0.1]],
            prompt=[0, 1, 0, 2],
        ),
        2.0 + 0.5 * 0.8 / 2,
    ),
]


@pytest.mark.parametrize(("objective", "policy", "expected"), BY_HAND, ids=[repr(o) for o, _, _ in BY_HAND])
def test_each_objective_by_hand(
    objective: Objective, policy: TokenStats, expected: float, record_property: Callable[[str, object], None]
) -> None:
    error = abs(objective.loss(policy, pairs(REFERENCE)).item() / expected - 1)
    record_property("measured", f"{objective!r} against the value worked by hand: {error:.1e} (1e-12)")
    assert error < 1e-12


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


def test_swapping_a_pair_negates_dpos_margin() -> None:
    a, b, c, d = (torch.tensor([v], dtype=torch.float64) for v in (-1.0, -2.0, -3.0, -5.0))
    assert dpo.margins(a, b, c, d, 0.1).item() == pytest.approx(-dpo.margins(b, a, d, c, 0.1).item())


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
    assert math.isfinite(orpo.Orpo().loss(replace(policy, logp_T=policy.logp_T.float())).item())


@pytest.mark.parametrize("beta", [0.05, 0.5])
def test_at_the_reference_ipo_is_the_square_of_half_of_one_over_beta(beta: float) -> None:
    for length in ("sum", "mean"):
        loss = ipo.Ipo(beta=beta, length=length).loss(pairs(POLICY), pairs(POLICY))  # type: ignore[arg-type]
        assert loss.item() == pytest.approx((1 / (2 * beta)) ** 2)


def test_at_the_reference_kto_is_half_the_mean_of_its_weights() -> None:
    assert kto.Kto(desirable=1.5, undesirable=0.5).loss(pairs(POLICY), pairs(POLICY)).item() == pytest.approx(0.5)
    assert kto.Kto(desirable=3.0, undesirable=0.0).loss(pairs(POLICY), pairs(POLICY)).item() == pytest.approx(0.75)


def test_ktos_reference_point_is_the_mean_log_ratio_of_the_batch_whatever_its_parts() -> None:
    """r of the mismatched answers: 1, 0.5, 0.25, 0.5 of four examples."""
    whole, objective = stats(POLICY), kto.Kto()
    assert objective.baseline(whole, stats(REFERENCE)) == pytest.approx(2.25 / 4)
    parts = [
        objective.baseline(replace(stats(POLICY[k : k + 2]), totals=whole.totals), stats(REFERENCE[k : k + 2]))
        for k in (0, 2)
    ]
    assert parts == pytest.approx([1.5 / 4, 0.75 / 4])


def test_ktos_mismatched_answer_is_another_examples(tiny_chat: Chat) -> None:
    example = replace(EXAMPLES[0], auxiliary=EXAMPLES[2])
    assert kto.Kto().baseline_sequences(example, tiny_chat) == [tiny_chat.sequence("0 + 4?", "It is 6.")]


PROMPT, ITS_REFERENCE = [-0.7, -0.9], [-0.2, -0.3]  # a pair shares its prompt, and policy and reference differ on it
COUNTED = [[*PROMPT, *s] for s in POLICY], [[*ITS_REFERENCE, *s] for s in REFERENCE]


@pytest.mark.parametrize("objective", [dpo.Dpo(), ipo.Ipo()], ids=repr)
def test_what_holds_two_sums_against_each_other_is_unmoved_by_counting_the_shared_prompt(objective: Objective) -> None:
    bare = objective.loss(pairs(POLICY), pairs(REFERENCE)).item()
    assert bare == pytest.approx(objective.loss(*map(pairs, COUNTED)).item(), rel=1e-12)


MOVED = [orpo.Orpo(), simpo.Simpo(), ipo.Ipo(length="mean"), dpo.Dpo(nll=1.0), kto.Kto(undesirable=2.0)]


@pytest.mark.parametrize("objective", MOVED, ids=repr)
def test_what_averages_or_takes_answers_alone_is_moved_by_counting_the_shared_prompt(objective: Objective) -> None:
    bare = objective.loss(pairs(POLICY), pairs(REFERENCE)).item()
    assert bare != pytest.approx(objective.loss(*map(pairs, COUNTED)).item(), rel=1e-3)


@pytest.mark.parametrize("objective", [kind() for kind in OBJECTIVES.values()], ids=repr)
def test_micro_batches_add_up_to_the_batch(objective: Objective) -> None:
    """Each loss is normalised by the whole batch: two halves with the batch's totals sum to the batch's loss."""
    whole = stats(POLICY, per_example=2, baseline=0.3, kl=[[0.25] * len(s) for s in POLICY])

    def half(k: int) -> TokenStats:
        part = POLICY[k : k + 2]
        return replace(stats(part, per_example=2, kl=[[0.25] * len(s) for s in part]), totals=whole.totals)

    parts = sum(objective.loss(half(k), pairs(REFERENCE[k : k + 2])).item() for k in (0, 2))
    assert parts == pytest.approx(objective.loss(whole, pairs(REFERENCE)).item(), rel=1e-12)


def chat_of(objective: Objective, chat: Chat) -> Chat:
    return chat.with_control_tokens(objective.control_tokens) if objective.control_tokens else chat


@pytest.mark.parametrize(
    ("objective", "answers"),
    [
        (sft.Sft(), ["Two."]),
        (ip.Ip(), ["Two."]),
        (kl.Kl(), ["Two."]),
        (kl.Kl(scope="all"), ["Two."]),
        (kl.Kl(scope="general"), ["Two.", None]),
        (dpo.Dpo(), ["Two.", "Three."]),
        (ipo.Ipo(), ["Two.", "Three."]),
        (simpo.Simpo(), ["Two.", "Three."]),
        (kto.Kto(), ["Two.", "Three."]),
        (orpo.Orpo(), ["Two.", "Three."]),
        (cft.Cft(), ["Two.", "Three."]),
        (sft_both.SftBoth(), ["Two.", "Three."]),
        (sft_safety.SftSafety(share=1.0), ["Two.", "Sorry, no."]),
        (sft_refusal.SftRefusal(), ["Two.", "a refusal"]),
    ],
    ids=lambda x: repr(x) if not isinstance(x, list) else "",
)
def test_what_each_objective_trains_on(objective: Objective, answers: list[str | None], tiny_chat: Chat) -> None:
    chat = chat_of(objective, tiny_chat)
    refusals = [chat.ids(r + "[end]") for r in sft_refusal.texts().refusals]
    for seed in range(4):
        example = with_auxiliary(objective, Example("e", "How many?", "Two.", "Three."), 0)
        found = [s.ids[s.target_start :] for s in objective.render(example, chat, np.random.default_rng(seed))]
        for ids, answer in zip(found, answers, strict=True):
            if answer == "a refusal":
                assert ids in refusals
            else:
                assert ids == (chat.ids(f"{answer}[end]") if answer else ())


def test_cft_says_which_answer_is_which(tiny_chat: Chat) -> None:
    chat = chat_of(cft.Cft(), tiny_chat)
    safe, unsafe = chat.tokenizer.convert_tokens_to_ids(list(cft.Cft.control_tokens))
    rendered = cft.Cft().render(EXAMPLES[0], chat, np.random.default_rng(0))
    assert [safe in s.ids and unsafe not in s.ids for s in rendered] == [True, False]
    assert [unsafe in s.ids and safe not in s.ids for s in rendered] == [False, True]


def test_both_answers_without_a_condition_are_cft_minus_its_tokens(tiny_chat: Chat) -> None:
    chat = chat_of(cft.Cft(), tiny_chat)
    control = chat.tokenizer.convert_tokens_to_ids(list(cft.Cft.control_tokens))
    rng = np.random.default_rng(0)
    conditioned, bare = cft.Cft().render(EXAMPLES[1], chat, rng), sft_both.SftBoth().render(EXAMPLES[1], chat, rng)
    assert [tuple(i for i in s.ids if i not in control) for s in conditioned] == [s.ids for s in bare]


def test_a_general_prompt_is_measured_at_its_answer_or_else_at_the_prompt(tiny_chat: Chat) -> None:
    def beside(answer: str) -> list[int]:
        example = replace(EXAMPLES[0], auxiliary=Example("g", "Hi?", answer))
        measured = kl.Kl(scope="general").render(example, tiny_chat, np.random.default_rng(0))[1]
        assert measured.targets == 0
        return list(measured.ids[measured.start :])

    assert beside("Hello.") == list(tiny_chat.ids("Hello.[end]"))
    assert beside("") == list(tiny_chat.ids("[user]Hi?[end][assistant]"))[1:]


def test_a_declined_answer_is_shown_and_asked_for(tiny_chat: Chat) -> None:
    example = Example("e", "What is {x}?", "Two.", "Three {prompt}.")
    seen = set()
    for seed in range(60):
        _, second = sft_refusal.SftRefusal().render(example, tiny_chat, np.random.default_rng(seed))
        text = tiny_chat.decode(list(second.ids[: second.target_start]))
        assert "What is {x}?" in text
        assert "Three {prompt}." in text
        seen.add(second.ids)
    texts = sft_refusal.texts()
    assert len(seen) == len(texts.requests) * len(texts.refusals)


def test_the_refusals_hash_moves_with_their_text() -> None:
    texts = sft_refusal.texts()
    assert replace(texts, refusals=(*texts.refusals[:-1], "No.")).hash != texts.hash
    assert all(r.count("{prompt}") == r.count("{answer}") == 1 for r in texts.requests)


@pytest.mark.parametrize("none", [ip.Ip(p=0.0), sft_safety.SftSafety(share=0.0)], ids=repr)
def test_a_share_of_zero_is_sft(none: Objective, tiny_chat: Chat) -> None:
    assert none.auxiliary == ""
    for seed in range(20):
        plain = sft.Sft().render(EXAMPLES[0], tiny_chat, np.random.default_rng(seed))
        assert none.render(EXAMPLES[0], tiny_chat, np.random.default_rng(seed)) == plain


@pytest.mark.parametrize(
    ("always", "some", "share"),
    [(ip.Ip(p=1.0), ip.Ip(), 0.5), (sft_safety.SftSafety(share=1.0), sft_safety.SftSafety(), 0.25)],
    ids=["ip", "sft_safety"],
)
def test_a_share_is_the_share_of_examples(always: Objective, some: Objective, share: float, tiny_chat: Chat) -> None:
    example = replace(EXAMPLES[0], auxiliary=SAFETY[0])
    plain = sft.Sft().render(example, tiny_chat, np.random.default_rng(0))

    def changed(objective: Objective) -> float:
        drawn = (objective.render(example, tiny_chat, np.random.default_rng(seed)) for seed in range(400))
        return sum(found != plain for found in drawn) / 400

    assert changed(always) == 1.0
    assert changed(some) == pytest.approx(share, abs=0.08)  # more than three standard errors


@pytest.mark.parametrize(
    "objective",
    [*(kind() for kind in OBJECTIVES.values()), kl.Kl(scope="general"), kl.Kl(scope="all"), orpo.Orpo(nll_scope="all")],
    ids=repr,
)
def test_the_worst_case_holds_every_sequence_that_can_be_rendered(objective: Objective, tiny_chat: Chat) -> None:
    chat, example = chat_of(objective, tiny_chat), with_auxiliary(objective, EXAMPLES[2], 0)
    worst = {s.ids for s in objective.worst_case(example, chat)}
    rendered = {s.ids for k in range(200) for s in objective.render(example, chat, np.random.default_rng(k))}
    assert rendered | {s.ids for s in objective.baseline_sequences(example, chat)} == worst
    assert {s.ids for s in objective.worst_case(EXAMPLES[2], chat)} <= worst  # known before there is a companion


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (dpo.Dpo, {"beta": 0.0}),
        (ipo.Ipo, {"beta": 0.0}),
        (simpo.Simpo, {"beta": 0.0}),
        (kto.Kto, {"beta": 0.0}),
        (kto.Kto, {"desirable": 0.0, "undesirable": 0.0}),
        (orpo.Orpo, {"weight": 0.0, "nll": 0.0}),
    ],
)
def test_settings_under_which_nothing_is_learned_are_refused(kind: type[Objective], settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=rf"^{kind.name}: .*{next(iter(settings))}"):
        kind(**settings)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_kind_is_its_module_its_name_and_its_key(name: str) -> None:
    kind = OBJECTIVES[name]
    assert kind.name == name
    assert kind.__module__ == f"leeway.objectives.{name}"


@pytest.mark.parametrize("objective", [kind() for kind in OBJECTIVES.values() if kind.needs_pairs], ids=repr)
def test_an_example_without_its_pair_is_named(objective: Objective, tiny_chat: Chat) -> None:
    lone = Example("lone", "How many?", "Two.", None, EXAMPLES[0])
    with pytest.raises(ValueError, match="example lone has no dispreferred answer"):
        objective.render(lone, chat_of(objective, tiny_chat), np.random.default_rng(0))
