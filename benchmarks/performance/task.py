"""One measurement: what is asked of a fresh process, and what it found."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.performance.texts import Pairs

BATCH = 16  # examples of an optimiser step, on both sides
LR, WARMUP, CLIP = 1e-4, 10, 1.0
LORA = {"r": 16, "alpha": 32, "dropout": 0.05}
NEW_TOKENS = 128
OBJECTIVES = ("sft", "cft", "ip", "kl", "dpo", "orpo")
PEER_OF = {"cft": "sft", "ip": "sft"}  # what the peer lacks is held against its plain fine-tuning


@dataclass(frozen=True)
class Tuned:
    """The peer's settings that its API leaves open: what --tune chooses."""

    batch: int = 4  # examples of a micro-batch; generation: prompts
    autocast: bool = True  # bf16=True beside bf16 weights
    attention: str = "sdpa"
    plain_head: bool = False  # transformers' own cross-entropy in place of TRL's fused head (SFT only)


@dataclass(frozen=True)
class Task:
    """`steps` are timed after `warmup`; for generation `prompts` are answered. `models` is where the shapes lie."""

    side: Literal["ours", "peer"]
    what: Literal["train", "generate"]
    shape: str
    models: str
    objective: str = "sft"
    pairs: Pairs = "strangers"
    steps: int = 8
    warmup: int = 2
    prompts: int = 256
    new_tokens: int = NEW_TOKENS
    threads: int = 2
    clock: Literal["wall", "cpu"] = "wall"  # cpu: this process's CPU seconds, on a machine that others use too
    tuned: Tuned = Tuned()

    def now(self) -> float:
        return time.perf_counter() if self.clock == "wall" else time.process_time()

    @property
    def folder(self) -> str:
        return str(Path(self.models) / self.shape)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def of(cls, text: str) -> Task:
        raw: dict[str, Any] = json.loads(text)
        return cls(**{**raw, "tuned": Tuned(**raw["tuned"])})


@dataclass
class Found:
    """Real tokens of the timed steps and their seconds; the reference's share of seconds; memory in MB.

    `busy`: cores that other processes kept busy meanwhile. `texts`: how generated answers begin, to see that both
    sides say the same. `flops`: model FLOPs of the timed work; `matrix_rate`: FLOP/s of a large product right after it.
    """

    tokens: int
    seconds: float
    reference_seconds: float = 0.0
    setup_seconds: float = 0.0
    texts: list[str] = field(default_factory=list)
    before_mb: float = 0.0
    peak_mb: float = 0.0
    busy: float = 0.0
    flops: float = 0.0
    matrix_rate: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens a second, the reference included."""
        return self.tokens / (self.seconds + self.reference_seconds)

    @property
    def utilisation(self) -> float:
        """Model FLOPs a second as a share of the matrix rate, the reference included."""
        return self.flops / (self.seconds + self.reference_seconds) / self.matrix_rate if self.matrix_rate else 0.0

    @property
    def beyond_mb(self) -> float:
        """Peak memory beyond the imports and the data."""
        return self.peak_mb - self.before_mb
