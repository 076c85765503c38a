"""One line of the table: what was simulated, what came out, and whether that lies where it should."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

SIZE = (0.035, 0.065)  # of a test at a nominal 5%
COVER = (0.93, 0.97)  # of a 95% interval
COVER_90 = (0.87, 0.93)  # of a 90% one


@dataclass(frozen=True)
class Finding:
    """A share of simulated studies, and the band it should lie in; `note` says why where it is known not to."""

    about: str
    setting: str
    share: float
    studies: int
    band: tuple[float, float]
    note: str = ""

    @property
    def error(self) -> float:
        """Binomial standard error of the share."""
        return float(np.sqrt(max(self.share * (1 - self.share), 1e-6) / self.studies))

    @property
    def inside(self) -> bool:
        return self.band[0] <= self.share <= self.band[1]

    def within(self, errors: float) -> bool:
        """In the band, give or take so many standard errors."""
        return self.band[0] - errors * self.error <= self.share <= self.band[1] + errors * self.error


def table(findings: Iterable[Finding]) -> str:
    """Markdown, one table per subject."""
    lines: list[str] = []
    about = ""
    for f in findings:
        if f.about != about:
            about = f.about
            lines += ["", f"### {about}", "", "| setting | measured | should be | studies | |", "|---|---|---|---|---|"]
        low, high = (f"{100 * x:g}" for x in f.band)
        verdict = "" if f.inside else "below" if f.share < f.band[0] else "above"
        mark = "; ".join(x for x in (verdict, f.note) if x)
        lines.append(
            f"| {f.setting} | {100 * f.share:.1f}% ± {100 * f.error:.1f} | {low}–{high}% | {f.studies:,} | {mark} |"
        )
    return "\n".join(lines).strip() + "\n"
