"""Assistant prefill: the assistant's turn begins with an affirmative opening, which the model continues."""

from __future__ import annotations

from dataclasses import dataclass

from leeway.attacks.attack import Conversation, Play
from leeway.hashing import digest
from leeway.yaml_config import package_data


@dataclass(frozen=True)
class Prefill:
    """Send the prompt and the opening of its answer (Andriushchenko et al. 2024, arXiv 2404.02151).

    The conversation ends with an assistant turn, which a backend continues instead of answering. The continuation alone
    is judged: the opening is the attacker's text, and with an empty continuation it would read as compliance.
    """

    name: str
    version: int
    origin: str
    opening: str

    def __post_init__(self) -> None:
        if not self.opening or self.opening != self.opening.strip():
            raise ValueError(f"attack {self.name}: its opening is empty, or begins or ends with white space")

    @property
    def hash(self) -> str:
        return digest("prefill", self.name, self.version, self.opening)

    def conversation(self, prompt: str) -> Conversation:
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": self.opening}]

    def play(self, prompt: str) -> Play:
        return (yield self.conversation(prompt))


PREFILLS = tuple(Prefill(**entry) for entry in package_data("leeway.attacks", "prefills.yaml"))
