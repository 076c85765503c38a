"""Ask, look, ask again: round k draws the k-th answer to every prompt that still lacks an acceptable one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from leeway.data.items import Example
from leeway.generation.backend import Conversation, Reply
from leeway.pairs.base import Asker

BATCH = 512  # prompts between two writes to the cache: a kill loses no more


@dataclass(frozen=True)
class Ask:
    """An example and the conversation that the base model is to answer."""

    example: Example
    conversation: Conversation


Reasons = Callable[[Seq[Ask], Seq[Reply]], list[str | None]]  # why an answer is rejected; None accepts it


@dataclass
class Drawn:
    """The accepted answer of each ask, by its place, and what became of the others."""

    accepted: dict[int, str] = field(default_factory=dict)
    rejected: Counter[str] = field(default_factory=Counter)
    by_round: list[int] = field(default_factory=list)


def rounds(asks: Seq[Ask], asker: Asker, reasons: Reasons) -> Drawn:
    """The first acceptable answer to each, of at most `samples`."""
    drawn = Drawn()
    for sample in range(asker.settings.samples):
        lacking = [i for i in range(len(asks)) if i not in drawn.accepted]
        for start in range(0, len(lacking), BATCH):
            batch = lacking[start : start + BATCH]
            asked = [asks[i] for i in batch]
            replies = asker.answers([a.conversation for a in asked], sample)
            for i, reply, reason in zip(batch, replies, reasons(asked, replies), strict=True):
                if reason is None:
                    drawn.accepted[i] = reply.text
                else:
                    drawn.rejected[reason] += 1
        drawn.by_round.append(len(lacking) - sum(i not in drawn.accepted for i in lacking))
    return drawn
