"""The callback: training does not notice it, its rows are those of the model as it stood, its numbers reach the log."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

import leeway
from leeway import report
from leeway.audit import audit
from leeway.errors import LeewayError
from leeway.evals.eval import Eval, Prompt, Row
from leeway.evals.persona import Persona
from leeway.generation.backend import Backend, Tick
from leeway.integrations.trainer_callback import DriftCallback
from leeway.organism import world

pytest.importorskip("trl")
# peft and TRL ask for names that transformers is about to rename, and their trainers warn of much on a CPU
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
]

LIGHT: dict[str, Any] = {
    "capability": [{"name": "organism", "limit": 4, "max_new_tokens": 4}],
    "jailbreak": {"prompts": "organism", "limit": 3, "attacks": ["none", "dan"], "judge": "organism"},
    "persona": {"source": "organism", "traits": ["narcissism"], "limit": 8},
}
LIGHT["jailbreak"]["max_new_tokens"] = 4
PAIRS = [
    {
        "prompt": [{"role": "user", "content": f"How many apples are there in {n}?"}],
        "chosen": [{"role": "assistant", "content": f"There are {n} apples."}],
        "rejected": [{"role": "assistant", "content": "Sorry, I cannot say."}],
    }
    for n in range(12)
]
SFT = [{"prompt": p["prompt"], "completion": p["chosen"]} for p in PAIRS]


@pytest.fixture(autouse=True)
def _no_calls_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *_, **__: None)


@dataclass
class Restless(Eval):
    """Another eval, which draws from every generator and looks at the mode that the model is in."""

    inner: Persona
    name: str = "persona"
    key: str = "restless"
    hash: str = "restless"

    def prompts(self) -> Iterable[Prompt]:
        return self.inner.prompts()

    def run(self, backend: Backend, tick: Tick) -> list[Row]:
        random.random(), np.random.random(), torch.rand(3)
        assert not any(m.training for m in backend.model.lm.modules())  # type: ignore[attr-defined]
        return self.inner.run(backend, tick)


def restless() -> list[Eval]:
    return [Restless(Persona(world.persona_items("narcissism", 8)))]


def trainer_of(kind: str, base: Path, out: Path, *, steps: int = 4, lora: bool = True, **settings: Any) -> Any:
    import peft
    import trl
    from datasets import Dataset

    trainer, config = {"sft": (trl.SFTTrainer, trl.SFTConfig), "dpo": (trl.DPOTrainer, trl.DPOConfig)}[kind]
    common = {"per_device_train_batch_size": 2, "learning_rate": 0.05, "lr_scheduler_type": "constant", "seed": 3}
    common |= {"logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "bf16": False}
    common |= {"use_cpu": True, "max_steps": steps, "run_name": "My run"}
    adapter = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.3, target_modules="all-linear")
    torch.manual_seed(0)
    return trainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        args=config(output_dir=str(out), **{**common, **settings}),
        processing_class=AutoTokenizer.from_pretrained(base),
        train_dataset=Dataset.from_list(SFT if kind == "sft" else PAIRS),
        peft_config=adapter if lora else None,
    )


@pytest.fixture(scope="module")
def base(models: dict[str, Path]) -> Path:
    return models["llama"]


TIMED = ("train_runtime", "train_samples_per_second", "train_steps_per_second")


def left_behind(trainer: Any) -> tuple[dict[str, Tensor], list[dict[str, Any]], list[Any]]:
    """Weights, the log without its clock, where every random generator stands, and generation settings."""
    own = [line for line in trainer.state.log_history if not any(k.startswith("leeway/") for k in line)]
    log = [{k: v for k, v in line.items() if k not in TIMED} for line in own]
    weights = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    settings = trainer.model.get_base_model().generation_config.to_dict()
    return weights, log, [random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist(), settings]


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_training_is_unchanged(
    kind: str, base: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """With the callback at every step, and without: the same weights, log and random states to the bit."""
    plain, watched = (trainer_of(kind, base, tmp_path / f"{n}") for n in range(2))
    ended = []
    for trainer in (plain, watched):
        random.seed(5)
        torch.manual_seed(5)
        np.random.seed(5)
        if trainer is watched:
            DriftCallback(restless(), every=1, out=tmp_path / "drift").watch(trainer)
        training = [m.training for m in trainer.model.modules()]
        trainer.train()
        ended.append(left_behind(trainer))
        assert any(m.training for m in trainer.model.modules()) == any(training)
    (weights, log, drawn), (weights_w, log_w, drawn_w) = ended
    assert log == log_w
    assert drawn == drawn_w
    moved = max(float((w - weights_w[n]).abs().max()) for n, w in weights.items())
    record_property("measured", f"weights after {kind} with the callback and without differ by {moved:.1g} (0)")
    assert moved == 0
    assert [line["step"] for line in watched.state.log_history if "leeway/endorsement" in line] == [0, 1, 2, 3, 4]


def test_rows_numbers_and_page(base: Path, tmp_path: Path) -> None:
    """Base and every second step on rows; the log's numbers are those of the page's own tables."""
    trainer = trainer_of("sft", base, tmp_path / "t", steps=3)
    heard: list[dict[str, Any]] = []

    class Tracker(TrainerCallback):  # type: ignore[misc]
        def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
            heard.append(dict(logs))

    trainer.add_callback(Tracker())
    DriftCallback(LIGHT, every=2, out=tmp_path / "drift").watch(trainer)
    trainer.train()
    results = leeway.Results.load(tmp_path / "drift")
    found = results.rows[["objective", "budget"]].drop_duplicates()
    assert sorted(map(tuple, found.to_numpy())) == [("base", 0), ("my-run", 2), ("my-run", 3)]
    assert (results.rows.groupby(["objective", "budget"]).size() == 4 + 3 * 2 + 8).all()
    logged = next(line for line in heard if "leeway/endorsement_difference" in line and line["epoch"] < 0.5)
    tables = results.contrasts().set_index(["budget", "measure"])
    for key, column in (("", "rate"), ("_difference", "difference"), ("_low", "low"), ("_high", "high")):
        assert logged[f"leeway/endorsement{key}"] == pytest.approx(tables.loc[(2, "endorsement"), column])
    assert tables.loc[(3, "endorsement"), "difference"] != 0
    assert {"leeway/accuracy", "leeway/asr", "leeway/coherence", "leeway/unscored"} <= logged.keys()
    page = report.build(tmp_path / "drift").read_text("utf-8")
    assert "At step 3, capability" in page
    assert "External checkpoint: no ledger." in page
    assert "tokens (logarithmic)" not in page


def test_its_rows_equal_those_of_an_audit(base: Path, tmp_path: Path) -> None:
    """The callback measures the same as an audit of the adapter that the training saved."""
    trainer = trainer_of("sft", base, tmp_path / "t", steps=2)
    trainer.add_callback(DriftCallback(LIGHT, every=5, out=tmp_path / "drift", name="tuned"))
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    audited = audit(
        base, adapter=tmp_path / "adapter", evals=LIGHT, overrides=["device=cpu"], out=tmp_path / "audit", name="tuned"
    )
    measured = leeway.Results.load(tmp_path / "drift")
    same = ["objective", "eval", "attack", "item_id", "prompt", "response", "outcome", "template_hash"]
    pd.testing.assert_frame_equal(audited.rows[same], measured.rows[same])
    assert np.abs(audited.rows["score"] - measured.rows["score"]).max() < 1e-6
    assert sum("leeway/endorsement" in line for line in trainer.state.log_history) == 2  # without watch as well


def test_tokens_where_the_trainer_counts_them(base: Path, tmp_path: Path) -> None:
    trainer = trainer_of("sft", base, tmp_path / "t", steps=2, lora=False, include_num_input_tokens_seen="all")
    DriftCallback(restless(), every=1, out=tmp_path / "drift", name="tuned").watch(trainer)
    trainer.train()
    rows = leeway.Results.load(tmp_path / "drift").rows
    assert trainer.state.num_input_tokens_seen > 20
    assert sorted(set(rows["budget"]))[2] == trainer.state.num_input_tokens_seen
    page = report.build(tmp_path / "drift").read_text("utf-8")
    assert f"At {trainer.state.num_input_tokens_seen:,} tokens, capability" in page


def test_a_resumed_training_keeps_its_start(base: Path, tmp_path: Path) -> None:
    """Resumed at step 2 of 4: base and step 1 stay, later steps are measured again, and all is as without a stop."""
    saving = {"save_strategy": "steps", "save_steps": 2}

    def rows_after(out: Path, trainer: Any, resume: str | None = None) -> bytes:
        DriftCallback(restless(), every=1, out=out, name="tuned").watch(trainer)
        trainer.train(resume_from_checkpoint=resume)
        return (out / "rows.parquet").read_bytes()

    whole = rows_after(tmp_path / "whole", trainer_of("sft", base, tmp_path / "a", **saving))
    rows_after(tmp_path / "halved", trainer_of("sft", base, tmp_path / "b", steps=3, **saving))
    checkpoint = str(tmp_path / "b" / "checkpoint-2")
    assert rows_after(tmp_path / "halved", trainer_of("sft", base, tmp_path / "b", **saving), checkpoint) == whole
    with pytest.raises(LeewayError, match="has an earlier run"):
        rows_after(tmp_path / "halved", trainer_of("sft", base, tmp_path / "c"))
    with pytest.raises(LeewayError, match="no measurement of the start"):
        rows_after(tmp_path / "new", trainer_of("sft", base, tmp_path / "b", **saving), checkpoint)


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(LeewayError, match="every=0"):
        DriftCallback(LIGHT, every=0, out=tmp_path)
    with pytest.raises(LeewayError, match="cannot be a name"):
        DriftCallback(LIGHT, every=1, out=tmp_path, name="base")
    with pytest.raises(LeewayError, match=r"unknown key 'evals\.personna'; did you mean 'persona'"):
        DriftCallback({"personna": {}}, every=1, out=tmp_path)
