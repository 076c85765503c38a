"""From a run directory to what people read: results, tables, figures and one page that works offline."""

from collections.abc import Sequence
from pathlib import Path

from leeway.report.results import ReportError, Results

__all__ = ["ReportError", "Results", "build"]


def build(folder: str | Path, cards: Sequence[Path] = (), claims: str | Path | None = None) -> Path:
    """Rebuild `results.json`, `tables/`, `figures/` and `report.html` of a run; gives the page's path.

    `cards` are judges' cards: refusal rates corrected for their errors stand beside the raw ones. `claims` is a file of
    claims, or a set's name, written after the run, and marked so.
    """
    from leeway.report.rebuild import rebuild  # matplotlib takes a second to load: only where drawn

    return rebuild(Path(folder), cards, claims)
