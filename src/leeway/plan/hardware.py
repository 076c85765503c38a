"""GPUs by their data sheets, this machine's CPU by timed operations, and stand-ins for a model whose files are missing.

The stand-in tokenizer splits text into the pieces between which the model's own tokenizer does not merge (letters,
digits, punctuation, spaces), cuts words after WORD letters, and writes a chat template as long as the model's own.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from leeway.data.chat import Chat
from leeway.errors import LeewayError
from leeway.hashing import derive_seed
from leeway.model.load import load_chat, load_context, resolve
from leeway.study.spec import Spec
from leeway.yaml_config import nearest

CPU_ERROR = 0.35  # relative error of CPU hours, from the studies in docs/study-file.md
ROWS = 2048  # of the timed products that stand for training and prompts
MFU, MBU = 0.35, 0.3  # assumed shares of a data sheet's peak rate and bandwidth, printed with every estimate


@dataclass(frozen=True)
class Gpu:
    """Data-sheet numbers: dense bfloat16 TFLOP/s, GB of 10^9 bytes, GB/s."""

    name: str
    tflops: float
    memory_gb: float
    bandwidth_gb_s: float
    source: str


GPUS = {
    g.name: g
    for g in (
        Gpu("A100-40", 312, 40, 1555, "NVIDIA A100 data sheet, 40 GB"),
        Gpu("A100-80", 312, 80, 2039, "NVIDIA A100 data sheet, 80 GB SXM"),
        Gpu("H100-80", 989.4, 80, 3350, "NVIDIA H100 data sheet, SXM; half of its figure with sparsity"),
        Gpu("H200", 989.4, 141, 4800, "NVIDIA H200 data sheet, SXM; half of its figure with sparsity"),
        Gpu("L40S", 362, 48, 864, "NVIDIA L40S data sheet"),
        Gpu("L4", 121, 24, 300, "NVIDIA L4 data sheet; half of its figure with sparsity"),
        Gpu("A10G", 70, 24, 600, "NVIDIA A10G data sheet"),
        Gpu("RTX-4090", 165.2, 24, 1008, "NVIDIA Ada architecture white paper, accumulating in float32"),
    )
}


@dataclass(frozen=True)
class Machine:
    """Reached rates in FLOP/s and bytes/s, and bytes of memory.

    `flops`: products of many rows, in training and prompts; `head`: those of the output head; `decoding`: one row a
    response. `bandwidth`: reading weights and cached keys. `passes`: element-wise passes; inf where `flops` is an
    overall rate.
    """

    name: str
    flops: float
    head: float
    decoding: float
    bandwidth: float
    passes: float
    memory: float | None
    assumed: str

    @property
    def is_cpu(self) -> bool:
        return self.memory is None


def gpu(name: str) -> Gpu:
    """Return a GPU by name, ignoring case and separators. Raises LeewayError for an unknown one."""
    plain = {_plain(n): g for n, g in GPUS.items()} | {"h100": GPUS["H100-80"]}
    if (found := plain.get(_plain(name))) is None:
        raise LeewayError(f"--gpu {name}: not known{nearest(name.upper(), GPUS)}", fix=f"one of: {', '.join(GPUS)}")
    return found


def on_gpu(name: str, mfu: float = MFU, mbu: float = MBU) -> Machine:
    """Return a GPU that reaches the shares `mfu` of its peak rate and `mbu` of its bandwidth."""
    for option, share in (("--mfu", mfu), ("--mbu", mbu)):
        if not 0 < share <= 1:
            raise LeewayError(f"{option} {share:g} is not in (0, 1]", fix="give a number above 0 and at most 1")
    g = gpu(name)
    assumed = (
        f"{g.tflops:g} TFLOP/s and {g.bandwidth_gb_s:g} GB/s by the {g.source}, of which {mfu:.0%} (--mfu) and "
        f"{mbu:.0%} (--mbu) are assumed to be reached"
    )
    rate = g.tflops * 1e12 * mfu
    return Machine(g.name, rate, rate, rate, g.bandwidth_gb_s * 1e9 * mbu, math.inf, g.memory_gb * 1e9, assumed)


def this_cpu(hidden: int, inner: int, dtype: torch.dtype, batch: int, *, workers: int = 1, threads: int = 1) -> Machine:
    """Time this CPU on products of a model's shape in its dtype, in as many threads at once as a run has workers.

    CPU seconds are timed, so other processes hardly change a rate. The output head computes in float32.
    """

    wide, high = min(hidden, 1024), min(inner, 4096)  # rates hardly change beyond

    def product(rows: int, kind: torch.dtype, weights: int = 1) -> float:
        x, w = torch.randn(rows, wide).to(kind), [torch.randn(high, wide).to(kind) for _ in range(weights)]
        return 2.0 * weights * rows * wide * high / _best(lambda: [torch.nn.functional.linear(x, each) for each in w])

    def rates(_: int) -> tuple[float, ...]:
        torch.set_num_threads(threads)
        x, y, out = torch.randn(3, 2**22)
        passes = 3 * 4.0 * len(x) / _best(lambda: torch.mul(x, y, out=out))
        decoding = product(min(batch, ROWS), dtype, 8)  # each step reads every layer's weights anew
        return product(ROWS, dtype), product(ROWS, torch.float32), decoding, passes

    before = torch.get_num_threads()
    with ThreadPoolExecutor(workers) as pool:
        found = [sum(column) / workers for column in zip(*pool.map(rates, range(workers)), strict=True)]
    torch.set_num_threads(before)
    flops, head, decoding, passes = found
    kind = str(dtype).removeprefix("torch.")
    assumed = (
        f"a worker's {flops / 1e9:.0f} GFLOP/s in {kind} for training and prompts, {decoding / 1e9:.0f} for decoding "
        f"{batch} rows, {head / 1e9:.0f} for the float32 head, and {passes / 1e9:.0f} GB/s, timed now on this model's "
        f"shapes; hours are within about {CPU_ERROR:.0%}, --measure times the study's own steps"
    )
    return Machine("this CPU", flops, head, decoding, passes, passes, None, assumed)


def _best(work: Callable[[], object]) -> float:
    """Return the fewest CPU seconds of this thread in four calls, the first of which compiles kernels."""
    times = []
    for _ in range(4):
        began = time.thread_time()
        work()
        times.append(time.thread_time() - began)
    return max(min(times[1:]), 1e-9)


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).lower()


WORD = 10  # letters; longer words are several tokens. Measured: docs/claims.md
SPECIAL = ("<|begin|>", "<|start|>", "<|end|>", "<|turn|>")


def _pieces(digits: int, *, lone_newlines: bool) -> str:
    """Return the pattern of a piece: up to `digits` digits, and punctuation with the newlines after it or without."""
    return "|".join(
        (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
            rf"[^\r\n\p{{L}}\p{{N}}]?\p{{L}}{{1,{WORD}}}",
            rf"\p{{N}}{{1,{digits}}}",
            r" ?[^\s\p{L}\p{N}]+" + ("" if lone_newlines else r"[\r\n]*"),
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        )
    )


@dataclass(frozen=True)
class TextSpec:
    """What a tokenizer and its chat template make of text: digits in a token, and what surrounds roles and turns."""

    digits: int
    opening: str
    after_role: str
    after_turn: str
    before_answer: str = ""
    lone_newlines: bool = False

    @property
    def template(self) -> str:
        """Return a chat template that writes as many tokens as the model's own."""
        return (
            f"{self.opening}{{% for m in messages %}}<|start|>{{{{ m['role'] }}}}{self.after_role}"
            f"{{% if m['role'] == 'assistant' %}}{self.before_answer}{{% endif %}}"
            f"{{{{ m['content'] }}}}<|turn|>{self.after_turn}{{% endfor %}}"
            f"{{% if add_generation_prompt %}}<|start|>assistant{self.after_role}{{% endif %}}"
        )


