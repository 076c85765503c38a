"""Sequences through the model: hidden states where tokens are measured, and the statistics of those tokens.

How surprising a text is to a model's base weights: mean negative log-likelihood per token, in nats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from leeway.data.chat import Sequence
from leeway.errors import LeewayError
from leeway.hashing import digest
from leeway.model.adapters import is_low_rank
from leeway.model.fused.decoder import hidden, why_not
from leeway.model.load import Model, decoder
from leeway.model.packing import Asked, Flat, Layout, PackedBatch, Padded
from leeway.model.token_stats import Direction, token_logps, token_logps_and_kl

FUSED_ADAPTERS = ("lora", "rslora")
APART = 1024  # tokens


@dataclass(frozen=True)
class Totals:
    """What a loss is normalised by: the whole optimiser batch, however it is cut into micro-batches.

    `tokens` counts all targets, `preferred_tokens` those of each example's first sequence, `measured_tokens` the tokens
    that are measured, targets or not, `preferred_measured` those of each example's first sequence. `baseline` is what
    the objective's own pass over the batch found (KTO's reference point), nats.
    """

    tokens: int
    examples: int
    preferred_tokens: int
    measured_tokens: int
    preferred_measured: int
    baseline: float = 0.0


@dataclass(frozen=True)
class TokenStats:
    """Statistics of T measured tokens, segmented by sequence.

    logp_T: log-probability of each, nats. sequence_T: which of the S sequences it belongs to. kl_T: KL of the whole
    next-token distribution to the reference's, nats, where asked for. target_T: which are targets (None: all).
    Sequences lie example by example, in the order in which the objective rendered them.
    """

    logp_T: Tensor
    sequence_T: Tensor
    sequences: int
    totals: Totals
    kl_T: Tensor | None = None
    target_T: Tensor | None = None

    @property
    def weight_T(self) -> Tensor:
        """1 for each target, 0 for what is only measured, [T]: the one mask that every mean is taken under."""
        if self.target_T is None:
            return torch.ones_like(self.logp_T)
        return self.target_T.to(self.logp_T.dtype)

    def sum_S(self) -> Tensor:
        """Summed log-probability of each sequence's targets, [S]."""
        return torch.zeros(self.sequences, dtype=self.logp_T.dtype, device=self.logp_T.device).index_add(
            0, self.sequence_T, self.logp_T * self.weight_T
        )

    def count_S(self) -> Tensor:
        """Number of targets of each sequence, [S]."""
        counted_T = self.sequence_T if self.target_T is None else self.sequence_T[self.target_T]
        return torch.bincount(counted_T, minlength=self.sequences)

    def mean_S(self) -> Tensor:
        """Mean log-probability of each sequence's targets, [S]."""
        return self.sum_S() / self.count_S()


def layout_of(asked: Asked, model: Model, adapter: str, *, sharded: bool = False) -> Layout:
    """The layout that micro-batches take: what is asked, or by `auto` what suits model, kind of adapter and device.

    On a CPU that is the fused decoder where it knows them, and padded rows elsewhere: those keep a GPU's attention
    kernels. It never depends on a measurement, since bits depend on it. Raises LeewayError where `fused` cannot be.
    """
    if asked == "padded" or asked == "packed":  # noqa: PLR1714 - the type checker follows this form alone
        return asked
    why = why_not(model.lm) or ("" if adapter in FUSED_ADAPTERS else f"adapter.kind is {adapter}")
    why = "its layers are in shards" if sharded else why
    if asked == "fused" and why:
        raise LeewayError(f"optim.layout: fused does not go with {model.name}: {why}", fix="use layout: auto")
    return "fused" if asked == "fused" or (not why and model.device.type == "cpu") else "padded"


