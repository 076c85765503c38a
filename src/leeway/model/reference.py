"""The reference: the model that a trajectory is compared with, as it answers while the policy trains on.

It has an identity, and it answers with dropout off, without gradients and without drawing a random number; sums are
taken in float32. Objectives see its statistics and never the model.
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
from leeway.model.reference_cache import Shelf
from leeway.model.token_stats import Head, token_logps

Frozen = dict[Parameter, Tensor]

ARITHMETIC = 3  # another number where our own code computes a reference in another way


@dataclass
class Reference:
    """A model by its `hash`, and how it is had beside the policy.

    Live, nothing given: the adapter is switched off, and the base answers; this takes no memory.
    Live, `frozen`: what trains takes these values for the pass. This takes one more copy of what trains: little for an
    adapter, the size of the model for whole weights.
    Cached: `kept`, on disk, holds what it said of each sequence before the first step; `frozen` is released then, but
    for the reference's own output layer where whole weights train. `spent` counts the tokens of sequences by the
    optimiser step that needs them first.
    """

    hash: str = ""
    frozen: Frozen | None = None
    kept: Shelf | None = None
    spent: dict[int, int] = field(default_factory=dict)
    released: bool = False

    def head(self, policy: Head) -> Head:
        """The policy's output layer with the reference's beside it, where the policy's trains."""
        weight_VD = (self.frozen or {}).get(policy.weight_VD)  # type: ignore[call-overload]
        return policy if weight_VD is None else replace(policy, reference=replace(policy, weight_VD=weight_VD))

    def logps(self, model: Model, batch: PackedBatch, sequences: Seq[Sequence]) -> Tensor:
        """Log-probabilities of a batch's measured tokens, [T] in nats; `sequences` are what it was laid from."""
        if self.kept is not None:
            return self.kept.logps(sequences).to(model.device)
        with as_reference(model, self):
            return token_logps(hidden_at_measured(model, batch), batch.measured_T, model.head)

    def hidden(self, model: Model, batch: PackedBatch, sequences: Seq[Sequence]) -> Tensor:
        """The final hidden states that predict them, [T, D]."""
        if self.kept is not None:
            return self.kept.states(sequences).to(model.device)
        with as_reference(model, self):
            return hidden_at_measured(model, batch)

    def release(self) -> None:
        """Let go of the frozen copy: from here on only what is kept can be said."""
        self.released, self.frozen = self.frozen is not None, None


def computed_as(model: Model, reference: Reference, autocast: torch.dtype | None, layout: Layout = "padded") -> str:
    """Whose numbers, and by which arithmetic: what has another name may differ in its last bits, and is kept apart."""
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
    """A copy of what trains, as it stands."""
    return {p: p.detach().clone() for p in trainable(model)}


@contextmanager
def as_reference(model: Model, reference: Reference | None = None) -> Iterator[None]:
    """The model as the reference: its frozen values or no adapter, no dropout, no gradients, no random number drawn."""
    frozen = reference.frozen if reference else None
    if (reference and reference.released) or (frozen is None and not is_low_rank(model)):
        raise ValueError("this reference has no model any more: only what it was asked beforehand is known")
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
    """Parameters with other values for as long as the context lasts; their own tensors come back after."""
    own = {p: p.data for p in frozen}
    for p, value in frozen.items():
        p.data = value
    try:
        yield
    finally:
        for p, data in own.items():
            p.data = data