# By ArchSpec.kind. Llama 3.1 opens with a system turn that holds two dates, Qwen 2.5 with one that names the model;
# Qwen 3 writes an empty thought before an answer.
TEXT = {
    "llama": TextSpec(
        3,
        "<|begin|><|start|>system<|end|>\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|turn|>",
        "<|end|>\n\n",
        "",
    ),
    "gemma2": TextSpec(1, "<|begin|>", "\n", "\n", lone_newlines=True),
    "qwen2": TextSpec(
        1, "<|start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|turn|>\n", "\n", "\n"
    ),
    "qwen3": TextSpec(1, "", "\n", "\n", "<|end|>\n\n<|end|>\n\n"),
}


@dataclass(frozen=True)
class ArchSpec:
    """The shape of a published architecture, from its config.json."""

    kind: str
    vocab: int
    hidden: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    per_head: int
    context: int
    tied: bool = False
    more: dict[str, Any] = field(default_factory=dict)

    def config(self) -> Any:
        from transformers import AutoConfig

        return AutoConfig.for_model(
            self.kind,
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            head_dim=self.per_head,
            max_position_embeddings=self.context,
            tie_word_embeddings=self.tied,
            **self.more,
        )


# From each model's published config.json (Llama: also table 3 of arXiv 2407.21783).
KNOWN = {
    "meta-llama/Llama-3.1-8B-Instruct": ArchSpec("llama", 128256, 4096, 14336, 32, 32, 8, 128, 131072),
    "google/gemma-2-2b-it": ArchSpec("gemma2", 256000, 2304, 9216, 26, 8, 4, 256, 8192, tied=True),
    "google/gemma-2-9b-it": ArchSpec("gemma2", 256000, 3584, 14336, 42, 16, 8, 256, 8192, tied=True),
    "Qwen/Qwen2.5-7B-Instruct": ArchSpec("qwen2", 152064, 3584, 18944, 28, 28, 4, 128, 32768),
    "Qwen/Qwen3-4B": ArchSpec("qwen3", 151936, 2560, 9728, 36, 32, 8, 128, 40960, tied=True),
}


