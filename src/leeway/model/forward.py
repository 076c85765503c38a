"""Forward passes: hidden states at measured tokens, token statistics, and mean NLL (perplexity)."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from leeway.data.chat import Sequence
from leeway.errors import LeewayError
from leeway.hashing import digest
from leeway.model.adapters import is_low_rank, unwrapped
from leeway.model.fused.decoder import hidden, why_not
from leeway.model.load import Model, decoder
from leeway.model.packing import Flat, Layout, LayoutSetting, PackedBatch, Padded
from leeway.model.token_stats import Direction, token_logps, token_logps_and_kl

FUSED_ADAPTERS = ("lora", "rslora")
APART = 1024  # tokens


@dataclass(frozen=True)
class Totals:
    """Normalisers of a loss, over the whole optimiser batch.

    `tokens`: all targets. `preferred_tokens`: targets of each example's first sequence. `measured_tokens`: all measured
    tokens, targets or not. `preferred_measured`: measured tokens of each example's first sequence. `baseline`: result
    of the objective's baseline pass (KTO's z0), nats.
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

    logp_T: log-probabilities, nats. sequence_T: index of the token's sequence among S. kl_T: full-vocabulary KL to the
    reference, nats, if requested. target_T: target mask (None: all are targets). Sequences are ordered example by
    example, as rendered.
    """

    logp_T: Tensor
    sequence_T: Tensor
    sequences: int
    totals: Totals
    kl_T: Tensor | None = None
    target_T: Tensor | None = None

    @property
    def weight_T(self) -> Tensor:
        """Return 1 for targets and 0 for other measured tokens, [T]: the one mask of every mean."""
        if self.target_T is None:
            return torch.ones_like(self.logp_T)
        return self.target_T.to(self.logp_T.dtype)

    def sum_S(self) -> Tensor:
        """Return the summed log-probability of each sequence's targets, [S], nats."""
        return torch.zeros(self.sequences, dtype=self.logp_T.dtype, device=self.logp_T.device).index_add(
            0, self.sequence_T, self.logp_T * self.weight_T
        )

    def mean_S(self) -> Tensor:
        """Return the mean log-probability of each sequence's targets, [S], nats."""
        counted_T = self.sequence_T if self.target_T is None else self.sequence_T[self.target_T]
        return self.sum_S() / torch.bincount(counted_T, minlength=self.sequences)


def layout_of(requested: LayoutSetting, model: Model, adapter: str, *, sharded: bool = False) -> Layout:
    """Resolve `auto`: fused on a CPU if the fused decoder supports model and adapter, else padded.

    Padded keeps a GPU's attention kernels. The choice never depends on a timing, since results are layout-dependent in
    their last bits. Raises LeewayError if `fused` is requested but unsupported.
    """
    if requested == "padded" or requested == "packed":  # noqa: PLR1714 - the type checker follows this form alone
        return requested
    why = "" if adapter in FUSED_ADAPTERS else f"adapter.kind is {adapter}"
    why = "its layers are in shards" if sharded else why_not(model.lm) or why
    if requested == "fused" and why:
        raise LeewayError(f"optim.layout: fused does not support {model.name}: {why}", fix="use layout: auto")
    return "fused" if requested == "fused" or (not why and model.device.type == "cpu") else "padded"


def hidden_at_measured(model: Model, batch: PackedBatch) -> Tensor:
    """Return the final hidden states that predict the measured tokens, [T, D]."""
    if isinstance(batch, Flat):
        return hidden(model.lm, batch.ids_BL[0], batch.position_T, batch.blocks, batch.before_T)
    lm = unwrapped(model.lm)
    hidden_BLD = decoder(lm)(**batch.inputs(lm), use_cache=False).last_hidden_state
    hidden_TD: Tensor = hidden_BLD[batch.row_T, batch.before_T]
    return hidden_TD


def hidden_apart(model: Model, sequences: Seq[Sequence]) -> Tensor:
    """Return `hidden_at_measured` in the fused layout, bitwise independent of the other sequences.

    All products have APART rows (a longer sequence runs alone, in a multiple of them), and attention runs per sequence
    length. A row's sums then do not depend on its position, as long as rows are split evenly over threads: the number
    of threads must be a power of two.
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
    """Return the statistics of the batch's measured tokens, with gradients if enabled."""
    hidden_TD = hidden_at_measured(model, batch)
    kl_T = None
    if reference_hidden_TD is None:
        logp_T = token_logps(hidden_TD, batch.measured_T, model.head)
    else:
        logp_T, kl_T = token_logps_and_kl(hidden_TD, batch.measured_T, model.head, reference_hidden_TD, direction)
    return TokenStats(logp_T, batch.sequence_T, batch.sequences, totals, kl_T, batch.target_T)


NO_TOTALS = Totals(0, 0, 0, 0, 0)  # statistics without a loss


@torch.no_grad()
def mean_nll(model: Model, prompts: Seq[str], texts: Seq[str], *, batch: int = 32) -> list[float]:
    """Return nats per token of each text as an answer to its prompt, without the closing tokens, in float32.

    NaN for texts without tokens or longer than the context. An adapter is disabled, so the base model is measured;
    after full fine-tuning pass the base as a Model of its own.
    """
    closing = len(model.chat.closing_ids)
    closed = [model.chat.sequence(p, t) for p, t in zip(prompts, texts, strict=True)]
    sequences = [Sequence(s.ids[: len(s.ids) - closing], s.target_start) for s in closed]
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


@dataclass(frozen=True)
class Perplexity:
    """Mean NLL divided by ln(vocabulary): 0 is certain, 1 is a uniform guess, comparable over tokenizers."""

    model: Model
    batch: int = 32

    @property
    def identity(self) -> str:
        """Return the hash of base weights and chat template."""
        return digest("perplexity", self.model.hash, self.model.chat.template_hash)

    def shares(self, prompts: Seq[str], texts: Seq[str]) -> list[float]:
        uniform = math.log(self.model.head.weight_VD.shape[0])
        return [nll / uniform for nll in mean_nll(self.model, prompts, texts, batch=self.batch)]
