"""Training a random 8B Llama-3.1 shape on one GPU: tokens a second, peak memory, model FLOP utilisation, beside TRL.

    python -m benchmarks.gpu --minutes 8 --out gpu.json      # one GPU with 80 GB or more
    python -m benchmarks.gpu --smoke                         # the same code on a CPU, a tiny shape

Weights are drawn on the device in bf16, token ids at random: nothing is downloaded. A step is 16 sequences of 128 to
384 tokens, the second half of each a target, in micro-batches of at most 4,096 tokens; a pair counts both sequences.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.performance.measure import memory_mb
from benchmarks.performance.peers import lora
from benchmarks.performance.shapes import make_tokenizer
from benchmarks.performance.task import BATCH, CLIP, LORA, LR
from leeway.data.chat import Chat, Sequence
from leeway.model import adapters
from leeway.model.load import Model
from leeway.model.token_stats import Head
from leeway.objectives import OBJECTIVES
from leeway.training.batch import Batch, Optim
from leeway.training.loop import optimise

ASKED = ("sft", "kl", "dpo", "orpo")
MICRO_TOKENS = 4096
LAYOUT: Literal["padded", "packed"] = "padded"
FEWEST = 2  # timed steps


@dataclass(frozen=True)
class Size:
    """A Llama's config, the lengths of its sequences and the side of the matrices that its FLOPs are held against."""

    name: str
    config: dict[str, int]
    lengths: tuple[int, int]
    square: int


LLAMA = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128_256,
}
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 512,
}
LARGE, SMOKE = Size("8B", LLAMA, (128, 384), 8192), Size("smoke", TINY, (8, 24), 256)


@dataclass(frozen=True)
class Line:
    """What one side did: `utilisation` is a share of the measured matmul rate."""

    side: str
    objective: str
    steps: int
    tokens_per_s: float
    peak_gb: float
    utilisation: float | None

    def __str__(self) -> str:
        share = "" if self.utilisation is None else f"{self.utilisation:.0%}"
        return f"| {self.side} | {self.objective} | {self.tokens_per_s:,.0f} | {self.peak_gb:.1f} | {share} |"


