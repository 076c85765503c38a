"""Our losses and gradients against TRL's own trainers: the same model, the same pairs, the same token ids."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from handmade import totals_of
from safetensors.torch import load_file, save_file
from torch import Tensor

from leeway.data.chat import Sequence
from leeway.data.types import Example
from leeway.model import adapters
from leeway.model.forward import TokenStats, Totals, hidden_at_measured
from leeway.model.load import Model, load_model
from leeway.model.packing import Padded
from leeway.model.reference import as_reference
from leeway.model.token_stats import token_logps
from leeway.objectives import Objective, dpo, ipo, kto, orpo, sft, simpo

pytest.importorskip("trl")
# TRL asks for a name that transformers is about to rename
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

BOUND = 1e-5
BETA = 0.3
EXAMPLES = [
    Example("a", "What is 3 + 4?", "It is 7.", "It is 8, or so they say."),
    Example("b", "How many apples are there?", "Twelve apples.", "None."),
    Example("c", "Yes or no?", "Yes.", "I cannot say yes, nor can I say no."),
]
MISMATCHED = [replace(e, auxiliary=EXAMPLES[k - 2]) for k, e in enumerate(EXAMPLES)]
TEMPLATE = "[bos]" + tiny.PLAIN  # TRL's older trainers put a BOS where a template writes none


@pytest.fixture(autouse=True)
def _no_calls_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *_, **__: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tiny.build("llama", tmp_path_factory.mktemp("oracle"))
    tiny.tokenizer(TEMPLATE).save_pretrained(where)
    weights = load_file(where / "model.safetensors")
    wide = {name: w if w.ndim == 1 else 10 * w for name, w in weights.items()}  # from near uniform to a mind of its own
    save_file(wide, where / "model.safetensors", {"format": "pt"})
    return where


def fresh(folder: Path) -> Model:
    """The base with an adapter that does nothing yet."""
    model = load_model(str(folder), device="cpu")
    adapters.attach(model, adapters.AdapterSettings(4, 8, 0.0, "all-linear"), seed=0)
    return model


def move(lm: Any) -> None:
    """Lead the policy away from its reference: the same way each time."""
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in trained(lm).values():
            p.copy_(0.3 * torch.randn(p.shape, generator=g))


def trained(lm: Any) -> dict[str, Tensor]:
    return {name: p for name, p in sorted(lm.named_parameters()) if ".default." in name}


@dataclass(frozen=True)
class Found:
    """A loss, its gradient for every adapter matrix, and the ids it was computed on."""

    loss: float
    gradients: dict[str, Tensor]
    ids: list[tuple[int, ...]]


def ours(folder: Path, objective: Objective) -> Found:
    model = fresh(folder)
    move(model.lm)
    rendered = [list(objective.render(e, model.chat, np.random.default_rng(0))) for e in MISMATCHED]
    totals = totals_of(rendered)
    baseline = [s for e in MISMATCHED for s in objective.baseline_sequences(e, model.chat)]
    if baseline:
        with torch.no_grad():
            found = objective.baseline(*both(model, baseline, totals))
        assert found > 0.1, "the reference point is to have a say"
        totals = replace(totals, baseline=found)
    sequences = [s for e in rendered for s in e]
    policy, reference = both(model, sequences, totals)
    assert (policy.sum_S() - reference.sum_S()).abs().min() > 0.1, "policy and reference are to differ"
    loss = objective.loss(policy, reference)
    loss.backward()  # type: ignore[no-untyped-call]
    return Found(loss.item(), grads(model.lm), [s.ids for s in sequences])


def both(model: Model, sequences: list[Sequence], totals: Totals) -> tuple[TokenStats, TokenStats]:
    def under() -> TokenStats:
        batch = Padded.of(sequences, model.device)
        logp_T = token_logps(hidden_at_measured(model, batch), batch.measured_T, model.head)
        return TokenStats(logp_T, batch.sequence_T, batch.sequences, totals, None, batch.target_T)

    policy = under()
    with as_reference(model):
        return policy, under()


def grads(lm: Any) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in trained(lm).items()}
    assert found
    return {name: g for name, g in found.items() if g is not None}


def conversation(example: Example, *answers: tuple[str, str]) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": example.prompt}],
        **{column: [{"role": "assistant", "content": text}] for column, text in answers},
    }


def preference() -> list[dict[str, Any]]:
    return [conversation(e, ("chosen", e.preferred), ("rejected", e.dispreferred or "")) for e in EXAMPLES]


def theirs(
    folder: Path, scratch: Path, kind: tuple[type, type], rows: list[dict[str, Any]], **settings: Any
) -> tuple[Any, dict[str, Tensor]]:
    """TRL's trainer over our rows, its policy moved as ours, and its own batch of them."""
    from datasets import Dataset

    trainer_kind, config_kind = kind
    model = fresh(folder)
    plain = {"report_to": "none", "use_cpu": True, "bf16": False, "activation_checkpointing": False}
    config = config_kind(output_dir=str(scratch), **plain, **{"max_length": None, **settings})
    trainer = trainer_kind(
        model=model.lm, args=config, train_dataset=Dataset.from_list(rows), processing_class=model.chat.tokenizer
    )
    move(trainer.model)
    return trainer, trainer.data_collator([trainer.train_dataset[k] for k in range(len(rows))])


def computed(trainer: Any, batch: dict[str, Tensor], ids: list[tuple[int, ...]]) -> Found:
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return Found(loss.item(), grads(trainer.model), ids)


