"""What tokens cost: FLOPs, seconds, memory, disk. Formulas alone; nothing here is measured on a GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import torch

from leeway.study.gpus import Machine

FLOAT32, ADAM = 4, 8  # bytes of a number; of AdamW's two moments
ROW_BYTES = 600  # of rows.parquet and its parts, an answer


@dataclass(frozen=True)
class Shape:
    """A model in the numbers that costs depend on; parameters count as they enter matrix products.

    `body`: of every token. `head`: of tokens whose distribution is asked for. `adapted`: inputs of all layers that an
    adapter changes, numbers a token. `kept`: what a layer keeps for the backward pass beside those.
    """

    total: int
    trained: int
    body: int
    head: int
    layers: int
    hidden: int
    inner: int
    queries: int  # heads times their width
    keys: int  # key heads times their width
    adapted: int
    full: bool
    bytes: int  # of a weight

    @property
    def kv_bytes(self) -> int:
        """Of keys and values, a token."""
        return 2 * self.layers * self.keys * self.bytes

    @property
    def weight_bytes(self) -> int:
        return self.total * self.bytes


def shape(lm: Any, layers: Seq[torch.nn.Linear], rank: int, *, full: bool, width: int) -> Shape:
    """Of a model without weights, `layers` of which an adapter of `rank` changes."""
    config = lm.config.get_text_config()
    total = sum(p.numel() for p in lm.parameters())
    head = lm.get_output_embeddings().weight.numel()
    embedding = lm.get_input_embeddings().weight.numel()
    heads = config.num_attention_heads
    per_head = getattr(config, "head_dim", None) or config.hidden_size // heads
    tied = lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
    return Shape(
        total=total,
        trained=total if full else sum(rank * (m.in_features + m.out_features) for m in layers),
        body=total - embedding - (0 if tied else head),
        head=head,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        inner=config.intermediate_size,
        queries=heads * per_head,
        keys=(getattr(config, "num_key_value_heads", None) or heads) * per_head,
        adapted=sum(m.in_features for m in layers),
        full=full,
        bytes=width,
    )


def training_flops(s: Shape, processed: int, targets: int, reference: int) -> float:
    """Of tokens through policy and reference; heads at targets alone, as the streamed head has it.

    Forward 2 a weight and token. Backward 2 again for the inputs' gradients, and 2 for the weights' where they train:
    an adapter's do, the frozen ones beneath it do not. A reference pass is a forward pass alone. Attention's products
    of tokens with tokens are left out (under 1% at a few hundred tokens).
    """
    back = 4 if s.full else 2
    policy = processed * ((2 + back) * s.body + (0 if s.full else 6 * s.trained)) + targets * (2 + back) * s.head
    return policy + reference_flops(s, reference, targets if reference else 0)


def reference_flops(s: Shape, tokens: int, measured: int) -> float:
    """Of a pass forward alone: the body for every token, the head for those that are measured."""
    return tokens * 2 * s.body + measured * 2 * s.head


@dataclass(frozen=True)
class EvalCost:
    """One eval at one checkpoint. Answers and prompts are counted; how long an answer is, is assumed."""

    name: str
    answers: int
    prompt_tokens: int
    max_new_tokens: int  # 0: one forward pass each, no text
    answer_tokens: float
    judge: str = ""
    judge_calls: int = 0
    judge_tokens_in: float = 0.0
    judge_tokens_out: float = 0.0


def eval_seconds(s: Shape, e: EvalCost, machine: Machine, batch: int) -> float:
    """Prompts at the matrix-product rate; then steps, each as long as its slower half: reading weights and keys, or
    computing.

    A batch is taken to last until its longest answer reaches `max_new_tokens`.
    """
    reading = (e.prompt_tokens * 2 * s.body + e.answers * 2 * s.head) / machine.flops
    if not e.max_new_tokens or not e.answers:
        return reading
    if machine.bandwidth is None:  # a CPU, where computing alone counts
        return reading + e.answer_tokens * 2 * (s.body + s.head) / machine.flops
    together = min(batch, e.answers)
    steps = math.ceil(e.answers / batch) * e.max_new_tokens
    computing = together * 2 * (s.body + s.head) / machine.flops
    context = e.prompt_tokens / e.answers + e.max_new_tokens / 2
    moving = (s.weight_bytes + together * context * s.kv_bytes) / machine.bandwidth
    return reading + steps * max(computing, moving)


@dataclass(frozen=True)
class Memory:
    """Bytes: what stands all along, what training adds, and what answering adds."""

    weights: float
    adapter: float
    activations: float
    cache: float

    @property
    def peak(self) -> float:
        return self.weights + self.adapter + max(self.activations, self.cache)


def memory(s: Shape, micro_tokens: int, dropout: float, batch: int, context: int) -> Memory:
    """Adapter, gradient and AdamW's moments in float32; activations of a micro-batch, none of them recomputed.

    A layer keeps, a token: both norms in float32, twice; every adapted layer's input in float32, with a mask of a byte
    where there is dropout; queries, keys, values and attention's output; and three vectors of the MLP. An estimate: it
    leaves out buffers, fragments and the head's chunks. (On the organism in float32, autograd kept 1.18 times that.)
    """
    mask = 1 if dropout and not s.full else 0
    norms, attention = 16 * s.hidden, s.bytes * 2 * (s.queries + s.keys)
    inputs = s.adapted * (s.bytes if s.full else FLOAT32 + mask)
    activations = micro_tokens * (s.layers * (norms + attention + s.bytes * 3 * s.inner) + inputs)
    trained = s.trained * (FLOAT32 + ADAM) + (0 if s.full else s.trained * FLOAT32)
    return Memory(s.weight_bytes, trained, activations, batch * context * s.kv_bytes)
