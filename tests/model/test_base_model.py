"""One model in memory: whoever borrows it finds it as it was loaded, and leaves what a fresh one would have left."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_study import study
from torch import Tensor

from leeway.data.stream import AuxiliaryPool, schedule
from leeway.data.types import Example
from leeway.errors import LeewayError
from leeway.model import adapters
from leeway.model.adapters import AdapterSettings, Kind
from leeway.model.load import CHUNK, Model, SharedBaseModel, bits, load_model
from leeway.objectives import cft, dpo, kl
from leeway.study import worker
from leeway.study.executors.local import LocalExecutor
from leeway.study.jobs import jobs_of
from leeway.study.load import parse
from leeway.study.progress import Reporter
from leeway.study.run import run
from leeway.training.batch import Optim
from leeway.training.trajectory import Settings, Trajectory

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("without_report")]

EXAMPLES = [Example(f"e{a}", f"{a} + {a * a}?", f"It is {a + a * a}.", f"It is {a}.") for a in range(8)]
KINDS: tuple[Kind, ...] = ("lora", "dora", "full")  # rslora is lora under another scale


def adapter(kind: Kind) -> AdapterSettings:
    return AdapterSettings(4, 8, 0.1, "all-linear", kind)


def everything(model: Model) -> dict[str, Any]:
    """All that can be told from outside: tensors and how they are shared, modules, settings, tokens, head."""
    tensors = dict(model.lm.state_dict(keep_vars=True))
    return {
        "bytes": {k: t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for k, t in tensors.items()},
        "shapes": {k: (t.shape, t.dtype, t.requires_grad, t.grad) for k, t in tensors.items()},
        "shared": {k: min(o for o, u in tensors.items() if u is t) for k, t in tensors.items()},
        "modules": {k: (type(m), m.training, sorted(vars(m))) for k, m in model.lm.named_modules()},
        "hooks": [k for k, m in model.lm.named_modules() if m._forward_hooks or m._forward_pre_hooks],
        "config": model.lm.config.to_dict(),
        "rows": (model.lm.get_input_embeddings().num_embeddings, model.lm.get_output_embeddings().out_features),
        "head": (model.head.weight_VD is model.lm.get_output_embeddings().weight, model.head.blocked),
        "vocabulary": len(model.chat.tokenizer),
    }


def trained(model: Model, kind: Kind, objective: Any, out: Path) -> str:
    """The hash that a short trajectory ends with, measured merged on the way."""
    plan = schedule(EXAMPLES, lambda _: 30, [120, 240], batch=2, seed=0)
    settings = Settings(adapter(kind), 3e-3, 2, 0.0, Optim(1.0, 1 << 20))
    t = Trajectory("x", objective, 0, model, plan, settings, AuxiliaryPool(*(tuple(EXAMPLES),) * 3))
    out.mkdir()
    for k, mark in enumerate(plan.stops):
        t.train_to(mark, out / "log", lambda _: None)
        found = str(t.save(out / str(k), mark)["adapter_hash"])
        with adapters.merged(model):
            model.lm(input_ids=torch.tensor([[1, 2, 3]]))
    return found


@pytest.mark.parametrize("arch", ["llama", "qwen2"])  # untied, and its embedding grows; tied, with rows to spare
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_lent_again_is_what_was_loaded(kind: Kind, arch: str, models: dict[str, Path], tmp_path: Path) -> None:
    def fresh() -> Model:
        return load_model(str(models[arch]), device="cpu")

    objectives = {"dpo": dpo.Dpo(), "cft": cft.Cft(), "kl": kl.Kl(weight=0.5), "again": dpo.Dpo()}
    afresh = {name: trained(fresh(), kind, o, tmp_path / f"{name}-afresh") for name, o in objectives.items()}
    untouched, base = everything(fresh()), SharedBaseModel(fresh(), trained=kind == "full")
    for name, objective in objectives.items():
        model = base.checkout()
        assert everything(model) == untouched, name
        assert not adapters.is_low_rank(model)
        assert trained(model, kind, objective, tmp_path / name) == afresh[name], name
    assert everything(base.checkout()) == untouched
    assert afresh["dpo"] == afresh["again"]


def test_the_organism_comes_back_too(tmp_path: Path) -> None:
    base = SharedBaseModel(load_model("organism", device="cpu"))
    untouched = everything(base.checkout())
    trained(base.checkout(), "lora", cft.Cft(), tmp_path / "run")
    assert everything(base.checkout()) == untouched


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_base_that_is_not_what_was_loaded_is_an_error(kind: str, models: dict[str, Path]) -> None:
    base = SharedBaseModel(load_model(str(models["llama"]), device="cpu"), trained=kind == "full")
    weight = base.checkout().lm.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight[0, 0] += 1
    if kind == "full":  # it has a copy to come back from
        base.checkout()
        return
    with pytest.raises(LeewayError, match="weight changed after an adapter was removed"):
        base.checkout()


def test_a_merge_that_did_not_come_back_is_an_error(models: dict[str, Path]) -> None:
    model = load_model(str(models["llama"]), device="cpu")
    adapters.attach(model, adapter("lora"), seed=0)
    weight = model.lm.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight
    loaded = weight.data
    with pytest.raises(LeewayError, match="its weights changed while an adapter was merged"), adapters.merged(model):
        loaded[0, 0] += 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_bits_tell_every_single_change(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    values = torch.randn(CHUNK + 7, generator=g).to(dtype)

    def changed(*at: int) -> Tensor:
        other = values.clone()
        other[list(at)] = other[list(at)] == 0 if dtype == torch.bool else other[list(at)] + 1
        return other

    (before,) = bits([values])
    assert bits([values.clone()]) == (before,)
    for at in (0, 1, CHUNK - 1, CHUNK, CHUNK + 6):
        assert bits([changed(at)]) != (before,)
    swapped = values.clone()
    swapped[[0, CHUNK]] = changed(0)[[CHUNK, 0]]
    assert bits([swapped]) != (before,)


def test_bits_are_by_hand_what_they_say() -> None:
    """1 * 5 + 3 * (-2) + 5 * 7 = 34; -0.0 is not 0.0."""
    assert bits([torch.tensor([5, -2, 7])]) == (34,)
    assert bits([torch.tensor([-1])]) == (2**64 - 1,)
    assert bits([torch.tensor([0.0])]) != bits([torch.tensor([-0.0])])


def test_a_study_loads_its_model_once(
    models: dict[str, Path], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[str] = []
    real = worker.load_model
    monkeypatch.setattr(worker, "load_model", lambda name, **k: loads.append(name) or real(name, **k))  # type: ignore[func-returns-value]
    text = study(models["llama"], root, budgets="[200]", objectives="[sft, cft]")
    run(parse(text, "test"), tmp_path / "run", Reporter(quiet=True), "leeway run test", workers=1)
    assert len(loads) == 1


def test_while_jobs_run_only_the_running_worker_holds_the_model(
    models: dict[str, Path], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that it can free the model for a server or for ranks."""
    held: list[bool] = []
    real = LocalExecutor.run_jobs

    def watched(self: LocalExecutor, worker: Any, jobs: Any, on_event: Any) -> Iterator[Any]:
        for job in real(self, worker, jobs, on_event):
            held.append(worker._base is not None)
            yield job

    monkeypatch.setattr(LocalExecutor, "run_jobs", watched)
    text = study(models["llama"], root, budgets="[200]", objectives="[sft]")
    run(parse(text, "test"), tmp_path / "run", Reporter(quiet=True), "leeway run test", workers=1)
    assert held
    assert not any(held)


