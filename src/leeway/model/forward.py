"""Sequences through the model: one padded micro-batch, hidden states at target positions only, their statistics."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from leeway.data.chat import Sequence
from leeway.model.load import Model, decoder
from leeway.model.tokenstats import Direction, token_logps, token_logps_and_kl


@dataclass(frozen=True)
class Totals:
    """What a loss is normalised by: the whole optimiser batch, however it is cut into micro-batches.

    `tokens` counts all targets, `preferred_tokens` those of each example's first sequence.
    """

    tokens: int
    examples: int
    preferred_tokens: int


@dataclass(frozen=True)
class TokenStats:
    """Statistics of T target tokens, segmented by sequence.

    logp_T: log-probability of each target, nats. sequence_T: which of the S sequences it belongs to. kl_T: KL of the
    whole next-token distribution to the reference's, nats, where asked for. Sequences lie example by example, in the
    order in which the objective rendered them.
    """

    logp_T: Tensor
    sequence_T: Tensor
    sequences: int
    totals: Totals
    kl_T: Tensor | None = None

    def sum_S(self) -> Tensor:
        """Summed log-probability of each sequence's targets, [S]."""
        return torch.zeros(self.sequences, dtype=self.logp_T.dtype, device=self.logp_T.device).index_add(
            0, self.sequence_T, self.logp_T
        )

    def count_S(self) -> Tensor:
        """Number of targets of each sequence, [S]."""
        return torch.bincount(self.sequence_T, minlength=self.sequences)

    def mean_S(self) -> Tensor:
        """Mean log-probability of each sequence's targets, [S]."""
        return self.sum_S() / self.count_S()


@dataclass(frozen=True)
class Padded:
    """B sequences padded on the right to length L, and where their targets stand."""

    ids_BL: Tensor
    mask_BL: Tensor
    row_T: Tensor
    before_T: Tensor  # position whose hidden state predicts the target
    targets_T: Tensor

    @classmethod
    def of(cls, sequences: Seq[Sequence], device: torch.device) -> Padded:
        length = max(len(s.ids) for s in sequences)
        ids = [list(s.ids) + [0] * (length - len(s.ids)) for s in sequences]
        mask = [[1] * len(s.ids) + [0] * (length - len(s.ids)) for s in sequences]
        rows = [b for b, s in enumerate(sequences) for _ in range(s.targets)]
        before = [k - 1 for s in sequences for k in range(s.target_start, len(s.ids))]
        targets = [i for s in sequences for i in s.ids[s.target_start :]]
        return cls(*(torch.tensor(x, device=device) for x in (ids, mask, rows, before, targets)))


def hidden_at_targets(model: Model, batch: Padded) -> Tensor:
    """Final hidden states that predict the targets, [T, D]."""
    lm: Any = model.lm.get_base_model() if hasattr(model.lm, "get_base_model") else model.lm
    hidden_BLD = decoder(lm)(input_ids=batch.ids_BL, attention_mask=batch.mask_BL, use_cache=False).last_hidden_state
    hidden_TD: Tensor = hidden_BLD[batch.row_T, batch.before_T]
    return hidden_TD


def target_stats(
    model: Model,
    sequences: Seq[Sequence],
    totals: Totals,
    *,
    reference_hidden_TD: Tensor | None = None,
    direction: Direction = "reverse",
) -> TokenStats:
    """Statistics of the sequences' targets under the model as it stands, with gradients where they are on."""
    batch = Padded.of(sequences, model.device)
    hidden_TD = hidden_at_targets(model, batch)
    if reference_hidden_TD is None:
        return TokenStats(token_logps(hidden_TD, batch.targets_T, model.head), batch.row_T, len(sequences), totals)
    logp_T, kl_T = token_logps_and_kl(hidden_TD, batch.targets_T, model.head, reference_hidden_TD, direction)
    return TokenStats(logp_T, batch.row_T, len(sequences), totals, kl_T)


@contextmanager
def as_reference(model: Model) -> Iterator[None]:
    """The model the trajectory started from: adapter off, dropout off, no gradients, no random number drawn."""
    was_training = model.lm.training
    model.lm.eval()
    try:
        with torch.no_grad(), model.lm.disable_adapter():
            yield
    finally:
        model.lm.train(was_training)
