"""The one optimiser loop, used for every objective, every budget and the organism itself."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from leeway.data.chat import Sequence
from leeway.errors import NotFiniteError
from leeway.model.forward import TokenStats, Totals, target_stats
from leeway.model.load import Model
from leeway.model.packing import Examples, PackedBatch, pack_batch
from leeway.model.reference import Reference
from leeway.objectives.objective import Objective
from leeway.training.batch import Batch, Optim
from leeway.training.distributed import ALONE, Distributed


@dataclass(frozen=True)
class Passes:
    """Forward and backward passes of one batch; gradients sum, as losses are normalised by the batch's totals."""

    model: Model
    objective: Objective
    settings: Optim
    reference: Reference
    ranks: Distributed

    def gradient(self, batch: Batch) -> tuple[Totals, float, dict[str, float]]:
        """Accumulate the gradient of the batch's loss; return its totals, loss (nats) and step metrics."""
        torch.manual_seed(self.ranks.seed(batch.seed))
        totals, loss = self.totals(batch), 0.0
        metrics: dict[str, float] = {}
        self.model.lm.train()
        for micro, weight in self.ranks.share(batch.rendered, self.settings.split):
            part, also = self._loss(micro, totals)
            part = weight * part
            part.backward()  # type: ignore[no-untyped-call]
            loss += part.item()
            del part  # its graph, before the next one is built
            for name, value in also.items():
                metrics[name] = metrics.get(name, 0.0) + weight * value.item()
        return totals, self.ranks.sum(loss), {name: self.ranks.sum(value) for name, value in metrics.items()}

    def totals(self, batch: Batch) -> Totals:
        """Return the batch's normalisers, including the objective's baseline pass if it has one."""
        totals = Totals(
            tokens=sum(s.targets for example in batch.rendered for s in example),
            examples=len(batch.rendered),
            preferred_tokens=sum(example[0].targets for example in batch.rendered),
            measured_tokens=sum(s.measured for example in batch.rendered for s in example),
            preferred_measured=sum(example[0].measured for example in batch.rendered),
        )
        return replace(totals, baseline=self._baseline(batch, totals)) if batch.baseline else totals

    def _baseline(self, batch: Batch, totals: Totals) -> float:
        """Run the objective's baseline pass: policy without dropout and without gradient."""
        baseline = 0.0
        self.model.lm.eval()
        for micro, weight in self.ranks.share(batch.baseline, self.settings.split):
            packed = pack_batch(micro, self.model.device, self.settings.layout)
            with torch.no_grad():
                policy = target_stats(self.model, packed, totals)
                reference = self._reference(packed, micro, totals)
            baseline += weight * self.objective.baseline(policy, reference)
        return self.ranks.sum(baseline)

    def _loss(self, micro: Examples, totals: Totals) -> tuple[Tensor, dict[str, Tensor]]:
        model, objective = self.model, self.objective
        batch = pack_batch(micro, model.device, self.settings.layout)
        if objective.needs_reference == "distribution":
            reference_TD = self.reference.hidden(model, batch, _flat(micro))
            policy = target_stats(model, batch, totals, reference_hidden_TD=reference_TD, direction=objective.direction)
            reference = None
        else:
            reference = self._reference(batch, micro, totals) if objective.needs_reference == "logps" else None
            policy = target_stats(model, batch, totals)
        with torch.no_grad():
            metrics = objective.step_metrics(policy)
        return objective.loss(policy, reference), metrics

    def _reference(self, batch: PackedBatch, micro: Examples, totals: Totals) -> TokenStats:
        logp_T = self.reference.logps(self.model, batch, _flat(micro))
        return TokenStats(logp_T, batch.sequence_T, batch.sequences, totals, None, batch.target_T)


def _flat(micro: Examples) -> list[Sequence]:
    return [s for example in micro for s in example]


Decay = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class Step:
    """One optimiser step. Token counts exclude padding; `seconds` is wall-clock time; `metrics` are the objective's."""

    step: int
    loss: float
    grad_norm: float
    lr: float
    target_tokens: int
    processed_tokens: int
    reference_tokens: int
    seconds: float
    metrics: dict[str, float] = field(default_factory=dict)

    def record(self) -> dict[str, float]:
        """Return the line of the step log."""
        return {name: value for name, value in asdict(self).items() if name != "metrics"} | self.metrics


def optimise(
    model: Model,
    objective: Objective,
    batches: Iterable[Batch],
    optimiser: torch.optim.Optimizer,
    lr_at: Callable[[int], float],
    settings: Optim,
    reference: Reference | None = None,
    ranks: Distributed = ALONE,
) -> Iterator[Step]:
    """Take one optimiser step per batch and yield its `Step`.

    `reference` defaults to `model` with its adapter disabled. Every rank of `ranks` runs this loop over the same
    batches. Raises LeewayError for a non-finite loss or gradient, naming the step and its examples.
    """
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    reference = reference or Reference()
    passes = Passes(model, objective, settings, reference, ranks)
    for batch in batches:
        started = time.perf_counter()
        totals, loss, metrics = passes.gradient(batch)
        norm = ranks.clip(parameters, settings.clip)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = f"{objective.name}, step {batch.step}: loss {loss}, gradient norm {norm}, "
            what += f"on examples {', '.join(batch.ids)}"
            fix = "inspect these examples with `leeway show`, or lower optim.lr; the last checkpoint is kept"
            raise NotFiniteError(what, fix=fix)
        lr = lr_at(batch.step)
        for group in optimiser.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        processed = _tokens(batch.rendered) + _tokens(batch.baseline)
        reference_tokens, seconds = _reference_tokens(objective, batch, reference), time.perf_counter() - started
        yield Step(batch.step, loss, norm, lr, totals.tokens, processed, reference_tokens, seconds, metrics)
    model.lm.eval()


def _reference_tokens(objective: Objective, batch: Batch, reference: Reference) -> int:
    """Return the tokens that went through the reference for one batch, live or precomputed for its first use."""
    if reference.cached is not None:
        return reference.spent.get(batch.step, 0)
    return _tokens(batch.baseline) + (_tokens(batch.rendered) if objective.needs_reference != "nothing" else 0)


def _tokens(examples: Seq[Seq[Sequence]]) -> int:
    return sum(len(s.ids) for example in examples for s in example)


def after_warmup(lr: float, warmup_steps: int, decay: Decay, steps: int) -> Callable[[int], float]:
    """Return the schedule: linear warm-up over fixed steps, then constant, linear or cosine decay to 0 at `steps` + 1.

    With a constant rate a checkpoint at 25k tokens equals a 25k run; a decay needs one run per budget.
    """

    def lr_at(step: int) -> float:
        if step < warmup_steps:
            return lr * (step / warmup_steps)
        progress = (step - warmup_steps) / (steps - warmup_steps + 1)
        if decay == "linear":
            return lr * (1.0 - progress)
        return lr * 0.5 * (1.0 + math.cos(math.pi * progress)) if decay == "cosine" else lr

    return lr_at
