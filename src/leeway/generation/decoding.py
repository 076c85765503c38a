"""Answers by the fused decoder: rows that have ended leave the batch, and it ends with its last one."""

from __future__ import annotations

from collections.abc import Collection
from collections.abc import Sequence as Seq

from leeway.generation.sampling import Ancestral
from leeway.model.fused.decode import Decoding
from leeway.model.load import Model

CROWDED = 0.75  # a batch is made smaller once no more of its rows than this are still at it


def decode(
    model: Model, prompts: Seq[tuple[int, ...]], limit: int, stop: Collection[int], drawing: Ancestral | None
) -> list[tuple[list[int], int | None]]:
    """Per prompt, at most `limit` new ids, a stop token among them, and the first step without finite scores.

    Greedy, or drawn by `drawing`, whose streams are the prompts'. A row without finite scores ends there.
    """
    said: list[list[int]] = [[] for _ in prompts]
    until: list[int | None] = [None] * len(prompts)
    rows, going = list(range(len(prompts))), set(range(len(prompts)))  # whose states these are; who is still at it
    decoding = Decoding(model.lm, prompts, model.device)
    hidden_BD = decoding.begin()
    for step in range(limit):
        scores_BV = model.head.logits(hidden_BD)
        lost = (~scores_BV.amax(-1).isfinite()).tolist()  # a NaN anywhere is the maximum
        token_B = scores_BV.argmax(-1) if drawing is None else drawing.tokens(scores_BV, rows)
        for row, token, bad in zip(rows, token_B.tolist(), lost, strict=True):
            if row in going and bad:
                until[row] = step
            elif row in going:
                said[row].append(token)
            if bad or token in stop:
                going.discard(row)
        if not going or step + 1 == limit:
            break
        if len(going) <= CROWDED * len(rows):
            kept = [k for k, row in enumerate(rows) if row in going]
            decoding.keep(kept)
            rows, token_B = [rows[k] for k in kept], token_B[kept]
        hidden_BD = decoding.step(token_B)
    return list(zip(said, until, strict=True))
