r"""Render the tables of a paper with pandas' Styler: main results, contrasts at the largest budget, claims, ledger.

Each table is a float for `\input`; one that does not fit on a page is a longtable.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import pandas as pd

from leeway.report import formatting
from leeway.report.formatting import MISSING, BudgetUnit
from leeway.report.plotting import Series
from leeway.report.results import Results
from leeway.report.verdict import LEVEL, headline
from leeway.stats.metrics import BASE, LOG_ODDS, PLAIN

PAGE_ROWS = 50  # that fit on a page at \footnotesize; a longer table becomes a longtable
# characters that break a table or that pdfLaTeX has no glyph for in T1 fonts
SPECIAL = {c: rf"\{c}" for c in "{}$&#%_"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "`": r"\textasciigrave{}",
    "[": "{[}",  # after \\ a bracket or a star would be read as its argument
    "]": "{]}",
    "*": "{*}",
    "\u2013": "--",
    "\u2014": "---",
    "\u2018": "`",
    "\u2019": "'",
    "\u201c": "``",
    "\u201d": "''",
    "\u2026": r"\ldots{}",
    "\u2212": "$-$",
    "×": r"$\times$",
    "±": r"$\pm$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "→": r"$\to$",
    "κ": r"$\kappa$",
    "\u00a0": "~",
}
SIGNIFICANT = r"$^{\ast}$"
SMALL = r"\footnotesize\setlength{\tabcolsep}{3pt}"
AXES = {"capability": "Accuracy", "jailbreak": "ASR", "persona": "Endorsement", "overrefusal": "Over-refusal"}
SIGNIFICANCE_NOTE = (
    rf"{SIGNIFICANT} differs from the base: paired by item, wild cluster bootstrap over prompts, $p < {LEVEL}$ after "
    "Holm's correction in the family of one axis at one budget. No mark does not mean no difference."
)
MISSING_NOTE = (
    "Unscored responses are counted and excluded from every rate. A dash: too many unscored responses, or no scored "
    "pairs."
)


@dataclass(frozen=True)
class Table:
    """One table; captions, headings, cells and notes are LaTeX (`escape` untrusted text)."""

    name: str
    caption: str
    columns: list[tuple[str, str]]  # heading, alignment
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)


def escape(text: str) -> str:
    """Escape text for LaTeX; a character without a glyph becomes `[U+202E]`, and hyphens do not join to a dash."""
    flat = re.sub(r"[\t\r\n]+", " ", text)
    return "".join(_character(c) + ("{}" if flat[n : n + 2] == "--" else "") for n, c in enumerate(flat))


def _character(c: str) -> str:
    printable = " " <= c <= "~" or "\u00c0" <= c <= "\u017f"
    return SPECIAL.get(c, c if printable else f"{{[}}U+{ord(c):04X}{{]}}")


def render(table: Table) -> str:
    """Return the LaTeX source, with extra space where the first cell changes."""
    long = len(table.rows) > PAGE_ROWS
    rows = [[*row] for row in table.rows]
    for row, (above, own) in zip(rows[1:], itertools.pairwise(table.rows), strict=True):
        row[0] = row[0] if own[0] == above[0] else f"\\addlinespace\n{row[0]}"
    frame = pd.DataFrame(rows, columns=[title for title, _ in table.columns])
    source = frame.style.hide(axis="index").to_latex(
        column_format="@{}" + "".join(align for _, align in table.columns) + "@{}",
        hrules=True,
        caption=table.caption,
        label=f"tab:leeway-{table.name}",
        environment="longtable" if long else "table",
        position=None if long else "tp",
        position_float=None if long else "centering",
    )
    notes = "\\par\\smallskip\n" + "\n".join(table.notes) + "\n" if table.notes else ""
    needs = r"\usepackage{booktabs,longtable}" if long else r"\usepackage{booktabs}"
    head = f"% made by leeway report; in the preamble: {needs} and \\usepackage[T1]{{fontenc}}\n"
    if long:
        return f"{head}{{{SMALL}\n{source}{notes}}}\n"
    source = source.replace("\\centering\n", f"\\centering{SMALL}\n", 1)
    return head + source.replace("\\end{tabular}\n", "\\end{tabular}\n" + notes, 1)


def paper_tables(results: Results, made: dict[str, pd.DataFrame], lines: list[Series]) -> dict[str, str]:
    """Return the LaTeX source of each table by name; empty tables are left out."""
    unit = BudgetUnit.of(results.manifest)
    tables = [
        main_table(results.pooled_rates(), made["contrasts"], lines, unit, results.seeds),
        contrasts_table(made["contrasts"], lines, unit),
        claims_table(made.get("claims", pd.DataFrame())),
        ledger_table(made["ledger"], [s.objective for s in lines], unit),
    ]
    return {t.name: render(t) for t in tables if t is not None}


def main_table(
    rates: pd.DataFrame, contrasts: pd.DataFrame, lines: list[Series], unit: BudgetUnit, seeds: list[int]
) -> Table | None:
    """Return each checkpoint's primary rates with intervals, the base first."""
    primary = rates[rates["primary"] & rates["axis"].isin(AXES)]
    axes = [a for a in AXES if a in set(primary["axis"])]
    if not axes:
        return None
    changed = contrasts[contrasts["primary"] & (contrasts["p_holm"] < LEVEL)]
    marked = set(changed[["objective", "budget", "condition", "axis"]].itertuples(index=False, name=None))
    cells = {(r["objective"], r["budget"], r["condition"], r["axis"]): r for r in formatting.to_records(primary)}
    bases = {c for o, _, c, _ in cells if o == BASE}
    keys = [(BASE, 0, c) for c in sorted(bases, key=lambda c: (c != PLAIN, c))]
    for line in lines:
        keys += [(line.objective, int(b), line.condition) for b in dict.fromkeys(line.of(primary)["budget"])]
    rows = []
    for objective, budget, condition in keys:
        own = [(objective, budget, condition, axis) for axis in axes]
        row = [_name(objective, condition), _budget(budget, unit)]
        for key in own:
            cell = cells.get(key, dict.fromkeys(("rate", "low", "high")))
            row.append(_percent(cell["rate"]) + (SIGNIFICANT if key in marked else ""))
            row.append(_interval(_percent(cell["low"]), _percent(cell["high"])))
        rows.append([*row, formatting.count(sum(cells[k]["n_unscored"] for k in own if k in cells))])
    columns = [("Objective", "l"), (_budget_title(unit), "r")]
    columns += [column for a in axes for column in ((AXES[a], "r"), ("", "l"))] + [("Unscored", "r")]
    pooled = "" if len(seeds) < 2 else f" The {len(seeds)} training seeds are pooled."
    caption = f"Rates in percent, with 95\\% confidence intervals (prompt sampling) in brackets.{pooled}"
    return Table("main", caption, columns, rows, [SIGNIFICANCE_NOTE, MISSING_NOTE])


