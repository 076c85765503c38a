"""The one optimiser loop. Every objective, every budget and the organism itself go through it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch

from leeway.data.chat import Sequence
from leeway.errors import NotFiniteError
from leeway.model.forward import TokenStats, Totals, target_stats
from leeway.model.layout import Examples, Laid, Layout, lay, longest, stored
from leeway.model.load import Model
from leeway.model.reference import Reference, asked
from leeway.objectives.objective import Objective
from leeway.training.ranks import ALONE, Cut, Ranks

Decay = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class Batch:
    """One optimiser step's worth of rendered examples; `seed` draws this step's dropout and nothing else.

    `baseline` holds each example's sequences for the objective's own pass over the batch, where it makes one.
    """

    step: int
    seed: int
    ids: tuple[str, ...]
    rendered: tuple[tuple[Sequence, ...], ...]
    baseline: tuple[tuple[Sequence, ...], ...] = ()


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


@dataclass(frozen=True)
class Optim:
    """How every trajectory is optimised: AdamW, and what the loop does around it."""

    clip: float
    micro_tokens: int  # positions of one micro-batch; the optimiser step is the same however it is cut
    autocast: torch.dtype | None = None
    layout: Layout = "padded"


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

    Gradients are those of the loss over the whole batch: micro-batches add up because every loss is normalised by the
    batch's totals. Raises LeewayError where a loss or a gradient is not finite, naming the step and its examples.
    """
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    reference = reference or Reference()
    for batch in batches:
        began = time.perf_counter()
        torch.manual_seed(ranks.seed(batch.seed))
        model.lm.train()
        totals = _totals(model, objective, batch, settings, reference, ranks)
        loss = 0.0
        for micro, weight in ranks.share(batch.rendered, _cut(settings)):
            with _autocast(model, settings.autocast):
                part = weight * _loss(model, objective, micro, totals, settings, reference)
            part.backward()  # type: ignore[no-untyped-call]
            loss += part.item()
        loss, norm = ranks.sum(loss), ranks.clip(parameters, settings.clip)
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
        referred = _reference_tokens(objective, batch) if reference.kept is None else reference.spent.get(batch.step, 0)
        seconds = time.perf_counter() - began
        yield Step(batch.step, loss, norm, lr, totals.tokens, processed, referred, seconds)
    model.lm.eval()


def _loss(
    model: Model, objective: Objective, micro: Examples, totals: Totals, settings: Optim, reference: Reference
) -> torch.Tensor:
    batch = lay(micro, model.device, settings.layout)
    if objective.needs_reference == "nothing":
        return objective.loss(target_stats(model, batch, totals), None)
    theirs, theirs_TD = _reference(model, batch, micro, totals, reference)
    if objective.needs_reference == "logps":
        return objective.loss(target_stats(model, batch, totals), theirs)
    policy = target_stats(model, batch, totals, reference_hidden_TD=theirs_TD, direction=objective.direction)
    return objective.loss(policy, theirs)


def _reference(
    model: Model, batch: Laid, micro: Examples, totals: Totals, reference: Reference
) -> tuple[TokenStats, torch.Tensor | None]:
    """The reference's statistics, and its hidden states at the measured tokens where it has been asked for them."""
    kept = reference.recall([s for example in micro for s in example], model.device)
    logp_T, hidden_TD = asked(model, batch, reference) if kept is None else kept
    return TokenStats(logp_T, batch.sequence_T, batch.sequences, totals, None, batch.target_T), hidden_TD


def micro_batches(rendered: Examples, tokens: int, layout: Layout = "padded") -> Iterator[list[Seq[Sequence]]]:
    """Whole examples, shortest first, as many at a time as fit into `tokens` positions (at least one).

    Padded, each sequence takes as many positions as the longest of its micro-batch; packed, no more than are stored.
    """
    group: list[Seq[Sequence]] = []
    count = 0
    for example in sorted(rendered, key=longest):  # so that the example is the longest of its group too
        packed = layout != "padded"
        added = stored(example) if packed else len(example)
        if group and (count + added) * (1 if packed else longest(example)) > tokens:
            yield group
            group, count = [], 0
        group.append(example)
        count += added
    if group:
        yield group


def _cut(settings: Optim) -> Cut:
    return lambda examples: micro_batches(examples, settings.micro_tokens, settings.layout)


def _totals(
    model: Model, objective: Objective, batch: Batch, settings: Optim, reference: Reference, ranks: Ranks
) -> Totals:
    totals = Totals(
        tokens=sum(s.targets for example in batch.rendered for s in example),
        examples=len(batch.rendered),
        preferred_tokens=sum(example[0].targets for example in batch.rendered),
        measured_tokens=sum(s.measured for example in batch.rendered for s in example),
        preferred_measured=sum(example[0].measured for example in batch.rendered),
    )
    if not batch.baseline:
        return totals
    return replace(totals, baseline=_baseline(model, objective, batch, totals, settings, reference, ranks))


def _baseline(
    model: Model,
    objective: Objective,
    batch: Batch,
    totals: Totals,
    settings: Optim,
    reference: Reference,
    ranks: Ranks,
) -> float:
    """The objective's own pass over the whole batch: the policy without dropout and without a gradient."""
    found = 0.0
    model.lm.eval()
    for micro, weight in ranks.share(batch.baseline, _cut(settings)):
        laid = lay(micro, model.device, settings.layout)
        with torch.no_grad(), _autocast(model, settings.autocast):
            policy = target_stats(model, laid, totals)
            theirs, _ = _reference(model, laid, micro, totals, reference)
        found += weight * objective.baseline(policy, theirs)
    model.lm.train()
    return ranks.sum(found)


def _reference_tokens(objective: Objective, batch: Batch) -> int:
    """Tokens that go through a live reference for one batch."""
    return _tokens(batch.baseline) + (_tokens(batch.rendered) if objective.needs_reference != "nothing" else 0)


def _tokens(examples: Seq[Seq[Sequence]]) -> int:
    return sum(len(s.ids) for example in examples for s in example)


def _autocast(model: Model, dtype: torch.dtype | None) -> torch.autocast | nullcontext[None]:
    return nullcontext() if dtype is None else torch.autocast(model.device.type, dtype)


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
