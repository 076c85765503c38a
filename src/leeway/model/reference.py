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
from leeway.model.load import Model
from leeway.model.sharded import exchanged, is_shard
from leeway.model.tokenstats import Head

Frozen = dict[Parameter, Tensor]


@dataclass(frozen=True)
class Kept:
    """Statistics of one sequence's M measured tokens, on the CPU: log-probabilities, nats, and final hidden states."""

    logp_M: Tensor
    hidden_MD: Tensor | None


@dataclass
class Reference:
    """A model by its `hash`, and how it is had beside the policy.

    Live, nothing given: the adapter is switched off, and the base answers; this takes no memory.
    Live, `frozen`: what trains takes these values for the pass. This takes one more copy of what trains: little for an
    adapter, the size of the model for whole weights.
    Cached: `kept` holds what it said of each sequence, computed before the first step; `frozen` is released then. This
    takes 4 bytes for each measured token, and for a KL a final hidden state (its width times 4 bytes, 2 in bfloat16)
    more, in main memory; and for whole weights the reference's own output layer. `spent` counts the tokens that went
    through it, by the optimiser step that first needed them.
    """

    hash: str = ""
    frozen: Frozen | None = None
    kept: dict[str, Kept] | None = None
    spent: dict[int, int] = field(default_factory=dict)
    released: bool = False

    def head(self, policy: Head) -> Head:
        """The policy's output layer with the reference's beside it, where the policy's trains."""
        weight_VD = (self.frozen or {}).get(policy.weight_VD)  # type: ignore[call-overload]
        return policy if weight_VD is None else replace(policy, reference=replace(policy, weight_VD=weight_VD))

    def key(self, sequence: Sequence) -> str:
        return digest(self.hash, sequence.ids, sequence.start)

    def keep(self, sequences: Seq[Sequence], logp_T: Tensor, hidden_TD: Tensor | None) -> None:
        """Keep the statistics of sequences that come for the first time; the tokens lie sequence by sequence."""
        assert self.kept is not None
        at = 0
        for s in sequences:
            part = slice(at, at + s.measured)
            at += s.measured
            if (key := self.key(s)) not in self.kept:
                hidden_MD = None if hidden_TD is None else hidden_TD[part].to("cpu", copy=True)
                self.kept[key] = Kept(logp_T[part].to("cpu", copy=True), hidden_MD)

    def recall(self, sequences: Seq[Sequence], device: torch.device) -> tuple[Tensor, Tensor | None] | None:
        """What is kept of these sequences, [T] and [T, D]; None where the reference answers live."""
        if self.kept is None:
            return None
        found = [self.kept[self.key(s)] for s in sequences]
        hidden = [k.hidden_MD for k in found if k.hidden_MD is not None]
        return torch.cat([k.logp_M for k in found]).to(device), torch.cat(hidden).to(device) if hidden else None

    def release(self) -> None:
        """Let go of the frozen copy: from here on only what is kept can be said."""
        self.released, self.frozen = self.frozen is not None, None


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
