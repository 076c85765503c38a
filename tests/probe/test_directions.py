"""The refusal direction: its definition, its choice, its file, and files that do not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from probe_contexts import adapted, tiny_context
from safetensors.torch import save_file

from leeway.errors import LeewayError
from leeway.model.load import load_model
from leeway.probe import directions, geometry, token_depth, weights
from leeway.probe.context import HarmfulAnswer, ProbeContext, random_units, states
from leeway.probe.directions import Candidate, Directions
from leeway.probe.pair import ModelPair
from leeway.probe.prompts import ProbePrompt, split_prompts


@pytest.fixture(scope="module")
def context(models: dict[str, Path]) -> ProbeContext:
    """A tiny Llama under a LoRA that has moved."""
    return tiny_context(ModelPair.of(adapted(models["llama"], "lora")))


def made_of(context: ProbeContext) -> Directions:
    """The differences in means, with the last position of the first layer as the chosen one."""
    by_kind = [states(context, context.pair.base, context.prompts.of("direction", k)) for k in ("harmful", "harmless")]
    mean_LPD = by_kind[0].mean(1) - by_kind[1].mean(1)
    names = context.positions.names
    chosen = Candidate(0, names[-1], -1.0, 1.0, 0.05, True, True)
    hashes = (context.model.hash, context.prompts.hash, context.tree.hash)
    return Directions(mean_LPD, torch.ones(mean_LPD.shape[:2]), names, 0, names[-1], (chosen,), *hashes, (1.0, -1.0))


def test_a_direction_is_the_difference_of_plain_means(context: ProbeContext, models: dict[str, Path]) -> None:
    """By unpadded passes of the plain model and its own list of hidden states."""
    plain = load_model(str(models["llama"]), device="cpu", dtype="float32")
    means = []
    for kind in ("harmful", "harmless"):
        kept = []
        for ids in context.ids(context.prompts.of("direction", kind)):
            with torch.no_grad():
                hidden = plain.lm.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
            kept.append(hidden[1][0, -context.positions.window :].double())  # after the first block
        means.append(torch.stack(kept).mean(0))
    torch.testing.assert_close(made_of(context).mean_LPD[0].double(), means[0] - means[1], rtol=1e-4, atol=1e-6)


def test_a_model_that_refuses_the_wrong_prompts_has_no_direction(context: ProbeContext) -> None:
    """With harmful and harmless prompts exchanged the gap changes its sign, so one of the two orders has none."""
    other = {"harmful": "harmless", "harmless": "harmful"}
    exchanged = {s: tuple(replace(p, kind=other[p.kind]) for p in own) for s, own in context.prompts.sets.items()}
    faults = []
    for sets in (context.prompts.sets, exchanged):
        try:
            directions.compute(replace(context, prompts=replace(context.prompts, sets=sets)))
        except LeewayError as error:
            faults.append(str(error))
    assert faults
    assert all("no direction mediates refusal in the base" in fault for fault in faults)


def test_a_file_of_directions_comes_back_as_it_was(context: ProbeContext, tmp_path: Path) -> None:
    own = made_of(context)
    own.save(tmp_path / "d.safetensors")
    again = Directions.load(tmp_path / "d.safetensors")
    assert torch.equal(again.mean_LPD, own.mean_LPD)
    assert replace(again, mean_LPD=own.mean_LPD, norm_LP=own.norm_LP) == replace(own)
    assert again.limits == ""
    names = context.positions.names
    again.check(own.model_hash, 32, 2, names)
    with pytest.raises(LeewayError, match=r"made on the model .*, and the base here is other"):
        again.check("other", 32, 2, names)
    again.check("other", 32, 2, names, other_model=True)
    with pytest.raises(LeewayError, match="made for 2 layers of width 32, and the model has 30 of 576"):
        again.check(own.model_hash, 576, 30, names)
    where = r"made at \d+ positions of a template \(.*\), and .* has 2 \(instruction, -1\)"
    with pytest.raises(LeewayError, match=where):
        again.check(own.model_hash, 32, 2, ("instruction", "-1"))


@pytest.mark.parametrize("damage", ["cut", "text", "other tensors", "another position", "not finite", "missing"])
def test_a_damaged_file_is_one_line(damage: str, context: ProbeContext, tmp_path: Path) -> None:
    path, own = tmp_path / "d.safetensors", made_of(context)
    if damage == "another position":
        own = replace(own, position="-9")
    elif damage == "not finite":
        own = replace(own, mean_LPD=own.mean_LPD * torch.nan)
    if damage != "missing":
        own.save(path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "text":
        path.write_text("not safetensors")
    elif damage == "other tensors":
        save_file({"mean": torch.zeros(2, 1, 4)}, path)
    with pytest.raises(LeewayError, match="not a file of directions") as raised:
        Directions.load(path)
    assert str(path) in str(raised.value)


def test_too_few_prompts_are_one_line() -> None:
    harmful = [ProbePrompt(f"h{i}", f"do {i}", "harmful") for i in range(30)]
    harmless = [ProbePrompt(f"b{i}", f"say {i}", "harmless") for i in range(12)]
    with pytest.raises(LeewayError, match=r"prompts for .*, of (12|30) in all"):
        split_prompts(harmful, harmless, [], {}, count=8, selection=8)
    many = [ProbePrompt(f"h{i}", f"do {i}", "harmful") for i in range(60)]
    split = split_prompts(many, _more(60), [f"h{i}" for i in range(20)], {}, count=16, selection=8)
    ids = [p.id for own in split.sets.values() for p in own]
    assert len(ids) == len(set(ids))
    assert {p.id for p in split.of("test", "harmful")} <= {f"h{i}" for i in range(20)}
    assert not {p.id for p in split.of("direction", "harmful")} & {f"h{i}" for i in range(20)}


def _more(count: int) -> list[ProbePrompt]:
    return [ProbePrompt(f"c{i}", f"tell {i}", "harmless") for i in range(count)]


def test_geometry_of_a_model_and_itself_is_trivial(context: ProbeContext, models: dict[str, Path]) -> None:
    base = load_model(str(models["llama"]), device="cpu", dtype="float32")
    same = tiny_context(ModelPair.of(base, base))
    same.directions = made_of(context)
    values = geometry.measure(same)
    cosines = [v.value for v in values if v.measure in ("direction-cosine", "cka")]
    assert cosines == pytest.approx([1.0] * len(cosines), abs=1e-6)
    moved = replace(context, directions=made_of(context))
    changed = [v for v in geometry.measure(moved) if v.measure == "direction-cosine"]
    assert all(v.low <= v.value <= 1 and v.value < 0.999 for v in changed)
    assert {v.detail for v in values if v.measure == "direction-auroc-category"} <= {"0", "1"}


def test_weights_along_the_direction_and_their_rank(context: ProbeContext) -> None:
    """Of a LoRA of rank 4; the share along r̂ of all directions of a basis squares to 1."""
    found = weights.measure(replace(context, directions=made_of(context)))
    ranks = [v.value for v in found if v.measure == "stable-rank"]
    assert all(1 <= r <= 4 for r in ranks)
    shares = [v for v in found if v.measure == "weight-on-direction"]
    assert [v.control for v in shares] == pytest.approx([32**-0.5] * len(shares))
    assert all(0 <= v.value <= 1 for v in shares)
    matrix = torch.randn(8, 5)
    assert weights.stable_rank(torch.outer(matrix[:, 0], matrix[0])) == pytest.approx(1, abs=1e-5)
    assert weights.stable_rank(torch.eye(6)) == pytest.approx(6)


def test_divergence_along_an_answer_equals_plain_passes(context: ProbeContext, models: dict[str, Path]) -> None:
    answers = [HarmfulAnswer(f"h/{i}", f"How {i}?", "The answer is " + "7 " * i) for i in range(1, 10)]
    values = token_depth.measure(replace(context, answers=answers))
    plain = load_model(str(models["llama"]), device="cpu", dtype="float32")
    for answer in answers[::4]:
        own = [v for v in values if v.item_id == answer.item_id]
        sequence = context.model.chat.sequence(answer.prompt, answer.answer)
        ids = torch.tensor([sequence.ids])
        with torch.no_grad():
            p, q = (lm(ids).logits[0].double().log_softmax(-1) for lm in (context.model.lm, plain.lm))
        kl = (p.exp() * (p - q)).sum(-1)[sequence.target_start - 1 :]
        length = len(sequence.ids) - len(context.model.chat.closing_ids) - sequence.target_start
        assert [v.value for v in own] == pytest.approx([float(x) for x in kl[: min(32, length)]], abs=1e-5)
    few = token_depth.measure(replace(context, answers=answers[:3]))
    assert few[0].reason == "3 harmful answers to the test prompts in the study's rows: too few"


def test_random_directions_are_unit_and_each_prompts_own() -> None:
    units_BD = random_units(16, "x", 1, prompts=["a", "b"])
    torch.testing.assert_close(units_BD.norm(dim=-1), torch.ones(2))
    assert not torch.allclose(units_BD[0], units_BD[1])
    assert torch.equal(units_BD, random_units(16, "x", 1, prompts=["a", "b"]))
