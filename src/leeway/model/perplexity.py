"""How surprising a text is to a model's base weights: mean negative log-likelihood per token, in nats."""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from leeway.data.chat import Sequence
from leeway.hashing import digest
from leeway.model.adapters import is_low_rank
from leeway.model.forward import Totals, target_stats
from leeway.model.layout import Padded
from leeway.model.load import Model

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
