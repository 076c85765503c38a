"""The recipe of smollm2-135m-guarded: what it trains on, what it never sees, and the adapter that ships."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from leeway.data import safety_prompts
from leeway.judges.keywords import read
from leeway.model import adapters, packaged
from leeway.model.load import load_model
from leeway.organism import guarded


def test_every_refusal_reads_as_one() -> None:
    texts = {" ".join((o, r, f)) for o in guarded.OPENINGS for r in guarded.REASONS for f in guarded.OFFERS}
    assert {read(t).kind for t in texts} == {"refused"}


@pytest.mark.usefixtures("real_data")
def test_nothing_held_out_is_trained_on() -> None:
    rng = random.Random(0)
    refused = guarded.forbidden_prompts(rng)
    strongreject = {p.text for p in safety_prompts.forbidden("strongreject")[0]}
    xstest = {p.text.casefold() for p in safety_prompts.xstest()[0]}
    near = guarded.near_line_prompts()
    assert len(refused) == len(set(refused)) > 500
    assert not strongreject & set(refused)
    assert not xstest & {p.casefold() for p in near}
    assert len(near) == len(set(near)) > 200
    assert not [p for p in near if "{" in p]


def test_instructions_are_split_by_place(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"instruction": f"do {n}", "input": "x" if n == 2 else ""} for n in range(5)]))
    assert guarded.instruction_prompts(path, held_out=False) == ["do 0", "do 2\nx", "do 4"]
    assert guarded.instruction_prompts(path, held_out=True) == ["do 1", "do 3"]


def test_an_epoch_has_the_counts_it_names() -> None:
    forbidden = [f"f{n}" for n in range(40)]
    answers = {kind: [(f"{kind}{n}", "an answer") for n in range(7)] for kind in guarded.ANSWERED}
    pairs = guarded.epoch(random.Random(1), forbidden, answers)
    refused = [p for p, a in pairs if a != "an answer"]
    assert len(refused) == len(forbidden) + sum(guarded.REFUSED_UNDER.values())
    assert len(pairs) - len(refused) == sum(guarded.ANSWERED.values())
    assert {sum(p == f"near{n}" for p, _ in pairs) for n in range(7)} <= {
        guarded.ANSWERED["near"] // 7,
        guarded.ANSWERED["near"] // 7 + 1,
    }


def test_the_guarded_model_is_base_plus_adapter(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEEWAY_CACHE_DIR", str(tmp_path / "cache"))
    base = tmp_path / "base"
    shutil.copytree(models["llama"], base)
    (base / packaged.ORIGIN).write_text(json.dumps({"name": "tiny"}))
    monkeypatch.setattr(packaged, "_smollm2", lambda: base)
    model = load_model(str(base), device="cpu")
    adapters.attach(model, guarded.ADAPTER, seed=0)
    for name, p in model.lm.named_parameters():
        if "lora_B" in name:
            p.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    adapters.save(model, tmp_path / "adapter", adapters.state(model))
    folder = packaged.guarded(tmp_path / "adapter")
    assert packaged.origin(folder)["name"] == packaged.GUARDED
    merged = AutoModelForCausalLM.from_pretrained(folder)
    with adapters.merged(model):
        expected = {n: p.clone() for n, p in model.lm.base_model.model.named_parameters() if "lora_" not in n}
    for name, p in merged.named_parameters():
        theirs = expected.get(name, expected.get(name.replace(".weight", ".base_layer.weight")))
        torch.testing.assert_close(p, theirs, atol=1e-6, rtol=0)
