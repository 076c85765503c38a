"""The table of objectives: change from the base at the last budget, with intervals and a state, and the finding.

It ends a run on a terminal and represents `Results` in a notebook. It is made from `results.json`, so nothing is
estimated again, and the words are those of the verdict.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from ruamel.yaml.error import YAMLError

from leeway.data.stream import budget_notes
from leeway.report import formatting, learning, narrative
from leeway.report.finding import finding
from leeway.report.formatting import BudgetUnit, capitalize_first, mapping
from leeway.report.plotting import order_objectives
from leeway.report.results import ReportError
from leeway.report.verdict import coverage, equivalent_cells, headline, state_of
from leeway.stats.metrics import BASE, LOG_ODDS
from leeway.yaml_config import load as load_yaml

if TYPE_CHECKING:
    from rich.console import Console

NAMES = {"accuracy": "capability", "asr": "attack success", "asr:none": "attack success, direct"}
NAMES |= {"overrefusal": "over-refusal", "trait": "persona trait", "endorsement": "persona"}
WORDS = {"equivalent": "same", "inconclusive": "open"}  # the other states of `state_of` are words already
COLOURS = {"better": "green", "worse": "red", "changed": "magenta", "same": "cyan", "open": "yellow", "void": "dim"}
PLAIN = "plain"
GAP = 2  # between columns
MAX_DIGITS = 3  # of a difference


@dataclass(frozen=True)
class Cell:
    """An objective's change from the base on one measure, in points or log-odds, as text."""

    difference: str
    range: str
    word: str


@dataclass(frozen=True)
class ObjectiveTable:
    """One line per objective and test-time prompt at the last budget; a cell is None where nothing was estimated."""

    study: str
    at: str
    columns: tuple[str, ...]
    base: tuple[str, ...]
    lines: tuple[tuple[str, tuple[Cell | None, ...]], ...]
    legend: str
    finding: str
    notes: tuple[str, ...]

    def to_html(self) -> str:
        """Return the table as HTML without scripts or outside resources; all text is escaped."""
        colour = {"better": "#1a7f37", "worse": "#cf222e", "open": "#9a6700"}
        heads = "".join(f"<th>{escape(c)}</th>" for c in ("", *self.columns))
        body = _html_row("base", (escape(level) for level in self.base))
        for name, cells in self.lines:
            shown = (
                f'{escape(c.difference)} <b style="color:{colour.get(c.word, "inherit")}">{escape(c.word)}</b><br>'
                f"<small>{escape(c.range)}</small>"
                if c
                else formatting.MISSING
                for c in cells
            )
            body += _html_row(name, shown)
        notes = "".join(f"<p>{escape(text)}</p>" for text in (self.legend, *self.notes))
        table = f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>" if self.lines else ""
        return f"<div><p><strong>{escape(self.finding)}</strong></p>{table}<small>{notes}</small></div>"


def _html_row(name: str, cells: Iterator[str]) -> str:
    return f"<tr><th>{escape(name)}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def load_objective_table(folder: Path) -> ObjectiveTable:
    """Return the table of objectives of a reported run. Raises ReportError without a readable `results.json`."""
    try:
        made, manifest, study = (_read(folder / n) for n in ("results.json", "manifest.json", "study.yaml"))
    except (OSError, ValueError, YAMLError, RecursionError) as error:
        raise ReportError(f"{folder} has no readable report", fix=f"run `leeway report {folder}`") from error
    tables = {k: _frame(v) for k, v in made.items() if isinstance(v, list) and v and isinstance(v[0], dict)}
    return objective_table(tables, manifest, study, [int(s) for s in made.get("seeds") or ()])


def _read(path: Path) -> dict[str, Any]:
    text = path.read_text("utf-8")
    return mapping(json.loads(text) if path.suffix == ".json" else load_yaml(text))


def _frame(records: list[dict[str, Any]]) -> pd.DataFrame:
    table = pd.DataFrame.from_records(records)
    numbers = [c for c in table if table[c].map(lambda v: v is None or type(v) in (int, float)).all()]
    return table.astype(dict.fromkeys((c for c in numbers if table[c].isna().any()), "float64"))


def objective_table(
    tables: dict[str, pd.DataFrame], manifest: dict[str, Any], study: dict[str, Any], seeds: Sequence[int]
) -> ObjectiveTable:
    """Return the table from a report's tables by name (`contrasts`, `rates` and, if made, `equivalence`, …)."""
    nothing = pd.DataFrame()
    contrasts, rates = tables.get("contrasts", nothing), tables.get("rates", nothing)
    unit, external = BudgetUnit.of(manifest), bool(narrative.external(manifest))
    learned, equivalent, identity = (tables.get(name) for name in ("learned", "equivalence", "identity"))
    void = learning.void_arms(learned, contrasts)
    shared: dict[str, Any] = {"equivalent": equivalent, "identity": identity, "void": void, "external": external}
    sentence = finding(contrasts, rates, tables.get("recommend", nothing), unit, seeds, **shared)
    name = str(study.get("name") or "")
    if contrasts.empty:
        return ObjectiveTable(name, "", (), (), (), "", sentence, ())
    last = int(contrasts["budget"].max())
    own = contrasts[contrasts["budget"] == last]
    own = own[headline(own, own)]
    measures = [str(m) for m in dict.fromkeys(own["measure"])]
    better = {} if rates.empty else dict(zip(rates["measure"], rates["better"], strict=True))
    small = equivalent_cells(equivalent)
    cells = {(c["objective"], c["condition"], c["measure"]): _cell(c, better, small, void) for c in _records(own)}
    order = order_objectives([str(o) for o in own["objective"].unique()], study)
    pairs = sorted(
        {(str(c["objective"]), str(c["condition"])) for c in _records(own)},
        key=lambda pair: (order.index(pair[0]), pair[1] != PLAIN, pair[1]),
    )
    labels = dict(zip(own["measure"], own["label"], strict=True))
    return ObjectiveTable(
        study=name,
        at=capitalize_first(unit.at(last)),
        columns=tuple(NAMES.get(m, str(labels[m]).lower()) for m in measures),
        base=tuple(_base(rates, m) for m in measures),
        lines=tuple((formatting.objective_name(o, c), tuple(cells.get((o, c, m)) for m in measures)) for o, c in pairs),
        legend=_legend(measures, equivalent),
        finding=sentence,
        notes=(*notes_of(tables.get("ledger"), study), coverage([*seeds], external=external)),
    )


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(k): v for k, v in line.items()} for line in table.to_dict("records")]