def contrasts_table(table: pd.DataFrame, lines: list[Series], unit: BudgetUnit) -> Table | None:
    """Return the verdict's contrasts with the base at the largest budget."""
    if table.empty:
        return None
    largest = int(table["budget"].max())
    own = table[headline(table, table) & (table["budget"] == largest)]
    rank = {(s.objective, s.condition): n for n, s in enumerate(lines)}
    columns = [("Objective", "l"), ("Measure", "l"), ("Base", "r"), ("Tuned", "r"), ("Difference", "r"), ("", "l")]
    columns += [("$p$", "r"), ("$p$, Holm", "r"), ("MDE", "r"), ("Pairs", "r"), ("Prompts", "r"), ("Unscored", "r")]
    rows = []
    for c in sorted(formatting.to_records(own), key=lambda c: rank[c["objective"], c["condition"]]):
        significant = c["p_holm"] is not None and c["p_holm"] < LEVEL
        in_log_odds = c["measure"] in LOG_ODDS
        size, moved = (partial(_change, measure=c["measure"]),) * 2 if in_log_odds else (_percent, _points)
        row = [_name(c["objective"], c["condition"]), escape(c["label"]), size(c["base"]), size(c["rate"])]
        row.append(moved(c["difference"]) + (SIGNIFICANT if significant else ""))
        row += [_interval(moved(c["low"]), moved(c["high"])), _p(c["p"]), _p(c["p_holm"]), size(c["mde"]).lstrip("+")]
        rows.append(row + [formatting.count(c[k]) for k in ("n", "n_clusters", "n_unscored")])
    at = escape(unit.at(largest))
    scale = "percentage points (trait: log-odds)" if (own["measure"].isin(LOG_ODDS)).any() else "percentage points"
    caption = f"Paired differences from the base {at} in {scale}, with 95\\% confidence intervals."
    mde = "MDE: minimal detectable effect, the smallest true difference detected with 80\\% power."
    return Table("contrasts", caption, columns, rows, [SIGNIFICANCE_NOTE, mde, MISSING_NOTE])