def matmul_rate(device: torch.device, side: int) -> float:
    """FLOP/s of a square bf16 product, the best of ten."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        began = _now(device)
        _ = a @ b
        best = min(best, _now(device) - began)
    return 2 * side**3 / best


def random_model(size: Size, device: torch.device) -> Model:
    """Frozen random weights in bf16, drawn where they stay."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer(300, ["one two three"])
    config = LlamaConfig(
        **size.config,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    usual = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            lm = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(usual)
    lm.eval().requires_grad_(False)
    return Model(lm, Chat(tokenizer), Head(lm.get_output_embeddings().weight), size.name, size.name, 8192, ())


def batches(size: Size, *, paired: bool) -> Iterator[Batch]:
    """Steps without an end, each of BATCH examples with random ids."""
    rng = np.random.default_rng(0)
    step = 0
    while True:
        step += 1
        rendered = tuple(_example(rng, size, paired=paired) for _ in range(BATCH))
        yield Batch(step, step, tuple(f"random/{step}-{k}" for k in range(BATCH)), rendered)


def _example(rng: np.random.Generator, size: Size, *, paired: bool) -> tuple[Sequence, ...]:
    """One sequence, or two that share their prompt."""
    length = int(rng.integers(*size.lengths, endpoint=True))
    prompt, *answers = (tuple(int(i) for i in rng.integers(4, 300, length // 2)) for _ in range(3 if paired else 2))
    return tuple(Sequence(prompt + a, len(prompt)) for a in answers)


def ours(size: Size, device: torch.device, objective: str, seconds: float, rate: float) -> Line:
    """Our loop over one objective, its reference live, for about `seconds` after the first step."""
    model, made = random_model(size, device), OBJECTIVES[objective]()
    flops = _flops(model)
    settings = adapters.AdapterSettings(LORA["r"], LORA["alpha"], LORA["dropout"], "all-linear")
    adapters.attach(model, settings, seed=0)
    optimiser = torch.optim.AdamW(adapters.trainable(model), lr=LR)
    stream = batches(size, paired=made.needs_pairs)
    steps = optimise(model, made, stream, optimiser, lambda _: LR, Optim(CLIP, MICRO_TOKENS, layout=LAYOUT))
    next(steps)
    began, taken, tokens, targets = _now(device), 0, 0, 0
    while taken < FEWEST or _now(device) - began < seconds:
        done = next(steps)
        taken, tokens, targets = taken + 1, tokens + done.processed_tokens, targets + done.target_tokens
    spent = _now(device) - began
    used = (flops[0] * tokens + flops[1] * targets) / spent / rate if objective == "sft" else None
    return Line("ours", objective, taken, tokens / spent, peak_gb(device), used)


def _flops(model: Model) -> tuple[int, int]:
    """FLOPs of a LoRA step for each token and for each target: 2 forward and 2 backward a frozen weight.

    Attention's own products are left out, which makes the utilisation a little too low.
    """
    head = model.head.weight_VD.numel()
    return 4 * (model.parameters - 2 * head), 4 * head


def peer(size: Size, device: torch.device, seconds: float) -> Line:
    """TRL's SFTTrainer on the same sequences, its micro-batch as large; stopped after about `seconds`."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, steps = random_model(size, device), batches(size, paired=False)
    made = [example[0] for _ in range(200) for example in next(steps).rendered]
    rows = [{"input_ids": list(s.ids), "labels": [-100] * s.target_start + list(s.ids[s.target_start :])} for s in made]
    with tempfile.TemporaryDirectory() as out:
        settings = SFTConfig(
            output_dir=out,
            use_cpu=device.type == "cpu",
            gradient_checkpointing=False,
            per_device_train_batch_size=BATCH,
            train_sampling_strategy="sequential",
            max_steps=200,
            learning_rate=LR,
            max_grad_norm=CLIP,
            max_length=None,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        stop = _stopwatch(device, seconds)
        trainer = SFTTrainer(
            model=model.lm,
            args=settings,
            train_dataset=Dataset.from_list(rows),
            processing_class=model.chat.tokenizer,
            peft_config=lora.config(),
            callbacks=[stop],
        )
        trainer.train()
    taken = len(stop.ends) - 1
    tokens = sum(len(s.ids) for s in made[BATCH : BATCH * (taken + 1)])
    return Line("TRL", "sft", taken, tokens / (stop.ends[-1] - stop.ends[0]), peak_gb(device), None)


def _stopwatch(device: torch.device, seconds: float) -> Any:
    """A callback that notes when each step ended, and stops when its time is over."""
    from transformers import TrainerCallback

    class Stopwatch(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, _args: Any, _state: Any, control: Any, **_: Any) -> None:
            self.ends.append(_now(device))
            if len(self.ends) > FEWEST and self.ends[-1] - self.ends[0] > seconds:
                control.should_training_stop = True

    return Stopwatch()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_gb(device: torch.device) -> float:
    """Since it was last reset, of a GPU; of the whole process so far, on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else memory_mb("VmHWM") / 1e3


def measured(size: Size, device: torch.device, minutes: float) -> tuple[float, list[Line]]:
    """The matmul rate and every line; an objective gets an equal share of the minutes."""
    trl = find_spec("trl") is not None
    seconds = minutes * 60 / (len(ASKED) + trl)
    rate, lines = matmul_rate(device, size.square), []
    for k in range(len(ASKED) + trl):
        _fresh(device)
        line = ours(size, device, ASKED[k], seconds, rate) if k < len(ASKED) else peer(size, device, seconds)
        print(line, flush=True)
        lines.append(line)
    return rate, lines


def _fresh(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--smoke", action="store_true", help="a tiny shape on the CPU, for seconds")
    options = parser.parse_args()
    if not options.smoke and not torch.cuda.is_available():
        parser.error("there is no GPU here; --smoke runs the same code on the CPU")
    device = torch.device("cpu" if options.smoke else "cuda")
    size, minutes = (SMOKE, 0.0) if options.smoke else (LARGE, options.minutes)
    print(f"| {size.name} | objective | tok/s | peak GB | of the matmul rate |\n|---|---|---|---|---|")
    rate, lines = measured(size, device, minutes)
    print(f"\nbf16 matmul: {rate / 1e12:,.2f} TFLOP/s")
    found = {"size": asdict(size), "matmul_flops": rate, "lines": [asdict(line) for line in lines]}
    options.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
