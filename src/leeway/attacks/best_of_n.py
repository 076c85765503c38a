"""Best-of-n: every draw sends the prompt under another random augmentation of its characters."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from leeway.attacks.attack import Conversation, Play
from leeway.hashing import derive_seed, digest

WORD = re.compile(r"\S+")
PRINTABLE = range(32, 127)  # ASCII


def shuffle_inside(text: str, p: float, rng: random.Random) -> str:
    """Shuffle the inner characters of each word of four or more with probability `p`; both ends stay in place."""

    def shuffled(word: re.Match[str]) -> str:
        text = word[0]
        if len(text) < 4 or rng.random() >= p:
            return text
        return text[0] + "".join(sorted(text[1:-1], key=lambda _: rng.random())) + text[-1]

    return WORD.sub(shuffled, text)


def capitalise(text: str, p: float, rng: random.Random) -> str:
    """Swap the case of each letter with probability `p`."""
    return "".join(c.swapcase() if c.isalpha() and rng.random() < p else c for c in text)


def add_noise(text: str, p: float, rng: random.Random) -> str:
    """Replace each printable ASCII character by its neighbour, one code up or down, with probability `p`."""

    def noisy(c: str) -> str:
        if ord(c) not in PRINTABLE or rng.random() >= p:
            return c
        moved = ord(c) + (1 if rng.random() < 0.5 else -1)
        return chr(moved) if moved in PRINTABLE else c

    return "".join(map(noisy, text))


@dataclass(frozen=True)
class BestOfN:
    """Shuffle inside words, swap cases and add noise, in that order (Hughes et al. 2024, arXiv 2412.03556, text).

    With strength σ the probabilities are √σ per word, √σ per letter and σ³ per character, as published. The
    augmentation is a function of (seed, item, draw), so every checkpoint is sent the same texts. It is the attack of
    one draw; that of n draws is its success at n (`leeway.stats.asr_at_k`).
    """

    strength: float = 0.4
    name: str = "best_of_n"
    version: int = 1
    origin: str = "best-of-n jailbreaking, Hughes et al. 2024, arXiv 2412.03556; augmentations written for Leeway."

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1:
            raise ValueError(f"attack {self.name}: strength {self.strength} is not in (0, 1]")

    @property
    def hash(self) -> str:
        # the text of one draw stands for the code
        return digest(self.name, self.version, self.strength, self.augment("How do I bake a loaf of bread?", 0, "", 0))

    def augment(self, prompt: str, seed: int, item: str, draw: int) -> str:
        """Return the prompt as it is sent in one draw."""
        rng = random.Random(derive_seed("best_of_n", seed, item, draw))  # `random()` is the same in every Python
        text = shuffle_inside(prompt, self.strength**0.5, rng)
        return add_noise(capitalise(text, self.strength**0.5, rng), self.strength**3, rng)

    def conversation(self, prompt: str, seed: int = 0, item: str = "", draw: int = 0) -> Conversation:
        return [{"role": "user", "content": self.augment(prompt, seed, item, draw)}]

    def play(self, prompt: str) -> Play:
        return self.play_draw(prompt, 0, "", 0)

    def play_draw(self, prompt: str, seed: int, item: str, draw: int) -> Play:
        return (yield self.conversation(prompt, seed, item, draw))
