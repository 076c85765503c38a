"""TRL's trainers on the same examples, adapter and optimiser, each set up as its API does best on a CPU."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from importlib import import_module
from typing import Any

from benchmarks.performance.peers import lora
from benchmarks.performance.peers.order import grouped
from benchmarks.performance.shapes import CONTEXT
from benchmarks.performance.task import BATCH, CLIP, LR, PEER_OF, WARMUP, Found, Task
from leeway.data.types import Example


def imports() -> None:
    """What this side needs, so that memory before the model is known."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    for name in ("peft", "transformers.models.llama.modeling_llama", "trl.experimental.orpo"):
        import_module(name)
    import datasets
    import transformers
    import trl.trainer.base_trainer as base

    base.send_telemetry = lambda *_, **__: None
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()


def rows(task: Task, data: list[Example]) -> tuple[list[dict[str, Any]], list[int]]:
    """The trainer's rows and how many tokens each has: the warm-up as it comes, then what is timed by length."""
    name = PEER_OF.get(task.objective, task.objective)
    paired = name in ("dpo", "orpo")
    made = [_row(e, paired=paired) for e in data]
    lengths = _lengths(task, data, paired=paired)
    first = BATCH * task.warmup
    order = [*range(first), *(first + i for i in grouped([max(x) for x in lengths[first:]], BATCH))]
    return [made[i] for i in order], [sum(lengths[i]) for i in order]


def _row(e: Example, *, paired: bool) -> dict[str, Any]:
    prompt = [{"role": "user", "content": e.prompt}]
    answers = {"chosen": e.preferred, "rejected": e.dispreferred} if paired else {"completion": e.preferred}
    return {"prompt": prompt, **{k: [{"role": "assistant", "content": a}] for k, a in answers.items()}}


def _lengths(task: Task, data: list[Example], *, paired: bool) -> list[list[int]]:
    from leeway.model.load import load_chat

    chat = load_chat(task.folder)
    return [
        [
            len(chat.sequence(e.prompt, a or "").ids)
            for a in ((e.preferred, e.dispreferred) if paired else (e.preferred,))
        ]
        for e in data
    ]


def arguments(task: Task, out: str) -> dict[str, Any]:
    """Settings that all trainers share. The rows come in batches of near lengths, so the sampler keeps their order."""
    return {
        "output_dir": out,
        "use_cpu": True,
        "bf16": task.tuned.autocast,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": task.tuned.batch,
        "gradient_accumulation_steps": BATCH // task.tuned.batch,
        "max_steps": task.warmup + task.steps,
        "learning_rate": LR,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": WARMUP,
        "max_grad_norm": CLIP,
        "weight_decay": 0.0,
        "train_sampling_strategy": "sequential",
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "max_length": CONTEXT,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 0,
    }


def trainer(task: Task, made: list[dict[str, Any]], out: str, callbacks: list[Any]) -> tuple[Any, float]:
    """The trainer of the task's objective, and the seconds that its reference took (asked beforehand, for DPO)."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    kind, settings = _kind(task, out)
    asked = _timed_reference(kind, task)
    built = kind(
        model=_model(task),
        args=settings,
        train_dataset=Dataset.from_list(made),
        processing_class=AutoTokenizer.from_pretrained(task.folder),
        peft_config=lora.config(),
        callbacks=callbacks,
    )
    return built, asked()


def _model(task: Task) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        task.folder, dtype=torch.bfloat16, attn_implementation=task.tuned.attention
    )


def _kind(task: Task, out: str) -> tuple[Any, Any]:
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    from benchmarks.performance.peers.kl import KlTrainer, PlainTrainer

    shared, name = arguments(task, out), PEER_OF.get(task.objective, task.objective)
    if name == "dpo":
        return DPOTrainer, DPOConfig(**shared, precompute_ref_log_probs=True, disable_dropout=False)
    if name == "orpo":
        return ORPOTrainer, ORPOConfig(**shared, disable_dropout=False, remove_unused_columns=False)
    plain = PlainTrainer if task.tuned.plain_head else SFTTrainer
    return (KlTrainer if name == "kl" else plain), SFTConfig(**shared, completion_only_loss=True)


def _timed_reference(kind: Any, task: Task) -> Callable[[], float]:
    """Wrap the trainer's own pass over its reference with a clock; what is returned reads it."""
    spent = [0.0]
    inner = getattr(kind, "_precompute_ref_logps", None)

    def timed(self: Any, *args: Any) -> Any:
        began = task.now()
        try:
            return inner(self, *args)  # type: ignore[misc]
        finally:
            spent[0] += task.now() - began

    if inner is not None:
        kind._precompute_ref_logps = timed
    return lambda: spent[0]


def clock(task: Task) -> Any:
    """A callback that notes when the last step of the warm-up ended, and the last step of all."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):  # type: ignore[misc]
        began = ended = 0.0

        def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
            self.ended = task.now()
            if state.global_step == task.warmup:
                self.began = self.ended

    return Clock()


def train(task: Task, data: list[Example]) -> Found:
    """Steps after the warm-up by the clock; what was asked of the reference beforehand, by these steps' share of it."""
    made, lengths = rows(task, data)
    timing = clock(task)
    with tempfile.TemporaryDirectory() as out:
        began = task.now()
        built, asked = trainer(task, made, out, [timing])
        setup = task.now() - began - asked
        built.train()
    tokens = sum(lengths[BATCH * task.warmup :])
    return Found(tokens, timing.ended - timing.began, asked * tokens / sum(lengths), setup)


def trained(task: Task, data: list[Example]) -> Any:
    """The model after the task's steps over `data`, its adapter merged."""
    made, _ = rows(task, data)
    with tempfile.TemporaryDirectory() as out:
        built, _ = trainer(task, made, out, [])
        built.train()
    lm = built.model.merge_and_unload().eval()
    lm.config.use_cache = True
    return lm