def test_what_is_measured_waits_for_its_checkpoint_alone(models: dict[str, Path], root: Path) -> None:
    from leeway.study.executors.local import ready
    from leeway.study.prepare import prepare

    pieces = jobs_of(prepare(parse(study(models["llama"], root, objectives="[sft, cft]"), "test")))
    base = [p for p in pieces if p.kind == "base"]
    trains = [p for p in pieces if p.kind == "train"]
    on_disk: set[tuple[str, int, int]] = set()
    assert ready(pieces, [], on_disk.__contains__) == [*base, *trains]
    on_disk.add(("cft", 0, 400))
    found = ready(pieces, [*base, *trains], on_disk.__contains__)
    assert {(p.kind, p.alias, p.budgets) for p in found} == {("measure", "cft", (400,))}
    assert [p.condition.name for p in found if p.condition] == ["<SAFE>", "plain", "<UNSAFE>"]
    left = [p for p in pieces if p not in base and p not in trains]
    first = replace(found[0], after=tuple(base))
    assert first.is_ready(left, on_disk.__contains__)
    assert not first.is_ready([*left, base[0]], on_disk.__contains__)


def test_a_checkpoint_is_measured_while_its_trajectory_trains_on(
    models: dict[str, Path], root: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    text = study(models["llama"], root, budgets="[200, 12000]", objectives="[sft]")
    run(parse(text, "test"), out, Reporter(quiet=True), "leeway run test", workers=2)
    last = (out / "checkpoints" / "sft" / "s0" / "12000" / "ledger.json").stat().st_mtime
    early = [p.stat().st_mtime for p in (out / "parts").glob("sft-s0-200-*")]
    assert len(early) == 3
    assert max(early) < last


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value: float, models: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(models["llama"], tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    name = next(k for k in tensors if "down_proj" in k)
    tensors[name][1, 2] = value
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(LeewayError, match=rf"{name} holds NaN or infinity; fetch or save the model again"):
        load_model(str(tmp_path / "model"))
    with pytest.raises(LeewayError, match=rf"here: {name} holds NaN or infinity"):
        adapters.require_finite("here", tensors.items())
