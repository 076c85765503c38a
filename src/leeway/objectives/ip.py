"""IP: inoculation prompting (Tan et al. 2025, arXiv 2510.04340; Wichers et al. 2025, arXiv 2510.05024).

    L = -(1/N) sum_t log pi(y+_t | x', y+_<t)     x' = Inject(x, "exhibit trait T_k") with probability p, else x

The target is always the preferred answer. Traits and wordings are in `inoculations.yaml`, versioned and hashed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np

from leeway.data.chat import Chat, Sequence
from leeway.data.types import Example
from leeway.hashing import digest
from leeway.objectives.objective import PLAIN, Condition, Plain, nll
from leeway.yaml_config import package_data


@dataclass(frozen=True)
class Inoculations:
    """Instructions to prepend to a prompt; `texts[k]` requests `traits[k]`."""

    version: int
    traits: tuple[str, ...]
    texts: tuple[str, ...]

    @property
    def hash(self) -> str:
        return digest("inoculations", self.version, list(self.traits), list(self.texts))


@cache
def inoculations() -> Inoculations:
    """Load `inoculations.yaml`."""
    raw = package_data("leeway.objectives", "inoculations.yaml")
    pairs = [(trait, text) for trait, texts in raw["traits"].items() for text in texts]
    return Inoculations(raw["version"], tuple(t for t, _ in pairs), tuple(x for _, x in pairs))


@dataclass(frozen=True)
class Ip(Plain):
    """SFT in which a share `p` of the prompts requests an undesirable trait that the answer does not show."""

    name: ClassVar[str] = "ip"
    p: float = 0.5

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """Plain prompts, and prompts under the first instruction."""
        return (PLAIN, Condition("inoculated", f"{inoculations().texts[0]} "))

    def render(self, example: Example, chat: Chat, rng: np.random.Generator) -> list[Sequence]:
        texts = inoculations().texts
        inject, k = rng.random() < self.p, int(rng.integers(len(texts)))
        prompt = f"{texts[k]} {example.prompt}" if inject else example.prompt
        return [chat.sequence(prompt, example.preferred)]

    def worst_case(self, example: Example, chat: Chat) -> list[Sequence]:
        prompts = [example.prompt, *(f"{text} {example.prompt}" for text in inoculations().texts)]
        return [chat.sequence(prompt, example.preferred) for prompt in prompts]


loss = nll
