"""Turn a run directory into results, tables, figures and one self-contained page."""

from collections.abc import Sequence
from pathlib import Path

from leeway.report.results import ReportError, Results

__all__ = ["ReportError", "Results", "build"]


def build(
    folder: str | Path, cards: Sequence[Path] = (), claims: str | Path | None = None, redacted_page: Path | None = None
) -> Path:
    """Rebuild the results, tables, figures and page of a run; return the page's path (see `rebuild.rebuild`)."""
    from leeway.report.rebuild import rebuild  # here, because importing matplotlib takes a second

    return rebuild(Path(folder), cards, claims, redacted_page)