def _cell(contrast: dict[str, Any], better: dict[Any, str], small: set[Any], void: Any) -> Cell | None:
    if contrast["difference"] != contrast["difference"]:
        return None
    state, measure = state_of(contrast, better, small, void), contrast["measure"]
    numbers = [contrast[k] for k in ("difference", "low", "high")]
    texts = [[formatting.change(n, measure, digits) for n in numbers] for digits in range(1, MAX_DIGITS + 1)]
    difference, low, high = next((t for t in texts if t[1] != t[2]), texts[0])  # an interval has two ends
    return Cell(difference, f"{low} to {high}", WORDS.get(state, state))


def _base(rates: pd.DataFrame, measure: str) -> str:
    """Return the base's level under plain prompts."""
    own = rates[(rates["objective"] == BASE) & (rates["measure"] == measure)]
    own = own.sort_values("condition", key=lambda c: c != PLAIN, kind="stable")
    return formatting.level(float(own["rate"].iloc[0]), measure) if len(own) else formatting.MISSING


def _legend(measures: Sequence[str], equivalent: pd.DataFrame | None) -> str:
    odds = "; the persona trait in log-odds" if any(m in LOG_ODDS for m in measures) else ""
    margin = ""
    if equivalent is not None and len(equivalent):
        log_odds = equivalent["measure"].isin(LOG_ODDS)
        sizes = [f"±{100 * size:g} points" for size in equivalent.loc[~log_odds, "margin"].unique()]
        sizes += [f"±{size:g} in log-odds" for size in equivalent.loc[log_odds, "margin"].unique()]
        margin = f" Same: shown to be within {' or '.join(sizes)} of the base."
    return (
        f"Change from the base in points{odds}, with 95% intervals. Better, worse: significant after Holm.{margin} "
        "Open: neither is shown. Void: not shown to have learned."
    )


def notes_of(ledger: pd.DataFrame | None, study: dict[str, Any]) -> list[str]:
    """Return the notes about warm-up and overshot budgets of a run; empty for budgets of processed tokens."""
    optim = mapping(study.get("optim"))
    if ledger is None or ledger.empty or mapping(study.get("budget")).get("count") == "processed":
        return []
    stops = ledger[["budget", "step", "source_tokens"]].astype(int).itertuples(index=False, name=None)
    return [f"{capitalize_first(line)}." for line in budget_notes(stops, int(optim.get("warmup_steps") or 0))]


def print_objective_table(table: ObjectiveTable, console: Console) -> None:
    """Print the table and the finding; a table too wide for the console is split by columns, never inside a word."""
    from rich.text import Text

    if table.lines:
        console.print()
        console.print(Text(f"{table.at}, against the base", style="bold"))
        for columns in _chunks(table, console.width):
            console.print(_grid(table, columns))
        console.print(Text(table.legend, style="dim"))
    for note in table.notes:
        console.print(Text(f"note: {note}", style="dim"))
    console.print()
    console.print(Text(table.finding, style="bold"))


def _grid(table: ObjectiveTable, columns: Sequence[int]) -> Any:
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="dim")
    grid.add_column("objective", no_wrap=True)
    for n in columns:
        grid.add_column(table.columns[n], min_width=_width(table, n))
    grid.add_row("base", *(table.base[n] for n in columns), style="dim")
    for name, cells in table.lines:
        texts = []
        for cell in (cells[n] for n in columns):
            shown = Text(formatting.MISSING)
            if cell:
                shown = Text.assemble(f"{cell.difference} ", (cell.word, COLOURS[cell.word]), f"\n{cell.range}")
            texts.append(shown)
        grid.add_row(Text(name), *texts)
    return grid


def _width(table: ObjectiveTable, n: int) -> int:
    """Return the characters that a column needs: its longest line, or the longest word of its head."""
    cells = [cells[n] for _, cells in table.lines]
    lines = [text for c in cells if c for text in (f"{c.difference} {c.word}", c.range)]
    return max(map(len, [*lines, *table.columns[n].split(), table.base[n]]))


def _chunks(table: ObjectiveTable, width: int) -> Iterator[list[int]]:
    """Yield the columns of each table that fits the width; a single column may be wider."""
    first = max(len(name) for name, _ in (*table.lines, ("objective", ()))) + GAP
    chunk, used = list[int](), first
    for n in range(len(table.columns)):
        needed = _width(table, n) + GAP
        if chunk and used + needed > width:
            yield chunk
            chunk, used = [], first
        chunk, used = [*chunk, n], used + needed
    yield chunk
