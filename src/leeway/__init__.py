"""Leeway: how far fine-tuning pushes a chat model off course."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leeway.report.results import Results
    from leeway.study.run import Study

__all__ = ["Results", "Study"]


def __getattr__(name: str) -> Any:
    """Import a public class at its first use: torch takes seconds, and `leeway --help` does not need it."""
    if name not in __all__:
        raise AttributeError(f"module 'leeway' has no attribute {name!r}")
    return getattr(import_module("leeway.report.results" if name == "Results" else "leeway.study.run"), name)