def claims_table(table: pd.DataFrame) -> Table | None:
    """Return each claim with its estimate and verdict."""
    if table.empty:
        return None
    columns = [("Claim", r"p{0.34\linewidth}"), ("Estimate", "r"), ("", "l"), ("Unit", "l"), ("$p$, Holm", "r")]
    columns += [("MDE", "r"), ("Verdict", "l")]
    rows = []
    for c in formatting.to_records(table):
        row = [escape(str(c["statement"])), _number(c["estimate"]), _interval(_number(c["low"]), _number(c["high"]))]
        row += [escape(str(c.get("unit") or "")), _p(c["p_holm"]), _number(c.get("mde")), escape(str(c["verdict"]))]
        rows.append(row)
    caption = "Claims, their estimates with confidence intervals in brackets, and their verdicts."
    notes = ["Inconclusive: neither the claim nor its negation is supported. A dash: not available."]
    return Table("claims", caption, columns, rows, notes)


def ledger_table(table: pd.DataFrame, order: list[str], unit: BudgetUnit) -> Table | None:
    """Return the ledger: tokens and steps of each checkpoint."""
    if table.empty:
        return None
    rank = {o: n for n, o in enumerate(dict.fromkeys(order))}
    lines = formatting.to_records(table)
    lines.sort(key=lambda r: (rank.get(r["objective"], len(rank)), r["seed"], r["budget"]))
    several = table["seed"].nunique() > 1
    counts = ["step", "examples", "source_tokens", "target_tokens", "processed_tokens", "reference_tokens"]
    columns = [("Objective", "l"), (_budget_title(unit), "r"), *([("Seed", "r")] if several else [])]
    columns += [(c.removesuffix("_tokens").capitalize(), "r") for c in counts] + [("Epochs", "r")]
    rows = []
    for r in lines:
        row = [_name(r["objective"]), _budget(r["budget"], unit)] + ([str(r["seed"])] if several else [])
        rows.append([*row, *(escape(formatting.count(r[c])) for c in counts), f"{r['epochs']:.2f}"])
    caption = "Token ledger. A budget counts source tokens unless the study says otherwise."
    return Table("ledger", caption, columns, rows)


def _name(objective: str, condition: str = PLAIN) -> str:
    return escape(formatting.objective_name(objective, condition))


def _escaped(text_of: Callable[[float | None], str]) -> Callable[[float | None], str]:
    return lambda value: escape(text_of(value))


_percent, _points, _p = map(_escaped, (formatting.unsigned_points, formatting.points, formatting.p_value))


def _change(value: float | None, measure: str) -> str:
    return escape(formatting.change(value, measure))


def _number(value: float | None) -> str:
    return escape(MISSING if value is None else f"{value:.3g}".replace("-", formatting.MINUS))


def _interval(low: str, high: str) -> str:
    return "" if escape(MISSING) in (low, high) else f"[{low}, {high}]"


def _budget(budget: int, unit: BudgetUnit) -> str:
    return escape(unit.tick(budget) if budget else MISSING)


def _budget_title(unit: BudgetUnit) -> str:
    return "Step" if unit.count == "steps" else "Budget"
