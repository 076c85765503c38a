"""Control arm: maximum likelihood of both answers, unlabelled. CFT without its condition.

    L = -(1/N) [ sum_t log pi(y+_t | x, y+_<t) + sum_t log pi(y-_t | x, y-_<t) ]

DPO, ORPO and CFT see dispreferred answers, SFT, IP and KL never do. This arm sees the same tokens as CFT, so a
difference between the two is due to the condition, not to the text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from leeway.objectives.objective import Plain, nll


@dataclass(frozen=True)
class SftBoth(Plain):
    """Learn both answers of a pair."""

    name: ClassVar[str] = "sft_both"
    needs_pairs: ClassVar[bool] = True


loss = nll
