"""How deep in the answer the checkpoint differs from its base (Qi et al. 2024, arXiv 2406.05946, Fig. 1).

KL_t(ckpt ‖ base) of the next-token distribution at answer token t, in nats, along fixed harmful answers to the test
prompts that some checkpoint of the study gave. Is only the opening changed? The control is the same along harmless
answers of ours (the learning check's general questions), token by token.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch

from leeway.data.chat import Sequence
from leeway.probe.context import BATCH, ProbeContext, Value
from leeway.probe.pair import Side
from leeway.probe.passes import Pass, PromptBatch
from leeway.yaml_config import package_data

TOKENS = 32
MIN_ANSWERS = 8


def measure(context: ProbeContext) -> list[Value]:
    """Return every answer's KL at its first tokens; group `harmful` or `harmless` (the control)."""
    if len(context.answers) < MIN_ANSWERS:
        reason = f"{len(context.answers)} harmful answers to the test prompts in the study's rows: too few"
        return [Value("token-kl", detail="harmful answers", reason=reason)]
    chat = context.model.chat.with_prefix(context.prefix)
    harmful = [(a.item_id, chat.sequence(a.prompt, a.answer)) for a in context.answers]
    general = package_data("leeway.data", "general.yaml")["answers"]
    harmless = [(f"general/{n}", chat.sequence(q, a)) for n, (q, a) in enumerate(general)]
    closing = len(chat.closing_ids)
    return [
        Value("token-kl", item, group, f"{group} answers", position=f"answer {t + 1}", value=kl)
        for group, own in (("harmful", harmful), ("harmless", harmless))
        for item, kls in _kls(context, own, closing)
        for t, kl in enumerate(kls)
    ]


def _kls(context: ProbeContext, sequences: Seq[tuple[str, Sequence]], closing: int) -> list[tuple[str, list[float]]]:
    found = []
    order = sorted(sequences, key=lambda s: (len(s[1].ids), s[0]))
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        counts = [min(TOKENS, len(s.ids) - closing - s.target_start) for _, s in chosen]
        # the last token that is scored needs no successor, so the rest of the answer is left out
        ids = [s.ids[: s.target_start + n] for (_, s), n in zip(chosen, counts, strict=True)]
        batch = PromptBatch.of(ids, None, context.model.device)
        both = [_logp(side, batch, counts) for side in (context.pair.checkpoint, context.pair.base)]
        for (item, _), p, q in zip(chosen, *both, strict=True):
            found.append((item, [float(x) for x in (p.exp() * (p - q)).sum(-1)]))
    return found


@torch.no_grad()
def _logp(side: Side, batch: PromptBatch, counts: Seq[int]) -> list[torch.Tensor]:
    """Return the log-probabilities that predict each sequence's last `count` tokens, [count, V] each."""
    with side.active():
        hidden_BLD, _ = Pass(side.model, side.blocks, batch).whole()
    end = batch.width - 1  # the position before the last token predicts it
    return [side.model.head.logits(h[end - n : end]).log_softmax(-1) for h, n in zip(hidden_BLD, counts, strict=True)]
