"""Model FLOPs of a measurement: what the mathematics needs, whatever a side computes, and this machine's matrix rate.

A frozen linear layer costs 2 FLOPs a weight and token forward and 2 backward (no gradient of the weight), its low-rank
update 2 and 4; causal attention counts half of its square; the head counts the measured tokens only. A reference is a
forward pass. A common prefix counts once for each sequence, though a side may share it.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

from benchmarks.performance.shapes import SHAPES, Shape
from benchmarks.performance.task import LORA, Task

if TYPE_CHECKING:
    from leeway.data.types import Example

SQUARE, REPEATS = 2048, 5


def matrix_rate(task: Task) -> float:
    """FLOP/s of a square bf16 product by the task's clock and threads, the best of a few."""
    import torch

    torch.set_num_threads(task.threads)
    a, b = (torch.randn(SQUARE, SQUARE).bfloat16() for _ in range(2))
    best = float("inf")
    for _ in range(REPEATS + 1):
        began = task.now()
        torch.mm(a, b)
        best = min(best, task.now() - began)
    return 2 * SQUARE**3 / best


def training(task: Task, data: Seq[Example]) -> float:
    """Model FLOPs of the steps over `data`: policy forward and backward, and the objective's reference."""
    import numpy as np

    from leeway.model.load import load_chat
    from leeway.objectives import OBJECTIVES

    shape, objective = SHAPES[task.shape], OBJECTIVES[task.objective]()
    chat, rng = load_chat(task.folder), np.random.default_rng(0)
    if objective.control_tokens:
        chat = chat.with_control_tokens(objective.control_tokens)
    sizes = [(len(s.ids), s.measured) for e in data for s in objective.render(e, chat, rng)]
    passes = 3 if objective.needs_reference == "nothing" else 4  # in forward passes of the attention
    total = 0.0
    for length, measured in sizes:
        total += (passes - 1) * (_linear(shape) * length + _head(shape) * measured) + 6 * _low_rank(shape) * length
        total += passes * _attention(shape, length)
    return total


def generation(task: Task, prompts: Seq[int], new: Seq[int]) -> float:
    """Model FLOPs of `new` tokens after `prompts` tokens each; the prompts' last token alone needs the head."""
    shape = SHAPES[task.shape]
    both = zip(prompts, new, strict=True)
    return sum(_linear(shape) * (p + n) + _head(shape) * n + _attention(shape, p + n) for p, n in both)


def _linear(shape: Shape) -> float:
    return sum(2 * a * b for a, b in _layers(shape))


def _low_rank(shape: Shape) -> float:
    """Parameters of the adapter."""
    return sum(LORA["r"] * (a + b) for a, b in _layers(shape))


def _layers(shape: Shape) -> Iterable[tuple[int, int]]:
    """(inputs, outputs) of every linear layer."""
    w, f = shape.width, shape.ffn
    return shape.layers * [(w, w), (w, shape.key_width), (w, shape.key_width), (w, w), (w, f), (w, f), (f, w)]


def _head(shape: Shape) -> float:
    return 2 * shape.width * shape.vocabulary


def _attention(shape: Shape, length: int) -> float:
    return 2 * shape.layers * length**2 * shape.width
