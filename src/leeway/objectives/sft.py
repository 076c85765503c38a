"""SFT: supervised fine-tuning on the preferred answers.

L = -(1/N) sum_t log pi(y_t | x, y_<t)        N = target tokens of the optimiser batch
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from leeway.objectives.objective import Plain, nll


@dataclass(frozen=True)
class Sft(Plain):
    """Maximum likelihood of the preferred answers: the defaults of `Plain`."""

    name: ClassVar[str] = "sft"


loss = nll
