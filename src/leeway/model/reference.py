"""The reference model that an objective compares the policy with, while the policy trains.

It has a content hash and runs with dropout off, without gradients and without consuming random numbers; sums are in
float32. Objectives see its statistics, never the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import Parameter

from leeway.data.chat import Sequence
from leeway.hashing import digest
from leeway.model.adapters import is_low_rank, trainable
from leeway.model.forward import hidden_at_measured
from leeway.model.fsdp import exchanged, is_shard
from leeway.model.load import Model
from leeway.model.packing import Layout, PackedBatch
from leeway.model.reference_cache import ReferenceStore
from leeway.model.token_stats import Head, token_logps

Frozen = dict[Parameter, Tensor]

ARITHMETIC = 3  # increase when the computation of a reference changes


@dataclass
class Reference:
    """A reference model, identified by its `hash`, in one of three forms.

    Live, no values given: the adapter is disabled and the base answers; no extra memory.
    Live, `frozen`: trainable parameters take these values for the pass; one more copy of what trains.
    Cached: `cached` on disk holds its statistics for each sequence, computed before the first step; `frozen` is then
    released, except the reference's output layer in full fine-tuning. `spent` counts tokens by the optimiser step that
    first needs them.
    """

    hash: str = ""
    frozen: Frozen | None = None
    cached: ReferenceStore | None = None
    spent: dict[int, int] = field(default_factory=dict)
    released: bool = False

    def head(self, policy: Head) -> Head:
        """Return the policy's output layer with the reference's attached, if the policy's is trained."""
        weight_VD = (self.frozen or {}).get(policy.weight_VD)  # type: ignore[call-overload]
        return policy if weight_VD is None else replace(policy, reference=replace(policy, weight_VD=weight_VD))

    def logps(self, model: Model, batch: PackedBatch, sequences: Seq[Sequence]) -> Tensor:
        """Return log-probabilities of the batch's measured tokens, [T], nats; `sequences` as packed."""
        if self.cached is not None:
            return self.cached.logps(sequences).to(model.device)
        with as_reference(model, self):
            return token_logps(hidden_at_measured(model, batch), batch.measured_T, model.head)

    def hidden(self, model: Model, batch: PackedBatch, sequences: Seq[Sequence]) -> Tensor:
        """Return the final hidden states that predict them, [T, D]."""
        if self.cached is not None:
            return self.cached.states(sequences).to(model.device)
        with as_reference(model, self):
            return hidden_at_measured(model, batch)

    def release(self) -> None:
        """Drop the frozen copy; only cached statistics remain available."""
        self.released, self.frozen = self.frozen is not None, None


def computed_as(model: Model, reference: Reference, autocast: torch.dtype | None, layout: Layout = "padded") -> str:
    """Return the cache key of a reference and its arithmetic: anything that may change the last bits."""
    on_cpu = model.device.type == "cpu"
    return digest(
        "reference",
        ARITHMETIC,
        layout,
        reference.hash,
        model.head.blocked,
        str(model.head.weight_VD.dtype),
        str(autocast),
        torch.__version__,
        [torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()] if on_cpu else model.device.type,
    )


def freeze(model: Model) -> Frozen:
    """Return a copy of the trainable parameters."""
    return {p: p.detach().clone() for p in trainable(model)}


@contextmanager
def as_reference(model: Model, reference: Reference | None = None) -> Iterator[None]:
    """Run the model as the reference: frozen values or no adapter, no dropout, no gradients, no random numbers."""
    frozen = reference.frozen if reference else None
    if (reference and reference.released) or (frozen is None and not is_low_rank(model)):
        raise ValueError("this reference was released: only cached statistics are available")
    was_training = model.lm.training
    model.lm.eval()
    try:
        with torch.no_grad():
            if frozen is None:
                with model.lm.disable_adapter():
                    yield
            else:
                with exchanged(model.lm, frozen) if any(map(is_shard, frozen)) else _values(frozen):
                    yield
    finally:
        model.lm.train(was_training)


@contextmanager
def _values(frozen: Frozen) -> Iterator[None]:
    """Replace parameter values within the context."""
    own = {p: p.data for p in frozen}
    for p, value in frozen.items():
        p.data = value
    try:
        yield
    finally:
        for p, data in own.items():
            p.data = data
