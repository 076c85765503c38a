"""What a checkpoint learned: likelihoods of held-out answers, and the KL to the base along them, by teacher forcing.

The KL is D(checkpoint || base) of the next-token distribution, averaged over the tokens of *reference* answers: the
preferred answer of a held-out example, and a fixed answer to each general prompt. The base's own answers would need a
generator and avoid what the task teaches; answers sampled from a checkpoint would give each checkpoint other contexts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from leeway.data.chat import Chat, Sequence
from leeway.data.types import Example
from leeway.hashing import digest
from leeway.model.forward import hidden_at_measured
from leeway.model.load import Model
from leeway.model.packing import pack_batch
from leeway.model.token_stats import Head, token_logps, token_logps_and_kl
from leeway.training.batch import Optim

Prompts = Literal["task", "general"]


@dataclass(frozen=True)
class LearningItems:
    """Held-out examples of the task (no two with one question), and answered prompts off the task.

    `missing` says why there are none; nothing is then measured.
    """

    task: tuple[Example, ...] = ()
    general: tuple[Example, ...] = ()
    missing: str = ""

    def __len__(self) -> int:
        return len(self.task) + len(self.general)

    @property
    def hash(self) -> str:
        parts = [[[e.id, e.prompt, e.preferred, e.dispreferred] for e in part] for part in (self.task, self.general)]
        return digest("learning", 1, *parts)

    def rendered(self, chat: Chat) -> list[tuple[Prompts, Example, tuple[Sequence, ...]]]:
        """Return (kind of prompt, example, its sequences: preferred, then dispreferred if it has one) by item."""
        both: tuple[tuple[Prompts, tuple[Example, ...]], ...] = (("task", self.task), ("general", self.general))
        found = []
        for kind, examples in both:
            for e in examples:
                answers = [e.preferred, *([e.dispreferred] if e.dispreferred and kind == "task" else [])]
                found.append((kind, e, tuple(chat.sequence(e.prompt, a) for a in answers)))
        return found


@dataclass(frozen=True)
class BaseStats:
    """The base's final hidden states [T, D] and log-probabilities [T] at the items' answer tokens, by micro-batch.

    `head` is a copy of its output layer where the checkpoint's own may differ, else None.
    """

    states: tuple[Tensor, ...]
    logps: tuple[Tensor, ...]
    head: Head | None


@torch.no_grad()
def base_stats(model: Model, items: LearningItems, prefix: str, settings: Optim, *, whole: bool) -> BaseStats:
    """Return the base's statistics under a prefix, on the CPU. `whole`: checkpoints train every weight."""
    found = list(_passes(model, items, prefix, settings))
    head = replace(model.head, weight_VD=model.head.weight_VD.detach().clone()) if whole else None
    logps = tuple(token_logps(hidden_TD, targets_T, model.head).cpu() for _, hidden_TD, targets_T in found)
    return BaseStats(tuple(hidden_TD.cpu() for _, hidden_TD, _ in found), logps, head)


@torch.no_grad()
def measure(model: Model, base: BaseStats, items: LearningItems, prefix: str, settings: Optim) -> list[dict[str, Any]]:
    """Return one record per item, in order: nats per answer token of the checkpoint and of the base, on one prompt.

    `nll` and `rejected_nll` are means over the answer's tokens, the end of turn included; `kl` is that of D(checkpoint
    || base) along the preferred answer.
    """
    head = replace(model.head, reference=base.head) if base.head else model.head
    passes, means = _passes(model, items, prefix, settings), dict[Sequence, tuple[float, ...]]()
    for (order, hidden_TD, targets_T), states_TD, base_T in zip(passes, base.states, base.logps, strict=True):
        logp_T, kl_T = token_logps_and_kl(hidden_TD, targets_T, head, states_TD.to(model.device), "reverse")
        sizes = [s.measured for s in order]
        parts = [torch.split(t.double(), sizes) for t in (-logp_T.cpu(), -base_T, kl_T.cpu())]
        means |= {s: tuple(float(t.mean()) for t in own) for s, *own in zip(order, *parts, strict=True)}
    records = []
    for kind, example, (preferred, *rejected) in items.rendered(model.chat.with_prefix(prefix)):
        nll, base_nll, kl = means[preferred]
        record = {"prompts": kind, "item_id": example.id, "answer_tokens": preferred.measured, "nll": nll}
        record |= {"base_nll": base_nll, "kl": max(0.0, kl)}  # below 0 by rounding only
        if rejected:
            record |= dict(zip(("rejected_nll", "base_rejected_nll"), means[rejected[0]], strict=False))
        records.append(record)
    return records


def _passes(
    model: Model, items: LearningItems, prefix: str, settings: Optim
) -> Iterator[tuple[list[Sequence], Tensor, Tensor]]:
    """Yield (sequences, final hidden states [T, D], measured tokens [T]) of each micro-batch."""
    rendered = items.rendered(model.chat.with_prefix(prefix))
    for micro in settings.split([sequences for _, _, sequences in rendered]):
        batch = pack_batch(micro, model.device, settings.layout)
        yield [s for example in micro for s in example], hidden_at_measured(model, batch), batch.measured_T
