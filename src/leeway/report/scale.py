"""What a run's budgets count, in words: tokens, steps of somebody's trainer, or nothing that is known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from leeway.report import wording


@dataclass(frozen=True)
class Scale:
    """How a checkpoint's place in its training is written."""

    count: Literal["tokens", "steps", "unknown"] = "tokens"

    @classmethod
    def of(cls, manifest: dict[str, Any]) -> Scale:
        """As a run of a model trained elsewhere says; a study's budgets are tokens."""
        known = manifest.get("elsewhere")
        count = known.get("count") if isinstance(known, dict) else None
        return cls("steps" if count == "steps" else "unknown" if count == "unknown" else "tokens")

    def tick(self, budget: int) -> str:
        """On an axis or in a table: 25k; 40; `tuned` where it is not known."""
        if self.count == "unknown":
            return "tuned"
        return f"{budget:,}" if self.count == "steps" else wording.budget(budget)

    def at(self, budget: int) -> str:
        """In a sentence: `at 25k tokens`, `at step 40`, `after fine-tuning`."""
        if self.count == "unknown":
            return "after fine-tuning"
        return f"at step {budget:,}" if self.count == "steps" else f"at {wording.budget(budget)} tokens"

    @property
    def axis(self) -> str:
        return {"tokens": "Training budget, tokens", "steps": "Training step", "unknown": ""}[self.count]


TOKENS = Scale()
