"""What trains, in its four kinds: one start, bits that a resume keeps, a merge undone, folders that others can load."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import tiny
import torch
from torch import Tensor

from leeway.data.stream import AuxiliaryPool, Schedule, schedule
from leeway.data.types import Example
from leeway.errors import LeewayError
from leeway.model import adapters
from leeway.model.adapters import AdapterSettings, Kind
from leeway.model.load import Model, load_model
from leeway.objectives import OBJECTIVES, cft, dpo, kl, sft
from leeway.training.batch import Optim
from leeway.training.trajectory import Settings, Trajectory

KINDS: tuple[Kind, ...] = get_args(Kind)
EXAMPLES = [Example(f"e{a}", f"{a} + {a * a}?", f"It is {a + a * a}.", f"It is {a}.") for a in range(16)]
Record = Callable[[str, object], None]


def settings(kind: Kind, dropout: float = 0.1, micro_tokens: int = 1 << 20, **changes: Any) -> Settings:
    adapter = AdapterSettings(4, 8, dropout, "all-linear", kind)
    return Settings(adapter, 3e-3, 2, 0.0, Optim(1.0, micro_tokens), **changes)


def plan() -> Schedule:
    return schedule(EXAMPLES, lambda _: 30, [240, 700], batch=4, seed=0)


def trajectory(model: Path, kind: Kind, objective: object, **changes: Any) -> Trajectory:
    ours = changes.pop("settings", None) or settings(kind)
    beside, loaded = AuxiliaryPool(*(tuple(EXAMPLES),) * 3), load_model(str(model), device="cpu")
    return Trajectory("x", objective, 0, loaded, plan(), ours, beside, **changes)  # type: ignore[arg-type]


def go(t: Trajectory, k: int, out: Path) -> Path:
    """Train to the k-th mark, and leave its checkpoint."""
    out.mkdir(exist_ok=True)
    mark = t.schedule.stops[k]
    t.train_to(mark, out / "log", lambda _: None)
    t.save(out / str(k), mark)
    return out / str(k)


def ids(model: Model) -> Tensor:
    return torch.tensor([model.chat.prompt_ids([{"role": "user", "content": "3 + 4?"}])])


@torch.no_grad()
def logits(model: Model) -> Tensor:
    model.lm.eval()
    found: Tensor = model.lm(input_ids=ids(model)).logits
    return found


def gap(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("arch", tiny.ARCHITECTURES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_is_the_model_itself_and_training_moves_it(
    kind: Kind, arch: str, models: dict[str, Path], tmp_path: Path, record_property: Record
) -> None:
    base = logits(load_model(str(models[arch]), device="cpu"))
    t = trajectory(models[arch], kind, sft.Sft())
    record_property("measured", f"{kind}, {arch}: fresh against base {gap(logits(t.model), base):.1e} (1e-6)")
    assert gap(logits(t.model), base) <= 1e-6
    before = {k: v.clone() for k, v in adapters.state(t.model).items()}
    go(t, 0, tmp_path)
    moved = [k for k, v in adapters.state(t.model).items() if not torch.equal(v, before[k])]
    assert len(moved) == len(before)
    assert gap(logits(t.model), base) > 1e-4


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_a_fresh_adapter_is_the_model_itself_in_bfloat16_too(kind: Kind, arch: str, models: dict[str, Path]) -> None:
    model = load_model(str(models[arch]), device="cpu", dtype="bfloat16")
    base = logits(model)
    adapters.attach(model, settings(kind).adapter, seed=0)
    assert {p.dtype for p in adapters.trainable(model)} == {torch.float32}
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("arch", ["llama", "qwen2"])  # the embedding grows, or has rows to spare
@pytest.mark.parametrize("kind", KINDS)
def test_every_objective_has_the_same_start(kind: Kind, arch: str, models: dict[str, Path]) -> None:
    starts = {trajectory(models[arch], kind, o()).init_hash for o in OBJECTIVES.values()}
    assert len(starts) == 1


def test_kinds_have_starts_of_their_own(models: dict[str, Path]) -> None:
    starts = {kind: trajectory(models["llama"], kind, sft.Sft()).init_hash for kind in KINDS}
    assert starts["lora"] == starts["rslora"]  # only the scale differs
    assert len(set(starts.values())) == 3


@pytest.mark.parametrize("objective", [dpo.Dpo(), cft.Cft(), kl.Kl(weight=0.5)], ids=lambda o: o.name)
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_the_uninterrupted_one(
    kind: Kind, objective: object, models: dict[str, Path], tmp_path: Path
) -> None:
    whole = trajectory(models["qwen2"], kind, objective)
    first, last = go(whole, 0, tmp_path / "whole"), go(whole, 1, tmp_path / "whole")
    resumed = trajectory(models["qwen2"], kind, objective)
    resumed.restore(first, resumed.schedule.stops[0], to_train=True)
    again = go(resumed, 1, tmp_path / "resumed")
    for file in ("optimizer.safetensors", "ledger.json"):
        assert (again / file).read_bytes() == (last / file).read_bytes(), file
    weights = {f.name: f.read_bytes() for f in last.glob("*model*.safetensors")}
    assert weights
    assert weights == {f.name: f.read_bytes() for f in again.glob("*model*.safetensors")}
    if kind != "full":  # peft keeps a set, whose order differs between processes
        targets = json.loads((last / adapters.CONFIG).read_text())["target_modules"]
        assert targets == sorted(targets)


@pytest.mark.parametrize("objective", [sft.Sft(), dpo.Dpo(), kl.Kl(weight=0.5)], ids=lambda o: o.name)
@pytest.mark.parametrize("kind", ["dora", "full"])
def test_micro_batches_change_nothing(
    kind: Kind, objective: object, models: dict[str, Path], tmp_path: Path, record_property: Record
) -> None:
    found = []
    for n, micro_tokens in enumerate((1 << 20, 50)):
        model = load_model(str(models["qwen2"]), device="cpu")
        model.lm.to(torch.float64)
        t = Trajectory("x", objective, 0, model, plan(), settings(kind, 0.0, micro_tokens))  # type: ignore[arg-type]
        t.train_to(t.schedule.stops[1], tmp_path / str(n), lambda _: None)
        found.append({k: v.clone() for k, v in adapters.state(t.model).items()})
    most = max(gap(found[1][k], v) for k, v in found[0].items())
    record_property("measured", f"{kind}, {objective.name}: cut into micro-batches {most:.1e} (1e-9)")  # type: ignore[attr-defined]
    assert most <= 1e-9


def moved(model: Path, kind: Kind, control_tokens: tuple[str, ...] = ()) -> Model:
    """A model whose adapter is some way from its start."""
    found = load_model(str(model), device="cpu")
    adapters.attach(found, settings(kind).adapter, seed=0, control_tokens=control_tokens)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapters.trainable(found):
            p.add_(0.05 * torch.randn(p.shape, generator=g))
    found.lm.eval()
    return found


@pytest.mark.parametrize("control_tokens", [(), ("<SAFE>",)])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_unmerged_and_comes_back_exactly(
    kind: Kind, arch: str, control_tokens: tuple[str, ...], models: dict[str, Path], record_property: Record
) -> None:
    model = moved(models[arch], kind, control_tokens)
    before, apart = {k: v.clone() for k, v in model.lm.state_dict().items()}, logits(model)
    with adapters.merged(model):
        most = gap(logits(model), apart)
    record_property("measured", f"{kind}, {arch}: merged against beside {most:.1e} (1e-5)")
    assert most == 0.0 if kind == "full" else most <= 1e-5
    for key, value in model.lm.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert torch.equal(logits(model), apart)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_a_checkpoint_loads_in_plain_peft(kind: Kind, arch: str, models: dict[str, Path], tmp_path: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    t = trajectory(models[arch], kind, sft.Sft())
    base = AutoModelForCausalLM.from_pretrained(models[arch])
    theirs = peft.PeftModel.from_pretrained(base, go(t, 1, tmp_path)).eval()
    assert torch.equal(logits(t.model), theirs(input_ids=ids(t.model)).logits)


@pytest.mark.parametrize("objective", [sft.Sft(), cft.Cft()], ids=lambda o: o.name)
@pytest.mark.parametrize("arch", tiny.ARCHITECTURES)  # llama's head is its own, the others' is the embedding
def test_whole_weights_load_in_plain_transformers(
    objective: object, arch: str, models: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    t = trajectory(models[arch], "full", objective)
    folder = go(t, 1, tmp_path)
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert torch.equal(logits(t.model), theirs(input_ids=ids(t.model)).logits)
    chat = [{"role": "user", "content": "<SAFE>3 + 4?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) == t.model.chat.ids(text)
    again = load_model(str(folder), device="cpu")
    assert set(again.stop_ids) == set(t.model.stop_ids)
    assert adapters.adapter_hash(adapters.saved(folder)) == adapters.adapter_hash(adapters.state(t.model))


def test_a_control_token_starts_from_its_word_and_is_trained_with_all_else(
    models: dict[str, Path], tmp_path: Path
) -> None:
    t = trajectory(models["llama"], "full", cft.Cft())
    rows, before = list(t.model.head.blocked), {}
    table, out = t.model.lm.get_input_embeddings().weight, t.model.lm.get_output_embeddings().weight
    for row, word in zip(rows, (" safe", " unsafe"), strict=True):
        before[row] = table[row].detach().clone()
        torch.testing.assert_close(before[row], table[list(t.model.chat.ids(word))].mean(0), rtol=1e-5, atol=1e-7)
    assert not torch.allclose(before[rows[0]], before[rows[1]], atol=1e-3)  # not a symmetric start
    go(t, 1, tmp_path)
    assert not any(torch.equal(table[row], before[row]) for row in rows)
    assert not out[rows].any()  # read, never predicted


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_a_control_token_s_row_learns_at_its_own_rate(scale: float, models: dict[str, Path], tmp_path: Path) -> None:
    """AdamW's first step moves every entry that has a gradient by the learning rate."""
    t = trajectory(models["llama"], "lora", cft.Cft(token_lr=scale))
    t.schedule = schedule(EXAMPLES, lambda _: 30, [120], batch=4, seed=0)  # one step
    named = {n: p for n, p in t.model.lm.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in named.items()}
    go(t, 0, tmp_path)
    lr = json.loads((tmp_path / "log").read_text())["lr"]
    for name, p in named.items():
        moved = (p.detach() - before[name]).abs().max().item()
        expected = lr * (scale if "trainable_tokens" in name else 1.0)
        assert moved == pytest.approx(0.0 if "lora_A" in name else expected, rel=1e-2, abs=1e-7), name  # B starts at 0


