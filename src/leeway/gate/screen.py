"""The gate on standard output: a table on a terminal, plain lines of the same elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

from leeway.gate.decide import Decision
from leeway.gate.words import HEADS, Gate, cells, reference, title, why

if TYPE_CHECKING:
    from rich.console import Console

COLOUR = {"pass": "green", "fail": "bold red", "inconclusive": "yellow"}
RIGHT = range(2, 7)  # the columns of numbers
FEWER = (0, 1, 4, 5, 7)  # what a narrow terminal has room for


def show(gate: Gate, console: Console) -> None:
    """Print every decision, what stands open, what weakens it, and the outcome of all."""
    from rich.markup import escape

    for decision in gate.decisions:
        told = f"{title(decision, gate.scale)}, against {reference(gate)}"
        if console.is_terminal:
            console.print(f"[bold]{escape(told)}[/bold]: {_coloured(decision.outcome)}")
            console.print(_table(decision, console.width))
        else:
            _print(console, f"{told}: {decision.outcome}", *_lines(decision))
        _print(console, *(why(f) for f in decision.findings if f.outcome != "pass"), indent=2)
        _print(console, *(f"note: {w}" for w in decision.warnings), indent=2)
        console.print()
    _print(console, *(f"note: {w}" for w in gate.warnings))
    console.print(f"gate: {_coloured(gate.outcome)}" if console.is_terminal else f"gate: {gate.outcome}")


def _coloured(outcome: str) -> str:
    return f"[{COLOUR[outcome]}]{outcome}[/]"


def _print(console: Console, *lines: str, indent: int = 0) -> None:
    """Text as it stands: names and notes are no markup, and a file of them is not wrapped."""
    from rich.padding import Padding
    from rich.text import Text

    for line in lines:
        if console.is_terminal:
            console.print(Padding(Text(line), (0, 0, 0, indent)))
        else:
            console.print(" " * indent + line, markup=False, highlight=False, soft_wrap=True)


def _table(decision: Decision, width: int) -> object:
    from rich.table import Table
    from rich.text import Text

    columns = range(len(HEADS)) if width >= sum(w + 2 for w in _widths(decision)) else FEWER
    table = Table(box=None, padding=(0, 1), pad_edge=True)
    for n in columns:
        table.add_column(HEADS[n], justify="right" if n in RIGHT else "left", no_wrap=n != 0, overflow="fold")
    for finding in decision.findings:
        row = [Text(cell) for cell in cells(finding)]
        row[-1].stylize(COLOUR[finding.outcome])
        table.add_row(*(row[n] for n in columns))
    return table


def _widths(decision: Decision) -> list[int]:
    rows = [HEADS, *(cells(f) for f in decision.findings)]
    return [max(len(row[n]) for row in rows) for n in range(len(HEADS))]


def _lines(decision: Decision) -> list[str]:
    rows = [HEADS, *(cells(f) for f in decision.findings)]
    width = _widths(decision)
    aligned = (
        [c.rjust(w) if n in RIGHT else c.ljust(w) for n, (c, w) in enumerate(zip(row, width, strict=True))]
        for row in rows
    )
    return ["  " + "  ".join(row).rstrip() for row in aligned]
