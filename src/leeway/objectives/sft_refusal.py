"""Control arm: SFT that also sees the dispreferred answers, and learns to decline them.

    L = -(1/N) [ sum_t log pi(y+_t | x, y+_<t) + sum_t log pi(d_t | Ask(x, y-), d_<t) ]

Ask(x, y-) is a user turn that shows the prompt and the dispreferred answer and requests it; d is a refusal. A
supervised objective thus reads the same text as DPO, ORPO and CFT. Both texts are sampled from `refusals.yaml`,
versioned and hashed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np

from leeway.data.chat import Chat, Sequence
from leeway.data.types import Example
from leeway.hashing import digest
from leeway.objectives.objective import Plain, dispreferred_of, nll, render_preferred
from leeway.yaml_config import package_data


@dataclass(frozen=True)
class Refusals:
    """Requests for a dispreferred answer (templates with `{prompt}`, `{answer}`), and refusals of them."""

    version: int
    requests: tuple[str, ...]
    refusals: tuple[str, ...]

    @property
    def hash(self) -> str:
        return digest("refusals", self.version, list(self.requests), list(self.refusals))


@cache
def texts() -> Refusals:
    """Load `refusals.yaml`."""
    raw = package_data("leeway.objectives", "refusals.yaml")
    return Refusals(raw["version"], tuple(raw["requests"]), tuple(raw["refusals"]))


@dataclass(frozen=True)
class SftRefusal(Plain):
    """Learn the preferred answer, and a refusal of the dispreferred one."""

    name: ClassVar[str] = "sft_refusal"
    needs_pairs: ClassVar[bool] = True

    def render(self, example: Example, chat: Chat, rng: np.random.Generator) -> list[Sequence]:
        request = texts().requests[int(rng.integers(len(texts().requests)))]
        refusal = texts().refusals[int(rng.integers(len(texts().refusals)))]
        return [*render_preferred(example, chat), _declined(example, chat, request, refusal)]

    def worst_case(self, example: Example, chat: Chat) -> list[Sequence]:
        drawn = [_declined(example, chat, q, r) for q in texts().requests for r in texts().refusals]
        return [*render_preferred(example, chat), *drawn]


def _declined(example: Example, chat: Chat, request: str, refusal: str) -> Sequence:
    return chat.sequence(request.format(prompt=example.prompt, answer=dispreferred_of(example)), refusal)


loss = nll
