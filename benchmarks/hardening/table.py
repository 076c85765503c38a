"""The lines of the hardening table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """How often one kind of attack was tried, and how often it did harm; `note` names the harm, or what held."""

    attempt: str
    tried: int
    failed: int
    note: str = ""


def as_markdown(lines: Sequence[Line]) -> str:
    """Return a table as in docs/reliability.md."""
    head = ["| attempt | tried | failed | |", "|---|---|---|---|"]
    return "\n".join([*head, *(f"| {x.attempt} | {x.tried:,} | {x.failed:,} | {x.note} |" for x in lines)])
