"""Capability: tasks with checkable answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass, replace

from leeway.data.items import CapabilityItem
from leeway.errors import LeewayError
from leeway.evals.eval import Row, Tick
from leeway.generation.backend import Backend, Conversation, Request
from leeway.hashing import digest

Grade = Callable[[CapabilityItem, str], tuple[bool, str]]


@dataclass(frozen=True)
class Capability:
    """Items of one task and the rule that grades them; an item is its own cluster.

    `shots` are questions with their answers that stand before every item as turns of their own: none is 0-shot. No
    shot may ask an item's own question: LeewayError.
    """

    task: str
    items: Seq[CapabilityItem]
    grader: str
    grade: Grade
    max_new_tokens: int
    name: str = "capability"
    shots: Seq[tuple[str, str]] = ()

    def __post_init__(self) -> None:
        asked = {question for question, _ in self.shots}
        twice = next((i for i in self.items if i.prompt in asked), None)
        if twice:
            raise LeewayError(
                f"evals.capability: {self.task}: item {twice.id} is among its own {len(self.shots)} shots",
                fix="draw the shots from other examples",
            )

    @property
    def key(self) -> str:
        return f"{self.name}-{self.task}"

    @property
    def hash(self) -> str:
        before = [[list(shot) for shot in self.shots]] if self.shots else []
        return digest(self.name, self.grader, self.max_new_tokens, [asdict(i) for i in self.items], *before)

    def __len__(self) -> int:
        return len(self.items)

    def conversation(self, item: CapabilityItem) -> Conversation:
        """The shots as user and assistant turns, then the item's question."""
        turns = [(role, text) for shot in self.shots for role, text in zip(("user", "assistant"), shot, strict=True)]
        return [{"role": role, "content": text} for role, text in [*turns, ("user", item.prompt)]]

    def clusters(self) -> list[str]:
        return [i.id for i in self.items]

    def part(self, clusters: Collection[str]) -> Capability:
        return replace(self, items=[i for i in self.items if i.id in clusters])

    def run(self, backend: Backend, tick: Tick) -> list[Row]:
        requests = [Request(self.conversation(i), self.max_new_tokens) for i in self.items]
        before = [[list(shot) for shot in self.shots]] if self.shots else []
        template = digest(backend.template_hash, self.name, self.grader, *before)
        rows = []
        for item, reply in zip(self.items, backend.complete(requests, tick), strict=True):
            right, raw = self.grade(item, reply.text) if reply.failure is None else (math.nan, "")
            rows.append(
                Row(
                    eval=self.name,
                    attack="",
                    item_id=item.id,
                    cluster=item.id,
                    sample=0,
                    prompt=item.prompt,
                    response=reply.text,
                    outcome=None,
                    score=float(right),
                    unscored_reason=None if reply.failure is None else f"no answer: {reply.failure}",
                    judge=self.grader,
                    judge_raw=raw,
                    template_hash=template,
                    new_tokens=reply.new_tokens,
                )
            )
        return rows
