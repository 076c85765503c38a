"""Capability: questions with checkable answers."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass

from leeway.data.items import CapabilityItem
from leeway.evals.eval import Row, Tick
from leeway.generation.backend import Backend, Request
from leeway.hashing import digest

Grade = Callable[[CapabilityItem, str], tuple[bool, str]]


@dataclass(frozen=True)
class Capability:
    """Items of one task and the rule that grades them; an item is its own cluster."""

    task: str
    items: Seq[CapabilityItem]
    grader: str
    grade: Grade
    max_new_tokens: int
    name: str = "capability"

    @property
    def key(self) -> str:
        return f"{self.name}-{self.task}"

    @property
    def hash(self) -> str:
        return digest(self.name, self.grader, self.max_new_tokens, [asdict(i) for i in self.items])

    def __len__(self) -> int:
        return len(self.items)

    def run(self, backend: Backend, tick: Tick) -> list[Row]:
        requests = [Request([{"role": "user", "content": i.prompt}], self.max_new_tokens) for i in self.items]
        template = digest(backend.template_hash, self.name, self.grader)
        rows = []
        for item, reply in zip(self.items, backend.complete(requests, tick), strict=True):
            right, raw = self.grade(item, reply.text)
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
                    unscored_reason=None,
                    judge=self.grader,
                    judge_raw=raw,
                    template_hash=template,
                    new_tokens=reply.new_tokens,
                )
            )
        return rows
