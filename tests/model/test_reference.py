"""The reference: who it is, that training never moves it, and that each way of having it says the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

from leeway.data.stream import AuxiliaryPool, schedule
from leeway.data.types import Example
from leeway.errors import LeewayError
from leeway.model import adapters
from leeway.model.adapters import AdapterSettings, Kind
from leeway.model.forward import target_stats
from leeway.model.load import load_model
from leeway.model.packing import pack_batch
from leeway.model.reference import Reference, ReferenceCache, as_reference, freeze
from leeway.objectives import cft, dpo, kl, kto, sft
from leeway.training.batch import Optim
from leeway.training.checkpoints import WarmStart
from leeway.training.trajectory import Settings, Trajectory

KINDS: tuple[Kind, ...] = get_args(Kind)
EXAMPLES = [Example(f"e{a}", f"{a} + {a * a}?", f"It is {a + a * a}.", f"It is {a}.") for a in range(16)]
COMPARED = [dpo.Dpo(), kl.Kl(weight=0.5), kl.Kl(weight=0.5, direction="forward"), kto.Kto()]
Record = Callable[[str, object], None]


def trajectory(
    model: Path,
    kind: Kind,
    objective: object,
    *,
    kept: Path | None = None,
    start: WarmStart | None = None,
    reference: str = "start",
    budgets: tuple[int, ...] = (240, 700),
    r: int = 4,
    dtype: torch.dtype = torch.float32,
) -> Trajectory:
    settings = Settings(
        AdapterSettings(r, 8, 0.1, "all-linear", kind), 3e-3, 2, 0.0, Optim(1.0, 200),
        references=None if kept is None else ReferenceCache(kept),
    )  # fmt: skip
    plan = schedule(EXAMPLES, lambda _: 30, budgets, batch=4, seed=0)
    loaded = load_model(str(model), device="cpu")
    loaded.lm.to(dtype)
    beside = AuxiliaryPool(task=tuple(EXAMPLES))
    return Trajectory("x", objective, 0, loaded, plan, settings, beside, start, reference)  # type: ignore[arg-type]


def go(t: Trajectory, k: int, out: Path) -> Path:
    """Train to the k-th mark, and leave its checkpoint."""
    out.mkdir(exist_ok=True)
    t.train_to(t.schedule.stops[k], out / "log", lambda _: None)
    t.save(out / str(k), t.schedule.stops[k])
    return out / str(k)


def steps(out: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / "log").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def weights(folder: Path) -> dict[str, bytes]:
    found = {f.name: f.read_bytes() for f in folder.glob("*model*.safetensors")}
    assert found
    return found


def answers(t: Trajectory) -> Tensor:
    """The reference's log-probabilities of the first step's answers, asked of the model itself."""
    examples = t._batch(1).rendered
    return t.compared.logps(t.model, pack_batch(examples, t.model.device), [s for e in examples for s in e])


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.fixture(scope="module")
def tuned(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, WarmStart]:
    """A first stage of each kind: SFT."""
    root = tmp_path_factory.mktemp("tuned")
    return {kind: WarmStart.of(go(trajectory(models["qwen2"], kind, sft.Sft()), 1, root / kind)) for kind in KINDS}


@pytest.mark.parametrize("which", ["start", "base"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_and_resuming_never_move_it(
    kind: Kind, which: str, tuned: dict[Kind, WarmStart], models: dict[str, Path], tmp_path: Path
) -> None:
    for start in (None, tuned[kind]):
        out = tmp_path / str(start is None)
        t = trajectory(models["qwen2"], kind, dpo.Dpo(), start=start, reference=which)
        before, folder = answers(t), go(t, 0, out)
        assert torch.equal(answers(t), before)
        resumed = trajectory(models["qwen2"], kind, dpo.Dpo(), start=start, reference=which)
        resumed.restore(folder, resumed.schedule.stops[0], to_train=True)
        assert torch.equal(answers(resumed), before)
        t.model.lm.train()
        random = torch.get_rng_state()
        assert torch.equal(answers(t), before)  # dropout is on for the policy, and off here
        assert torch.equal(torch.get_rng_state(), random)
        assert t.model.lm.training


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_model_that_was_named(kind: Kind, tuned: dict[Kind, WarmStart], models: dict[str, Path]) -> None:
    """The base: the model as loaded. The start: the first stage, as it was when it was saved."""
    plain = load_model(str(models["qwen2"]), device="cpu")
    first = load_model(str(models["qwen2"]), device="cpu")
    adapters.attach(first, AdapterSettings(4, 8, 0.1, "all-linear", kind), seed=7)
    adapters.restore(first, tuned[kind].folder)
    first.lm.eval()
    for model, which in ((plain, "base"), (first, "start")):
        t = trajectory(models["qwen2"], kind, dpo.Dpo(), start=tuned[kind], reference=which)
        batch = pack_batch(t._batch(1).rendered, model.device)
        with torch.no_grad():
            expected = target_stats(model, batch, None).logp_T  # type: ignore[arg-type]
        assert torch.equal(answers(t), expected), which


@pytest.mark.parametrize("kind", KINDS)
def test_its_hash_says_who_it_is(kind: Kind, tuned: dict[Kind, WarmStart], models: dict[str, Path]) -> None:
    def of(start: WarmStart | None, which: str, arch: str = "qwen2") -> str:
        return trajectory(models[arch], kind, dpo.Dpo(), start=start, reference=which).reference_hash

    plain = of(None, "start")
    assert of(None, "base") == of(tuned[kind], "base") == plain  # one and the same model
    assert len({plain, of(tuned[kind], "start"), of(None, "start", "qwen3")}) == 3


def test_what_has_changed_since_is_no_start(
    tuned: dict[Kind, WarmStart], models: dict[str, Path], tmp_path: Path
) -> None:
    other = replace(tuned["lora"], hash="0" * 16)
    with pytest.raises(LeewayError, match="has changed"):
        trajectory(models["qwen2"], "lora", sft.Sft(), start=other)
    with pytest.raises(LeewayError, match="missing"):
        WarmStart.of(tmp_path)


@pytest.mark.parametrize(
    ("first", "second", "r", "objective"),
    [
        ("lora", "full", 4, sft.Sft()),
        ("full", "lora", 4, sft.Sft()),
        ("lora", "dora", 4, sft.Sft()),
        ("lora", "lora", 2, sft.Sft()),
        ("lora", "lora", 4, cft.Cft()),
    ],
)
def test_a_start_that_does_not_fit_is_told_in_one_line(
    first: Kind, second: Kind, r: int, objective: object, tuned: dict[Kind, WarmStart], models: dict[str, Path]
) -> None:
    with pytest.raises(LeewayError, match="does not match this study") as told:
        trajectory(models["qwen2"], second, objective, start=tuned[first], r=r)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("which", ["start", "base"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_second_stage_that_is_resumed_is_the_uninterrupted_one(
    kind: Kind, which: str, kept: bool, tuned: dict[Kind, WarmStart], models: dict[str, Path], tmp_path: Path
) -> None:
    def second() -> Trajectory:
        return trajectory(
            models["qwen2"],
            kind,
            kl.Kl(weight=0.5),
            kept=tmp_path / "kept" if kept else None,
            start=tuned[kind],
            reference=which,
            budgets=(240, 900),
        )  # more than one epoch; fmt: skip

    whole = second()
    first, last = go(whole, 0, tmp_path / "whole"), go(whole, 1, tmp_path / "whole")
    resumed = second()
    assert resumed.init_hash == whole.init_hash
    resumed.restore(first, resumed.schedule.stops[0], to_train=True)
    again = go(resumed, 1, tmp_path / "resumed")
    assert weights(again) == weights(last)
    assert (again / "ledger.json").read_bytes() == (last / "ledger.json").read_bytes()
    after = resumed.schedule.stops[0].step
    assert steps(tmp_path / "resumed") == steps(tmp_path / "whole")[after:]


def test_a_second_stage_begins_where_the_first_one_ended(tuned: dict[Kind, WarmStart], models: dict[str, Path]) -> None:
    for kind, start in tuned.items():
        t = trajectory(models["qwen2"], kind, sft.Sft(), start=start)
        assert adapters.adapter_hash(adapters.state(t.model)) == start.hash
        assert t.init_hash != trajectory(models["qwen2"], kind, sft.Sft()).init_hash


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_a_frozen_copy_says_what_the_disabled_adapter_says(
    kind: Kind, models: dict[str, Path], tmp_path: Path, record_property: Record
) -> None:
    t = trajectory(models["gemma2"], kind, dpo.Dpo())
    frozen = Reference("frozen", freeze(t.model))
    go(t, 0, tmp_path)
    disabled, t.compared = answers(t), frozen
    most = gap(answers(t), disabled)
    record_property("measured", f"{kind}: frozen copy against adapter off {most:.1e} (1e-6)")
    assert most <= 1e-6


@pytest.mark.parametrize("objective", COMPARED, ids=repr)
@pytest.mark.parametrize("kind", KINDS)
def test_asked_beforehand_it_says_what_it_says_live(
    kind: Kind, objective: object, models: dict[str, Path], tmp_path: Path, record_property: Record
) -> None:
    """Within rounding: live, a sequence goes through beside others."""
    for kept in (False, True):
        t = trajectory(models["gemma2"], kind, objective, kept=tmp_path / "kept" if kept else None, budgets=(480, 960))
        go(t, 0, tmp_path / str(kept))
        go(t, 1, tmp_path / str(kept))
    live, kept_ = steps(tmp_path / "False"), steps(tmp_path / "True")
    most = max(abs(a["loss"] - b["loss"]) / abs(a["loss"]) for a, b in zip(live, kept_, strict=True))
    record_property("measured", f"{kind}, {objective.name}: loss, precomputed against live {most:.1e} (1e-5)")  # type: ignore[attr-defined]
    assert most <= 1e-5
    tokens = [[step["reference_tokens"] for step in log] for log in (live, kept_)]
    assert all(tokens[0])
    assert tokens[1] == new_tokens(t)
    if not t._batch(1).baseline:  # whose mismatched pairs are other ones in each epoch
        assert not any(tokens[1][4:])
    assert sum(tokens[1]) < sum(tokens[0])


def new_tokens(t: Trajectory) -> list[int]:
    """Tokens of the sequences that each step is the first to need."""
    seen: set[object] = set()
    found = []
    for k in range(1, len(t.schedule.steps) + 1):
        b = t._batch(k)
        here = {(s.ids, s.start) for part in (b.rendered, b.baseline) for example in part for s in example} - seen
        seen |= here
        found.append(sum(len(ids) for ids, _ in here))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_asked_beforehand_it_answers_what_it_would_have(kind: Kind, models: dict[str, Path], tmp_path: Path) -> None:
    """Each sequence's statistics, kept, are the bits of the same sequence asked alone."""
    t = trajectory(models["qwen2"], kind, kl.Kl(weight=0.5), kept=tmp_path / "kept")
    live = trajectory(models["qwen2"], kind, kl.Kl(weight=0.5))
    d = trajectory(models["qwen2"], kind, dpo.Dpo(), kept=tmp_path / "kept")  # reads states that KL had kept
    go(t, 0, tmp_path)
    d.precompute_reference()
    for (s,) in t._batch(2).rendered:
        alone = pack_batch([[s]], live.model.device), [s]
        assert torch.equal(t.compared.hidden(t.model, *alone), live.compared.hidden(live.model, *alone))
        assert torch.equal(d.compared.logps(d.model, *alone), live.compared.logps(live.model, *alone))