@dataclass(frozen=True)
class PlannedModel:
    """Tokenizer, context and config of a model; `missing` lists the stand-ins among them."""

    chat: Chat
    context: int
    config: Any
    missing: tuple[str, ...] = ()

    @property
    def counts_exactly(self) -> bool:
        return not any(m.startswith("tokenizer") for m in self.missing)


def load_config(spec: Spec, *, offline: bool = False) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(
        resolve(spec.model), revision=spec.revision, trust_remote_code=False, local_files_only=offline
    )


def meta_model(config: Any) -> Any:
    """Return the model of a config on the meta device, without weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def planned_model(spec: Spec) -> PlannedModel:
    """Load the study's tokenizer and config, or stand-ins for a model of `KNOWN`. Raises LeewayError otherwise."""
    known = KNOWN.get(spec.model) if spec.revision is None else None
    missing: list[str] = []
    try:
        chat = load_chat(spec.model, spec.revision)
    except LeewayError:
        if known is None:
            raise
        chat = _stand_in_chat(known.kind)
        missing.append(
            "tokenizer: not available. Tokens (~) are counted by a stand-in; for exact counts give model= a folder "
            "with tokenizer and config (no weights)"
        )
    try:
        config = load_config(spec, offline=bool(missing))
        context = load_context(spec.model, spec.revision) if not missing else config.max_position_embeddings
    except (LeewayError, OSError, ValueError):
        if known is None:
            raise
        context, config = known.context, known.config()
        missing.append("config: not available; using the published architecture")
    return PlannedModel(chat, context, config, tuple(missing))


class PieceChat(Chat):
    """A chat whose tokens are pieces of text, with ids by content: distinct texts are distinct sequences."""

    def ids(self, text: str) -> tuple[int, ...]:
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        spans = zip(found["input_ids"], found["offset_mapping"], strict=True)
        return tuple(i or _piece_id(text[start:end]) for i, (start, end) in spans)


@cache
def _piece_id(piece: str) -> int:
    return derive_seed("piece", piece)


def _stand_in_chat(kind: str) -> PieceChat:
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    text = TEXT[kind]
    tokenizer = Tokenizer(WordLevel({"[piece]": 0}, unk_token="[piece]"))
    tokenizer.pre_tokenizer = Split(Regex(_pieces(text.digits, lone_newlines=text.lone_newlines)), "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|turn|>", chat_template=text.template)
    fast.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    return PieceChat(fast)
