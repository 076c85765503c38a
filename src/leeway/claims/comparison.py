"""One comparison behind a claim's verdict."""

from __future__ import annotations

from dataclasses import dataclass, replace

from leeway.stats.intervals import NAN

DIFFERENCE, DOUBLING, SLOPE = "difference", "difference per doubling", "per unit of capability"


@dataclass(frozen=True)
class Comparison:
    """One comparison: estimate and interval, `p` of the claimed direction, `p_reverse` of the opposite one.

    `p` is NaN if the comparison is impossible; `note` then gives the reason, otherwise its limitations.
    """

    name: str
    estimate: float = NAN
    low: float = NAN
    high: float = NAN
    level: float = NAN
    unit: str = DIFFERENCE
    p: float = NAN
    p_reverse: float = NAN
    mde: float = NAN
    n_clusters: int = 0
    note: str = ""
    slack: float = 0.0  # distance of the estimate from the limit of the claim: breaks ties of p

    def reversed(self) -> Comparison:
        return replace(self, p=self.p_reverse, p_reverse=self.p, slack=-self.slack)