def unpadded(ids_BL: Tensor, mask_BL: Tensor) -> list[tuple[int, ...]]:
    return [tuple(row[keep.bool()].tolist()) for row, keep in zip(ids_BL, mask_BL, strict=True)]


def in_turn(chosen: list[tuple[int, ...]], rejected: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    return [ids for pair in zip(chosen, rejected, strict=True) for ids in pair]


def halves(batch: dict[str, Tensor]) -> list[tuple[int, ...]]:
    """Ids of a batch that holds all preferred answers, then all dispreferred ones."""
    ids = unpadded(batch["input_ids"], batch["attention_mask"])
    return in_turn(ids[: len(ids) // 2], ids[len(ids) // 2 :])


def apart(batch: dict[str, Tensor]) -> list[tuple[int, ...]]:
    """Ids of a batch that holds them under names of their own."""
    return in_turn(*(unpadded(batch[f"{k}_input_ids"], batch[f"{k}_attention_mask"]) for k in ("chosen", "rejected")))


def agree(a: Found, b: Found, label: str, record_property: Callable[[str, object], None]) -> None:
    assert a.ids == b.ids
    assert a.gradients.keys() == b.gradients.keys()
    loss = abs(a.loss - b.loss) / abs(b.loss)
    largest = max(g.abs().max() for g in b.gradients.values())
    gradient = max(float((a.gradients[n] - g).abs().max() / largest) for n, g in b.gradients.items())
    record_property("measured", f"{label} against TRL: loss {loss:.1e}, gradient {gradient:.1e} ({BOUND:.0e})")
    assert loss < BOUND
    assert gradient < BOUND


def test_sft(folder: Path, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    from trl import SFTConfig, SFTTrainer

    rows = [conversation(e, ("completion", e.preferred)) for e in EXAMPLES]
    trainer, batch = theirs(folder, tmp_path, (SFTTrainer, SFTConfig), rows, completion_only_loss=True)
    found = computed(trainer, batch, unpadded(batch["input_ids"], batch["attention_mask"]))
    agree(ours(folder, sft.Sft()), found, "SFT", record_property)


@pytest.mark.parametrize(
    ("objective", "settings"),
    [
        (dpo.Dpo(beta=BETA), {"loss_type": ["sigmoid"]}),
        (ipo.Ipo(beta=BETA, length="mean"), {"loss_type": ["ipo"]}),
        (dpo.Dpo(beta=BETA, nll=0.5), {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
    ],
    ids=repr,
)
def test_dpo_and_ipo(
    objective: Objective,
    settings: dict[str, Any],
    folder: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    from trl import DPOConfig, DPOTrainer

    trainer, batch = theirs(folder, tmp_path, (DPOTrainer, DPOConfig), preference(), beta=BETA, **settings)
    agree(ours(folder, objective), computed(trainer, batch, halves(batch)), repr(objective), record_property)


def test_orpo_by_their_nll_over_prompt_and_answer(
    folder: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    trainer, batch = theirs(folder, tmp_path, (ORPOTrainer, ORPOConfig), preference(), beta=BETA, max_length=512)
    found = computed(trainer, batch, apart(batch))
    agree(ours(folder, orpo.Orpo(weight=BETA, nll_scope="all")), found, "ORPO, nll_scope all", record_property)
    assert ours(folder, orpo.Orpo(weight=BETA)).loss != pytest.approx(found.loss, rel=1e-3)


def test_simpo(folder: Path, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    settings = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 0.7, "max_length": 512}
    trainer, batch = theirs(folder, tmp_path, (CPOTrainer, CPOConfig), preference(), **settings)
    found = computed(trainer, batch, apart(batch))
    agree(ours(folder, simpo.Simpo(beta=2.0, gamma=0.7)), found, "SimPO", record_property)


def test_kto(folder: Path, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """Their batch with our mismatched answers in it, once for each answer of a pair."""
    from trl import KTOConfig, KTOTrainer

    answers = [
        (e, text, good) for e in MISMATCHED for text, good in ((e.preferred, True), (e.dispreferred or "", False))
    ]
    rows = [{**conversation(e, ("completion", text)), "label": good} for e, text, good in answers]
    weights = {"desirable_weight": 1.2, "undesirable_weight": 0.8}
    size = {"per_device_train_batch_size": len(rows)}
    trainer, batch = theirs(folder, tmp_path, (KTOTrainer, KTOConfig), rows, beta=BETA, **weights, **size)
    chat = load_model(str(folder), device="cpu").chat
    mismatched = [s for e, _, _ in answers for s in kto.Kto().baseline_sequences(e, chat)]
    batch |= {f"KL_{name}": value for name, value in padded(mismatched, batch["input_ids"].shape[1]).items()}
    found = computed(trainer, batch, unpadded(batch["input_ids"], batch["attention_mask"]))
    agree(ours(folder, kto.Kto(beta=BETA, desirable=1.2, undesirable=0.8)), found, "KTO", record_property)


def padded(sequences: list[Sequence], width: int) -> dict[str, Tensor]:
    width = max(width, *(len(s.ids) for s in sequences))
    spare = [width - len(s.ids) for s in sequences]
    return {
        "input_ids": torch.tensor([[*s.ids] + [0] * n for s, n in zip(sequences, spare, strict=True)]),
        "attention_mask": torch.tensor([[1] * len(s.ids) + [0] * n for s, n in zip(sequences, spare, strict=True)]),
        "completion_mask": torch.tensor(
            [[0] * s.target_start + [1] * s.targets + [0] * n for s, n in zip(sequences, spare, strict=True)]
        ),
    }
