"""Drawn answers: softmax(logits / T) and nothing else, a stream for each request, and greedy as it ever was."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from leeway.generation.backend import Reply, Request
from leeway.generation.sampling import BLOCK, Ancestral, draw, stream
from leeway.generation.transformers import TransformersBackend
from leeway.model.load import Model, load_model


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def model(request: pytest.FixtureRequest, models: dict[str, Path]) -> Model:
    return load_model(str(models[request.param]), device="cpu")


def asked(text: str, temperature: float = 0.0, sample: int = 0, seed: int = 0, limit: int = 12) -> Request:
    return Request([{"role": "user", "content": text}], limit, temperature, sample, seed)


def answers(model: Model, requests: list[Request], batch: int = 128) -> list[Reply]:
    return TransformersBackend(model, batch=batch).complete(requests, lambda _: None)


PROMPTS = ["How many apples are there?", "Yes or no?", "3 + 4", "a"]


def test_near_zero_a_drawn_answer_is_the_greedy_one(model: Model) -> None:
    greedy = answers(model, [asked(p) for p in PROMPTS])
    assert answers(model, [asked(p, 1e-6) for p in PROMPTS]) == greedy


def test_greedy_answers_do_not_see_who_is_drawn_beside_them(model: Model) -> None:
    greedy = answers(model, [asked(p) for p in PROMPTS])
    mixed = answers(model, [asked(p, t) for p in PROMPTS for t in (0.0, 1.0)])
    assert mixed[::2] == greedy


def test_the_same_seed_is_the_same_text_and_another_sample_or_seed_another(model: Model) -> None:
    first = answers(model, [asked(p, 1.0) for p in PROMPTS])
    torch.manual_seed(1)
    assert answers(model, [asked(p, 1.0) for p in PROMPTS]) == first
    for other in ({"sample": 1}, {"seed": 1}, {"temperature": 0.9}):
        assert all(
            a.text != b.text
            for a, b in zip(first, answers(model, [replace(asked(p, 1.0), **other) for p in PROMPTS]), strict=True)
        )


def test_an_answer_does_not_depend_on_its_place_in_the_batch(model: Model) -> None:
    requests = [asked(p, 1.0, k) for p in PROMPTS for k in range(3)]
    backwards = answers(model, requests[::-1])[::-1]
    assert answers(model, requests) == backwards
    alone = [answers(model, [r])[0] for r in requests]
    assert alone == backwards  # the streams are the requests' own; in float32 on a CPU rounding changes none of these


@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])  # a random model is nearly uniform at 1
def test_next_tokens_come_as_often_as_softmax_says(model: Model, temperature: float) -> None:
    n, ids = 4000, model.chat.prompt_ids([{"role": "user", "content": "Yes"}])
    backend = TransformersBackend(model)
    streams = [stream(ids, temperature, k, 0) for k in range(n)]
    drawn = backend._generate([ids] * n, 1, Ancestral(temperature, streams))[:, 0]
    p_V = (model.lm(input_ids=torch.tensor([ids])).logits[0, -1].double() / temperature).softmax(-1)
    assert chi_square_p(torch.bincount(drawn, minlength=len(p_V)), p_V) > 0.001


def chi_square_p(counts_V: torch.Tensor, p_V: torch.Tensor) -> float:
    """Tokens expected fewer than five times are one cell."""
    expected_V = p_V * counts_V.sum()
    rare = expected_V < 5
    seen = [*counts_V[~rare].tolist(), counts_V[rare].sum().item()]
    due = [*expected_V[~rare].tolist(), max(expected_V[rare].sum().item(), 1e-9)]
    assert len(seen) > 20
    return float(stats.chisquare(seen, due, sum_check=False).pvalue)


def test_a_control_token_is_never_drawn(model: Model) -> None:
    """Even where it is by far the most probable."""
    ids = model.chat.prompt_ids([{"role": "user", "content": "Yes"}])
    likely = int(model.lm(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
    held = replace(model, head=replace(model.head, blocked=(likely,)))
    drawing = Ancestral(0.05, [stream(ids, 0.05, k, 0) for k in range(300)])
    drawn = TransformersBackend(held)._generate([ids] * 300, 1, drawing)
    assert likely not in drawn
    drawing = Ancestral(0.05, [stream(ids, 0.05, k, 0) for k in range(300)])
    assert likely in TransformersBackend(model)._generate([ids] * 300, 1, drawing)


@settings(deadline=None)
@given(st.integers(1, 3 * BLOCK), st.floats(0, 1, exclude_max=True), st.integers(0, 99))
def test_a_draw_is_the_quantile_of_the_running_sum(vocabulary: int, u: float, seed: int) -> None:
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
def test_a_temperature_is_a_number_from_zero(temperature: float) -> None:
    with pytest.raises(ValueError, match="a temperature of"):
        asked("a", temperature)