@pytest.mark.parametrize("objective", [dpo.Dpo(), kl.Kl(weight=0.5)], ids=lambda o: o.name)
def test_packed_rows_are_asked_beforehand_too(objective: object, models: dict[str, Path], tmp_path: Path) -> None:
    found = []
    for kept in (False, True):
        t = trajectory(models["llama"], "lora", objective, kept=tmp_path / "kept" if kept else None)
        t.settings = replace(t.settings, loop=replace(t.settings.loop, layout="packed"))
        go(t, 1, tmp_path / str(kept))
        found.append(steps(tmp_path / str(kept)))
    for live, kept_ in zip(*found, strict=True):
        assert kept_["loss"] == pytest.approx(live["loss"], rel=1e-5)


def test_asked_beforehand_no_copy_of_the_weights_is_held(models: dict[str, Path], tmp_path: Path) -> None:
    t = trajectory(models["qwen2"], "full", dpo.Dpo(), kept=tmp_path / "kept")
    assert t.compared.frozen
    go(t, 0, tmp_path)
    assert t.compared.frozen is None
    with pytest.raises(ValueError, match="was released"), as_reference(t.model, t.compared):
        pass
    assert trajectory(models["qwen2"], "full", sft.Sft()).compared.frozen is None  # nobody asks


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma2"])  # a head of its own, and tied ones
def test_the_divergence_of_whole_weights_is_zero_at_their_start(
    arch: str, direction: str, models: dict[str, Path], tmp_path: Path, record_property: Record
) -> None:
    t = trajectory(models[arch], "full", kl.Kl(weight=1.0, direction=direction))  # type: ignore[arg-type]

    def divergence() -> tuple[Tensor, float]:
        batch = pack_batch(t._batch(1).rendered, t.model.device)
        theirs_TD = t.compared.hidden(t.model, batch, [])
        found = target_stats(t.model, batch, None, reference_hidden_TD=theirs_TD, direction=direction).kl_T  # type: ignore[arg-type]
        assert found is not None
        t.model.lm.zero_grad()
        found.sum().backward()
        return found.detach(), max(float(p.grad.abs().max()) for p in t.model.lm.parameters() if p.grad is not None)

    value, gradient = divergence()
    record_property("measured", f"{arch}, {direction}: gradient of the KL at the start {gradient:.1e} (1e-6)")
    assert torch.equal(value, torch.zeros_like(value))
    assert gradient <= 1e-6
    t.model.lm.zero_grad()
    go(t, 1, tmp_path)
    value, gradient = divergence()
    assert float(value.min()) > 0.0
    assert gradient > 1e-3


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_the_divergence_of_whole_weights_is_that_of_two_models(
    arch: str, models: dict[str, Path], tmp_path: Path, record_property: Record
) -> None:
    """The trained model beside a second copy of the start, each with all of its own logits."""
    t = trajectory(models[arch], "full", kl.Kl(weight=0.5), dtype=torch.float64)
    t.train_to(t.schedule.stops[1], tmp_path / "log", lambda _: None)
    base = load_model(str(models[arch]), device="cpu")
    base.lm.to(torch.float64)
    t.model.lm.eval()
    most = 0.0
    for (s,) in t._batch(1).rendered:
        batch = pack_batch([[s]], t.model.device)
        with torch.no_grad():
            theirs_TD = t.compared.hidden(t.model, batch, [s])
            found = target_stats(t.model, batch, None, reference_hidden_TD=theirs_TD).kl_T  # type: ignore[arg-type]
            p, q = (
                torch.distributions.Categorical(logits=lm(input_ids=torch.tensor([s.ids])).logits[0, s.start - 1 : -1])
                for lm in (t.model.lm, base.lm)
            )
        assert found is not None
        most = max(most, gap(found, torch.distributions.kl_divergence(p, q)))
    record_property("measured", f"{arch}: KL of whole weights against two models side by side {most:.1e} (1e-9)")
    assert most <= 1e-9