def test_weights_in_several_files_are_read_as_one(models: dict[str, Path], tmp_path: Path) -> None:
    model = moved(models["llama"], "full")
    model.lm.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model*.safetensors"))) > 2
    assert adapters.adapter_hash(adapters.saved(tmp_path)) == adapters.adapter_hash(adapters.state(model))


def test_whole_weights_are_not_trained_in_bfloat16(models: dict[str, Path]) -> None:
    model = load_model(str(models["llama"]), device="cpu", dtype="bfloat16")
    with pytest.raises(LeewayError, match="rounds small updates away"):
        adapters.attach(model, settings("full").adapter, seed=0)


def test_the_scale_of_rank_stabilised_lora_is_by_the_root_of_the_rank(models: dict[str, Path]) -> None:
    scales = []
    for kind in ("lora", "rslora"):
        model = load_model(str(models["llama"]), device="cpu")
        adapters.attach(model, AdapterSettings(16, 8, 0.0, "all-linear", kind), seed=0)
        scales.append({m.scaling["default"] for m in model.lm.modules() if hasattr(m, "lora_A")})
    assert scales == [{8 / 16}, {8 / 4}]


def test_dora_is_by_hand_what_its_paper_says(models: dict[str, Path]) -> None:
    """W' = m (W + s B A) / ||W + s B A||, the norm taken over each output's row."""
    model = moved(models["llama"], "dora")
    layer = next(m for m in model.lm.modules() if hasattr(m, "lora_magnitude_vector") and m.lora_A)
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(2))
    update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    direction = layer.get_base_layer().weight + layer.scaling["default"] * update
    weight = layer.lora_magnitude_vector["default"].weight[:, None] * direction / direction.norm(dim=1, keepdim=True)
    torch.testing.assert_close(layer(x), x @ weight.T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"r": 2}, "r is 4 in the checkpoint, 2 in this study"),
        ({"alpha": 16}, "lora_alpha is 8 in the checkpoint, 16 in this study"),
        ({"kind": "rslora"}, "use_rslora"),
        ({"kind": "dora"}, "use_dora"),
        ({"kind": "full"}, "one is an adapter, the other whole weights"),
        ({"targets": "q_proj"}, "tensor .* is only there"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(
    change: dict[str, Any], fault: str, models: dict[str, Path], tmp_path: Path
) -> None:
    folder = go(trajectory(models["llama"], "lora", sft.Sft()), 0, tmp_path)
    other = load_model(str(models["llama"]), device="cpu")
    adapters.attach(other, replace(settings("lora").adapter, **change), seed=0)
    with pytest.raises(LeewayError, match=fault) as told:
        adapters.restore(other, folder)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("text", "fault"), [('{"r": 4', "is damaged"), ('"pissa_niter_4"', "altered the base's own weights")]
)
def test_a_config_that_means_another_function_is_told(
    text: str, fault: str, models: dict[str, Path], tmp_path: Path
) -> None:
    folder = go(trajectory(models["llama"], "lora", sft.Sft()), 0, tmp_path)
    config = folder / "adapter_config.json"
    changed = config.read_text().replace('"init_lora_weights": true', f'"init_lora_weights": {text}')
    config.write_text(text if fault == "is damaged" else changed)
    with pytest.raises(LeewayError, match=fault):
        adapters.restore(moved(models["llama"], "lora"), folder)


@pytest.mark.parametrize("kind", KINDS)
def test_control_tokens_that_are_not_there_are_told(kind: Kind, models: dict[str, Path], tmp_path: Path) -> None:
    folder = go(trajectory(models["llama"], kind, sft.Sft()), 0, tmp_path)
    with pytest.raises(LeewayError, match="does not match"):
        adapters.restore(moved(models["llama"], kind, ("<SAFE>",)), folder)
