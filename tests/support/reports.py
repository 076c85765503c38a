"""Leave out the parts of a report that take most of a small study's time, for tests that do not look at them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock


def no_report() -> AbstractContextManager[Any]:
    """Run studies to their rows, ledgers and checkpoints."""
    return mock.patch("leeway.report.build", lambda folder, *_, **__: Path(folder) / "report.html")


def no_figures() -> AbstractContextManager[Any]:
    """Build tables and page without the figure files."""
    return mock.patch("leeway.report.rebuild.draw", return_value=[])
