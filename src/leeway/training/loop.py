"""The one optimiser loop. Every objective, every budget and the organism itself go through it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Literal

import torch

from leeway.data.chat import Sequence
from leeway.errors import NotFiniteError
from leeway.model.load import Model
from leeway.model.reference import Reference
from leeway.objectives.objective import Objective
from leeway.training.batch import Batch, Optim
from leeway.training.passes import Passes
from leeway.training.ranks import ALONE, Ranks

Decay = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class Step:
    """What one optimiser step did. Token counts are of real tokens, never padding; seconds are the only timing."""

    step: int
    loss: float
    grad_norm: float
    lr: float
    target_tokens: int
    processed_tokens: int
    reference_tokens: int
    seconds: float


def optimise(
    model: Model,
    objective: Objective,
    batches: Iterable[Batch],
    optimiser: torch.optim.Optimizer,
    lr_at: Callable[[int], float],
    settings: Optim,
    reference: Reference | None = None,
    ranks: Ranks = ALONE,
) -> Iterator[Step]:
    """Take one optimiser step per batch, and say after each what it did.

    `reference` is the model that the objective is compared with: without one, `model` with its adapter switched off.
    `ranks` are the processes that take each step together: every one of them runs this loop over the same batches.

    Raises LeewayError where a loss or a gradient is not finite, naming the step and its examples.
    """
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    reference = reference or Reference()
    passes = Passes(model, objective, settings, reference, ranks)
    for batch in batches:
        began = time.perf_counter()
        totals, loss = passes.gradient(batch)
        norm = ranks.clip(parameters, settings.clip)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NotFiniteError(
                f"{objective.name}, step {batch.step}: loss {loss}, gradient norm {norm}, "
                f"on examples {', '.join(batch.ids)}",
                fix="look at these examples with `leeway show`, or lower optim.lr; the last checkpoint is kept",
            )
        lr = lr_at(batch.step)
        for group in optimiser.param_groups:
            group["lr"] = lr
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        processed = _tokens(batch.rendered) + _tokens(batch.baseline)
        referred, seconds = _referred(objective, batch, reference), time.perf_counter() - began
        yield Step(batch.step, loss, norm, lr, totals.tokens, processed, referred, seconds)
    model.lm.eval()


def _referred(objective: Objective, batch: Batch, reference: Reference) -> int:
    """Tokens that went through the reference for one batch: live, or asked beforehand and needed here first."""
    if reference.kept is not None:
        return reference.spent.get(batch.step, 0)
    return _tokens(batch.baseline) + (_tokens(batch.rendered) if objective.needs_reference != "nothing" else 0)


def _tokens(examples: Seq[Seq[Sequence]]) -> int:
    return sum(len(s.ids) for example in examples for s in example)


def after_warmup(lr: float, warmup_steps: int, decay: Decay, steps: int) -> Callable[[int], float]:
    """Linear warm-up over fixed steps, then constant, or down towards zero, which the step after `steps` would reach.

    Constant: a checkpoint at 25k tokens *is* the 25k run. A decay makes it another thing: it needs a run of its own.
    """

    def lr_at(step: int) -> float:
        if step < warmup_steps:
            return lr * (step / warmup_steps)
        along = (step - warmup_steps) / (steps - warmup_steps + 1)
        if decay == "linear":
            return lr * (1.0 - along)
        return lr * 0.5 * (1.0 + math.cos(math.pi * along)) if decay == "cosine" else lr

    return lr_at