def hidden_at_measured(model: Model, batch: PackedBatch) -> Tensor:
    """Final hidden states that predict the measured tokens, [T, D]."""
    if isinstance(batch, Flat):
        return hidden(model.lm, batch.ids_BL[0], batch.position_T, batch.blocks, batch.before_T)
    lm: Any = model.lm.get_base_model() if hasattr(model.lm, "get_base_model") else model.lm
    hidden_BLD = decoder(lm)(**batch.inputs(lm), use_cache=False).last_hidden_state
    hidden_TD: Tensor = hidden_BLD[batch.row_T, batch.before_T]
    return hidden_TD


def hidden_apart(model: Model, sequences: Seq[Sequence]) -> Tensor:
    """The same of sequences in the fused layout, [T, D], the bits of each whoever its neighbours are.

    All products have APART rows (a longer sequence is given with no other, and a multiple of them), and a sequence's
    attention its own length. A row's sums do not depend on where it lies then, as long as rows are dealt out to threads
    evenly: their number has to be a power of two.
    """
    batch = Flat.of([[s] for s in sequences], model.device, rows=APART, waste=1.0)
    every_T = torch.arange(batch.ids_BL.shape[1], device=model.device)
    return hidden(model.lm, batch.ids_BL[0], batch.position_T, batch.blocks, every_T)[batch.before_T]


def target_stats(
    model: Model,
    batch: PackedBatch,
    totals: Totals,
    *,
    reference_hidden_TD: Tensor | None = None,
    direction: Direction = "reverse",
) -> TokenStats:
    """Statistics of the batch's measured tokens under the model as it stands, with gradients where they are on."""
    hidden_TD = hidden_at_measured(model, batch)
    kl_T = None
    if reference_hidden_TD is None:
        logp_T = token_logps(hidden_TD, batch.measured_T, model.head)
    else:
        logp_T, kl_T = token_logps_and_kl(hidden_TD, batch.measured_T, model.head, reference_hidden_TD, direction)
    return TokenStats(logp_T, batch.sequence_T, batch.sequences, totals, kl_T, batch.target_T)


NO_TOTALS = Totals(0, 0, 0, 0, 0)  # statistics are asked for, no loss


@torch.no_grad()
def mean_nll(model: Model, prompts: Seq[str], texts: Seq[str], *, batch: int = 32) -> list[float]:
    """Nats per token of each text as an answer to its prompt, the end of the turn left out; float32; NaN for no tokens
    and for more than fit into the context.

    An adapter is switched off, so that the base's opinion is asked. Where every weight was trained there is no base
    left: pass the base as a Model of its own.
    """
    closing = len(model.chat.closing_ids)
    sequences = [_without_closing(model.chat.sequence(p, t), closing) for p, t in zip(prompts, texts, strict=True)]
    found = [math.nan] * len(sequences)
    fits = [i for i, s in enumerate(sequences) if s.targets and len(s.ids) <= model.context]
    order = sorted(fits, key=lambda i: (len(sequences[i].ids), i))
    with model.lm.disable_adapter() if is_low_rank(model) else nullcontext():
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            stats = target_stats(model, Padded.of([sequences[i] for i in chosen], model.device), NO_TOTALS)
            for i, mean in zip(chosen, stats.mean_S().float().tolist(), strict=True):
                found[i] = -mean
    return found


def _without_closing(sequence: Sequence, closing: int) -> Sequence:
    return Sequence(sequence.ids[: len(sequence.ids) - closing], sequence.target_start)


@dataclass(frozen=True)
class Perplexity:
    """Mean NLL as a share of ln(vocabulary): 0 is certain, 1 is a uniform guess, whatever the tokenizer."""

    model: Model
    batch: int = 32

    @property
    def identity(self) -> str:
        """The base weights' hash and the chat template's."""
        return digest("perplexity", self.model.hash, self.model.chat.template_hash)

    def shares(self, prompts: Seq[str], texts: Seq[str]) -> list[float]:
        uniform = math.log(self.model.head.weight_VD.shape[0])
        return [nll / uniform for nll in mean_nll(self.model, prompts, texts, batch=self.batch)]
