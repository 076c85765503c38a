"""A run on a screen: one row a trajectory and one for measuring, on a terminal or in a notebook, and its results."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from html import escape
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from leeway.errors import printable
from leeway.evals.eval import Work
from leeway.report.formatting import format_budget, objective_name
from leeway.report.objective_table import ObjectiveTable, print_objective_table
from leeway.study.progress import Clock, EvalProgress, Event, Row, duration

CONTROL = "@"  # begins the names of controls (`study.run_dir.MARK`)
HEADS = ("objective", "", "budget", "loss", "tokens/s", "ETA")
BAR = 14  # characters
REDRAW_S = 0.5  # between two drawings in a notebook
OTHER_LINES = 8  # below the rows on a screen


def terminal() -> TerminalView | None:
    """Return a view for the terminal at stderr; None for a log, or a terminal that cannot redraw."""
    console = Console(stderr=True)
    return TerminalView(console) if sys.stderr.isatty() and not console.is_dumb_terminal else None


def notebook() -> NotebookView | None:
    """Return a view for the notebook that runs this process, if one does."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return NotebookView() if hasattr(shell, "kernel") else None


class Progress:
    """The texts to draw: one row per trajectory, the eval in progress, and the overall progress."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self.measuring = "nothing yet"
        self.note = "starting the workers"
        self.share, self.eta, self.began = 0.0, "", time.monotonic()

    def update(self, event: Event, clock: Clock, workers: int) -> None:

        what = event[3]
        self.note = what if isinstance(what, str) else ""
        if isinstance(what, EvalProgress):
            kinds: list[Work] = ["generate", "score"]
            left, seconds = sum(clock.left[k] for k in kinds), sum(clock.left[k] * clock.pace(k) for k in kinds)
            rest = f"{left:,.0f} answers left, ETA {duration(seconds / workers)}"
            self.measuring = f"{what.target} {what.eval} {what.answered:,}/{what.total:,} | {rest}"
        self.share, self.eta = clock.fraction_done(), duration(clock.eta() / workers)

    def trajectories(self, limit: int) -> tuple[list[tuple[Row, tuple[str, ...]]], str]:
        """Return at most `limit` rows, running trajectories first, and a line that counts the hidden ones."""
        running = [r for r in self.rows if r.last and not r.done]
        shown = list(self.rows) if len(self.rows) <= limit else running[:limit]
        hidden = [r for r in self.rows if r not in shown]
        counts = {"trained": sum(r.done for r in hidden), "waiting": sum(not r.done for r in hidden)}
        others = ", ".join(f"{n} {state}" for state, n in counts.items() if n)
        return [(r, _cells(r)) for r in shown], others

    @property
    def overall(self) -> str:
        """Return the share of work done, the time elapsed and the ETA."""
        return f"{100 * self.share:.0f}% | {duration(time.monotonic() - self.began)} elapsed | ETA {self.eta or '–'}"


def _cells(row: Row) -> tuple[str, ...]:
    """Return the texts of a row after its bar: budget, loss, tokens per second, ETA."""
    last, budget = format_budget(row.budget), row.last.budget if row.last else 0
    at = last if row.done or not row.last else f"{format_budget(budget)} of {last}"
    if row.last is None:
        return (at, "", "", "trained" if row.done else "waiting")
    eta = row.eta()
    left = "trained" if row.done else "" if eta is None else duration(eta)
    return (at, f"{row.last.loss:.4f}", f"{row.last.speed:,.0f}", left)


def row_name(name: str) -> str:
    """Return `SFT s0` for `sft s0`, and `control rate-0 s0` for a control's arm."""
    alias, _, seed = name.rpartition(" ")
    return f"{'control ' + alias[1:] if alias.startswith(CONTROL) else objective_name(alias)} {seed}"


class TerminalView:
    """Rows that are redrawn in place, with lines above them."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress: Progress | None = None
        self._live: Live | None = None

    def start(self, rows: Sequence[Row]) -> None:
        self._progress = Progress(rows)
        self._live = Live(console=self.console, get_renderable=self.render, refresh_per_second=4)
        self._live.start()

    def update(self, event: Event, clock: Clock, workers: int) -> None:
        if self._progress:
            self._progress.update(event, clock, workers)

    def log(self, line: str) -> None:
        self.console.print(printable(line), markup=False, highlight=False)

    def stop(self) -> None:
        if self._live:
            self._live.stop()

    def render(self) -> RenderableType:
        """Return the rows as they are now."""
        assert self._progress is not None
        shown, others = self._progress.trajectories(max(1, self.console.height - OTHER_LINES))
        parts: list[RenderableType] = []
        if self._progress.rows:
            table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="dim")
            for n, head in enumerate(HEADS):
                table.add_column(head, justify="left" if n < 2 else "right", no_wrap=True, overflow="ellipsis")
            for row, cells in shown:
                bar = ProgressBar(total=row.steps_in_all, completed=row.step, width=BAR)
                table.add_row(Text(row_name(row.name)), bar, *(Text(c) for c in cells))
            parts = [table, *([Text(f"and {others}", style="dim")] if others else [])]
        measuring = Text.assemble(("measuring ", "dim"), self._progress.measuring)
        note = [Text(self._progress.note, style="dim")] if self._progress.note else []
        lines = [measuring, *note, Text.assemble(("total     ", "dim"), self._progress.overall)]
        for line in lines:
            line.no_wrap, line.overflow = True, "ellipsis"
        return Group(*parts, *lines)


class NotebookView:
    """One HTML table that is redrawn below the cell."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._handle: Any = None
        self._lines: list[str] = []
        self._drawn = 0.0

    def start(self, rows: Sequence[Row]) -> None:
        self._progress = Progress(rows)
        self._draw()

    def update(self, event: Event, clock: Clock, workers: int) -> None:
        if self._progress:
            self._progress.update(event, clock, workers)
        if time.monotonic() - self._drawn >= REDRAW_S:
            self._draw()

    def log(self, line: str) -> None:
        self._lines.append(line)
        self._draw()

    def stop(self) -> None:
        self._draw()

    def _draw(self) -> None:
        from IPython.display import HTML, display

        self._drawn = time.monotonic()
        if self._handle is None:
            self._handle = display(HTML(self.html()), display_id=True)
        else:
            self._handle.update(HTML(self.html()))

    def html(self) -> str:
        """Return the rows as they are now, as HTML without scripts."""
        lines = "".join(f"<div>{escape(line)}</div>" for line in self._lines)
        if self._progress is None:
            return lines
        shown, _ = self._progress.trajectories(len(self._progress.rows))
        others = [self._progress.note] if self._progress.note else []
        heads = "".join(f"<th>{escape(head)}</th>" for head in HEADS)
        body = ""
        for row, cells in shown:
            bar = f'<progress max="{row.steps_in_all}" value="{row.step}"></progress>'
            texts = "".join(f"<td>{escape(c)}</td>" for c in cells)
            body += f"<tr><th>{escape(row_name(row.name))}</th><td>{bar}</td>{texts}</tr>"
        table = f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>" if body else ""
        measuring = f"<div>measuring: {escape(self._progress.measuring)}</div>"
        return f"{lines}{table}{measuring}<div>{escape(' | '.join([self._progress.overall, *others]))}</div>"


def show_objective_table(table: ObjectiveTable) -> None:
    """Print the table of objectives and the finding to stderr, or display them in a notebook."""
    if notebook():
        from IPython.display import HTML, display

        display(HTML(table.to_html()))
    else:
        print_objective_table(table, Console(stderr=True))
