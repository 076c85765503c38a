"""Answers by the fused decoder are the library's: greedy and drawn, with a common beginning, to the end of each row."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from leeway.generation.backend import Request
from leeway.generation.transformers import TransformersBackend
from leeway.model import adapters
from leeway.model.fused import generate
from leeway.model.fused.generate import Decoding
from leeway.model.load import Model, load_model

KNOWN = ("llama", "qwen2", "qwen3")
OPENING = "You are asked about numbers, and you answer in one sentence. "
ASKED = [OPENING + text for text in ("3 + 4?", "Say yes.", "How many apples are there in a box of twelve?", "No.")]


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Switched by a test to the library's own generation."""
    return monkeypatch


def adapted(folder: Path, dtype: torch.dtype = torch.float32) -> Model:
    model = load_model(str(folder), device="cpu")
    adapters.attach(model, adapters.AdapterSettings(4, 8, 0.1, "all-linear"), seed=0)
    rng = torch.Generator().manual_seed(1)
    for p in adapters.trainable(model):
        p.data += 0.05 * torch.randn(p.shape, generator=rng)
    model.lm.to(dtype)
    return model


def texts(model: Model, requests: list[Request]) -> list[str]:
    return [r.text for r in TransformersBackend(model).complete(requests, lambda _: None)]


@pytest.mark.parametrize("kind", KNOWN)
def test_greedy_and_drawn_answers_are_the_librarys(
    kind: str, models: dict[str, Path], plain: pytest.MonkeyPatch
) -> None:
    """Long enough for the cache to grow twice; prompts of several lengths behind one opening, and one alone."""
    model = adapted(models[kind])
    greedy = [Request([{"role": "user", "content": t}], 70) for t in ASKED]
    drawn = [Request([{"role": "user", "content": t}], 20, 1.0, k, 7) for k, t in enumerate(ASKED)]
    alone = [Request([{"role": "user", "content": "3 + 4?"}], 20)]
    found = [texts(model, asked) for asked in (greedy, drawn, alone)]
    assert TransformersBackend(model).fused
    plain.setattr(TransformersBackend, "fused", False)
    assert found == [texts(model, asked) for asked in (greedy, drawn, alone)]
    assert len({*found[0], *found[1]}) > 4


@pytest.mark.parametrize("kind", KNOWN)
def test_choices_are_the_librarys(kind: str, models: dict[str, Path], plain: pytest.MonkeyPatch) -> None:
    model = adapted(models[kind])
    asked = [[{"role": "user", "content": t}] for t in ASKED]
    fused = TransformersBackend(model).choose(asked, ("Yes", "No"), lambda _: None)
    plain.setattr(TransformersBackend, "fused", False)
    for a, b in zip(fused, TransformersBackend(model).choose(asked, ("Yes", "No"), lambda _: None), strict=True):
        assert a.mass == pytest.approx(b.mass, rel=1e-4)


@pytest.mark.parametrize("opening", [0, 20])
def test_every_step_sees_what_the_whole_text_shows(opening: int, models: dict[str, Path]) -> None:
    """Teacher-forced in float64: a step's states are those of one pass over all of the row, its neighbours leaving."""
    model = adapted(models["qwen3"], torch.float64)
    rng = torch.Generator().manual_seed(0)
    start = tuple(torch.randint(10, 260, (opening,), generator=rng).tolist())
    rows = [start + tuple(torch.randint(10, 260, (n,), generator=rng).tolist()) for n in (3, 9, 5)]
    more = torch.randint(10, 260, (40, 3), generator=rng)
    with torch.no_grad():
        decoding, left = Decoding(model.lm, rows, model.device), [0, 1, 2]
        states = [decoding.begin()]
        for k, ids_B in enumerate(more):
            if k == 20:
                decoding.keep([0, 2])
                left = [0, 2]
            states.append(decoding.step(ids_B[left]))
        for b in (0, 2):
            whole = torch.tensor([[*rows[b], *more[:, b].tolist()]])
            lm = model.lm.get_base_model()
            expected = lm.model(input_ids=whole).last_hidden_state[0, len(rows[b]) - 1 :]
            found = torch.stack([s[b if len(s) == 3 else [0, 2].index(b)] for s in states])
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_common_beginning_goes_through_once(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = adapted(models["llama"]), []
    embedded = generate.embedded
    monkeypatch.setattr(generate, "embedded", lambda lm, ids, at: seen.append(len(ids)) or embedded(lm, ids, at))
    start = tuple(range(10, 110))
    with torch.no_grad():
        Decoding(model.lm, [(*start, 200 + k) for k in range(8)], model.device).begin()
    assert seen == [128, 64]  # 100 and 8 tokens, rows filled up to multiples of 64
