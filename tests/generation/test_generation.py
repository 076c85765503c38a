"""Greedy and sampled replies: the sampling distribution, random streams per request, failures and stop tokens."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from tokenizers import AddedToken

from leeway.attacks.attack import Wrapper
from leeway.data.chat import Chat
from leeway.data.types import ForbiddenPrompt, PersonaItem
from leeway.errors import LeewayError
from leeway.evals.eval import is_retryable
from leeway.evals.jailbreak import Jailbreak
from leeway.evals.persona import Persona
from leeway.generation.backend import Reply, Request
from leeway.generation.transformers import (
    BLOCK,
    NOT_FINITE,
    AncestralSampler,
    NonFiniteGuard,
    TransformersBackend,
    draw,
    stream,
)
from leeway.judges import KeywordJudge
from leeway.model.load import Model, load_model


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def model(request: pytest.FixtureRequest, models: dict[str, Path]) -> Model:
    return load_model(str(models[request.param]), device="cpu")


def prompt(text: str, temperature: float = 0.0, sample: int = 0, seed: int = 0, limit: int = 12) -> Request:
    return Request([{"role": "user", "content": text}], limit, temperature, sample, seed)


def answers(model: Model, requests: list[Request], batch: int = 128) -> list[Reply]:
    return TransformersBackend(model, batch=batch).complete(requests, lambda _: None)


PROMPTS = ["How many apples are there?", "Yes or no?", "3 + 4", "a"]


def test_sampling_near_temperature_zero_is_greedy(model: Model) -> None:
    greedy = answers(model, [prompt(p) for p in PROMPTS])
    assert answers(model, [prompt(p, 1e-6) for p in PROMPTS]) == greedy


def test_greedy_replies_do_not_depend_on_sampled_requests(model: Model) -> None:
    greedy = answers(model, [prompt(p) for p in PROMPTS])
    mixed = answers(model, [prompt(p, t) for p in PROMPTS for t in (0.0, 1.0)])
    assert mixed[::2] == greedy


def test_a_reply_is_a_function_of_temperature_sample_and_seed(model: Model) -> None:
    first = answers(model, [prompt(p, 1.0) for p in PROMPTS])
    torch.manual_seed(1)
    assert answers(model, [prompt(p, 1.0) for p in PROMPTS]) == first
    for other in ({"sample": 1}, {"seed": 1}, {"temperature": 0.9}):
        assert all(
            a.text != b.text
            for a, b in zip(first, answers(model, [replace(prompt(p, 1.0), **other) for p in PROMPTS]), strict=True)
        )


def test_a_reply_does_not_depend_on_its_place_in_the_batch(model: Model) -> None:
    requests = [prompt(p, 1.0, k) for p in PROMPTS for k in range(3)]
    backwards = answers(model, requests[::-1])[::-1]
    assert answers(model, requests) == backwards
    alone = [answers(model, [r])[0] for r in requests]
    assert alone == backwards  # rounding changes none of these in float32 on a CPU


@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])  # a random model is nearly uniform at 1
def test_next_token_frequencies_match_softmax(model: Model, temperature: float) -> None:
    n, ids = 4000, model.chat.prompt_ids([{"role": "user", "content": "Yes"}])
    backend = TransformersBackend(model)
    sampler = AncestralSampler(temperature, [stream(ids, temperature, k, 0) for k in range(n)])
    drawn = torch.tensor([new for new, _ in backend._generate_ids([ids] * n, 1, sampler)])[:, 0]
    p_V = (model.lm(input_ids=torch.tensor([ids])).logits[0, -1].double() / temperature).softmax(-1)
    assert chi_square_p(torch.bincount(drawn, minlength=len(p_V)), p_V) > 0.001


def chi_square_p(counts_V: torch.Tensor, p_V: torch.Tensor) -> float:
    """Pool tokens with an expected count below five."""
    expected_V = p_V * counts_V.sum()
    rare = expected_V < 5
    seen = [*counts_V[~rare].tolist(), counts_V[rare].sum().item()]
    due = [*expected_V[~rare].tolist(), max(expected_V[rare].sum().item(), 1e-9)]
    assert len(seen) > 20
    return float(stats.chisquare(seen, due, sum_check=False).pvalue)


def test_a_control_token_is_never_sampled(model: Model) -> None:
    """Even if it is by far the most probable."""
    ids = model.chat.prompt_ids([{"role": "user", "content": "Yes"}])
    likely = int(model.lm(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
    held = replace(model, head=replace(model.head, blocked=(likely,)))
    drawing = AncestralSampler(0.05, [stream(ids, 0.05, k, 0) for k in range(300)])
    drawn = torch.tensor([new for new, _ in TransformersBackend(held)._generate_ids([ids] * 300, 1, drawing)])
    assert likely not in drawn
    drawing = AncestralSampler(0.05, [stream(ids, 0.05, k, 0) for k in range(300)])
    assert [likely] in [new for new, _ in TransformersBackend(model)._generate_ids([ids] * 300, 1, drawing)]


@settings(deadline=None)
@given(st.integers(1, 3 * BLOCK), st.floats(0, 1, exclude_max=True), st.integers(0, 99))
def test_a_draw_is_the_quantile_of_the_cumulative_sum(vocabulary: int, u: float, seed: int) -> None:
    logits_V = torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3
    logits_V[1::3] = -math.inf
    p_V = logits_V.softmax(-1)
    token = int(draw(logits_V[None], 1.0, torch.tensor([u], dtype=torch.float64))[0])
    running = p_V.cumsum(-1)
    assert p_V[token] > 0
    assert float(running[token] - p_V[token]) - 1e-9 <= u <= float(running[token]) + 1e-9


def test_the_ends_of_the_interval() -> None:
    logits_BV = torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]]).repeat(2, 1)
    u_B = torch.tensor([0.0, math.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert draw(logits_BV, 1.0, u_B).tolist() == [1, 2]


@pytest.mark.parametrize("temperature", [-1.0, math.nan, math.inf])
def test_invalid_temperatures(temperature: float) -> None:
    with pytest.raises(ValueError, match="must be finite and not negative"):
        prompt("a", temperature)


POISON = "@"  # a byte that no other prompt here holds


@pytest.fixture
def poisoned(models: dict[str, Path]) -> Model:
    """A model whose logits are NaN after POISON; its head is untied, so other rows stay finite."""
    model = load_model(str(models["llama"]), device="cpu")
    (token,) = model.chat.ids(POISON)
    with torch.no_grad():
        model.lm.get_input_embeddings().weight[token] = torch.nan
    return model


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_non_finite_logits_fail_one_row_and_the_rest_of_the_batch_continues(
    models: dict[str, Path], poisoned: Model, temperature: float
) -> None:
    whole = load_model(str(models["llama"]), device="cpu")
    texts = ["a", f"{POISON}", "b", f"c{POISON}"]
    ill = answers(poisoned, [prompt(t, temperature) for t in texts])
    well = answers(whole, [prompt(t, temperature) for t in texts])
    assert [r.failure for r in ill] == [None, NOT_FINITE, None, NOT_FINITE]
    assert [ill[0], ill[2]] == [well[0], well[2]]
    assert ill[1] == Reply("", 0, False, NOT_FINITE)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rows_of_a_model_with_non_finite_weights_are_unscored(models: dict[str, Path], value: float) -> None:
    broken = load_model(str(models["llama"]), device="cpu")
    with torch.no_grad():
        broken.lm.get_output_embeddings().weight.fill_(value)
    backend = TransformersBackend(broken)
    attack = Wrapper("none", 1, "", "{prompt}")
    jailbreak = Jailbreak(
        [ForbiddenPrompt("p/0", "How?"), ForbiddenPrompt("p/1", "Why?")], [attack], [KeywordJudge()], 8
    )
    persona = Persona([PersonaItem("t/0", "t", "Tea?", "I like tea", "Yes")])
    rows = [*jailbreak.run(backend, lambda _: None), *persona.run(backend, lambda _: None)]
    assert [r.unscored_reason for r in rows] == [f"no answer: {NOT_FINITE}"] * 3
    assert all(math.isnan(r.score) and r.outcome is None and r.response == "" for r in rows)


def test_the_guard_stops_non_finite_rows_before_sampling() -> None:
    """By hand: -inf for some tokens is valid; for all of them, or a NaN or +inf, is not."""
    inf, nan = math.inf, math.nan
    rows = [[0.0, -inf, 1.0], [-inf, -inf, -inf], [0.0, nan, 1.0], [0.0, inf, 1.0], [nan, -inf, -inf]]
    fine = [0.0, 1.0, 2.0]
    finite = NonFiniteGuard(stop=2)
    out_BV = finite(torch.empty(5, 0), torch.tensor(rows))
    assert out_BV[0].tolist() == rows[0]
    assert out_BV[1:].tolist() == [[-inf, -inf, 0.0]] * 4  # ended there
    finite(torch.empty(5, 0), torch.tensor([fine] * 4 + [[nan] * 3]))
    assert finite.first_bad_steps() == [None, 0, 0, 0, 0]
    late = NonFiniteGuard(stop=2)
    late(torch.empty(2, 0), torch.tensor([fine, fine]))
    late(torch.empty(2, 0), torch.tensor([fine, [nan] * 3]))
    assert late.first_bad_steps() == [None, 1]


def test_non_finite_scores_after_the_stop_token_are_ignored(model: Model) -> None:
    """A finished row gets padding until its batch is done."""
    backend = TransformersBackend(model)
    stop = backend._stop_ids()[0]
    word = model.chat.ids("a")[0]
    assert backend._reply([word, stop, stop], 8, 2) == Reply("a", 1, False)
    assert backend._reply([word, stop, stop], 8, 1) == Reply("", 1, False, NOT_FINITE)
    assert backend._reply([word, word], 2, None) == Reply("aa", 2, True)


# the end of turn of three families of chat models; in the last it is not a special token
FAMILIES = {
    "llama3": (
        "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] }}<|eot_id|>"
        "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        "<|eot_id|>",
        True,
    ),
    "qwen": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|im_end|>",
        True,
    ),
    "gemma": (
        "[bos]{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
        "{{ m['content'] }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        "<end_of_turn>",
        True,
    ),
}
FAMILIES["gemma, not special"] = (*FAMILIES["gemma"][:2], False)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_end_of_turn_ends_a_reply_and_is_never_in_it(models: dict[str, Path], family: str) -> None:
    """The tokenizer's EOS is another token, so only the template defines the end of turn."""
    template, turn, special = FAMILIES[family]
    model = load_model(str(models["qwen2"]), device="cpu")  # it has rows to spare for new tokens
    tokenizer = model.chat.tokenizer
    tokenizer.chat_template = template
    tokenizer.add_tokens([AddedToken(turn, special=special, normalized=False)])
    (end,) = tokenizer(turn, add_special_tokens=False)["input_ids"]
    assert end != tokenizer.eos_token_id
    model = replace(model, chat=Chat(tokenizer), stop_ids=())
    backend = TransformersBackend(model)
    requests = [prompt("hello", 1.0, sample=k, limit=40) for k in range(400)]
    replies = backend.complete(requests, lambda _: None)
    ids = model.chat.prompt_ids(requests[0].conversation)
    drawing = AncestralSampler(1.0, [stream(ids, 1.0, k, 0) for k in range(400)])
    drawn = [new for new, _ in backend._generate_ids([ids] * 400, 40, drawing)]
    ended = 0
    for reply, row in zip(replies, drawn, strict=True):
        assert turn not in reply.text
        if end in row and tokenizer.eos_token_id not in row[: row.index(end)]:
            ended += 1
            assert (reply.new_tokens, reply.cut) == (row.index(end), False)
            assert reply.text == model.chat.decode(row[: row.index(end)]).strip()
            assert set(row[row.index(end) :]) <= {end, *backend._stop_ids()}  # nothing is sampled after it
    assert ended > 10
    assert any(r.cut for r in replies)
    others = tuple(i for i in range(model.lm.config.vocab_size) if i != end)
    always = replace(model, head=replace(model.head, blocked=others))  # the only token left
    assert TransformersBackend(always).complete([prompt("hello")], lambda _: None) == [Reply("", 0, False)]


def test_a_prompt_that_exceeds_the_context_is_an_error_or_a_failure(models: dict[str, Path]) -> None:
    model = load_model(str(models["llama"]), device="cpu")
    requests = [Request([{"role": "user", "content": text}], 4) for text in ("3 + 4?", "word " * 3000, "1 + 1?")]
    with pytest.raises(LeewayError, match="exceed its context of 2048"):
        TransformersBackend(model).complete(requests, lambda _: None)
    ticks: list[int] = []
    replies = TransformersBackend(model, overlong="failure").complete(requests, ticks.append)
    assert sum(ticks) == 3
    assert replies[1].failure is not None
    assert "exceed its context of 2048" in replies[1].failure
    assert [replies[0], replies[2]] == TransformersBackend(model).complete([requests[0], requests[2]], lambda _: None)
    assert not is_retryable(f"no answer: {replies[1].failure}")
    assert is_retryable("no answer: HTTP 500")
