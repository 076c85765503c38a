"""Outputs of a comparison of logs: terminal, page, Markdown, JSON, CSV, figure, and a folder that the gate reads.

The folder is a run directory without training: `leeway gate FOLDER --rule FILE` decides on it, `Results.load` reads it.
The files contain no times: equal logs give equal bytes.
"""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure

from leeway.errors import LeewayError
from leeway.hashing import file_digest
from leeway.io import atomic_write, write_file, write_json
from leeway.report import formatting, plotting
from leeway.report.compare.compare import COLOURS, MARKERS, draw_interval, short_name
from leeway.report.compare.logs.compare import LogComparison
from leeway.report.compare.logs.match import ALLOWED, LEFT_OUT
from leeway.report.exports.model_card import markdown as safe
from leeway.report.formatting import escape_invisible, p_value, percent, points
from leeway.report.plotting import INK, WIDTH, Drawing, finish, points_axis, style
from leeway.report.rebuild import column_types
from leeway.report.verdict import LEVEL
from leeway.yaml_config import dump

FORMAT = 1  # of compare.json
OUTPUT = re.compile(r"compare(-[a-z]+)?\.(csv|json|html|md|svg|png|pdf)")
HEADS = ["measure", "checkpoint", "base", "score", "difference", "95% CI", "p (Holm)", "higher", "lower", "equal"]
NUMERIC = range(2, len(HEADS) + 2)  # columns


def write(comparison: LogComparison, out: Path) -> Path:
    """Write the folder and every file for readers into `out`; return the page's path."""
    if (out / "rows.parquet").exists() or (out / "manifest.json").exists():
        _check_folder(out)
    drawings = draw(comparison)
    contents: dict[str, str | bytes] = {f"compare-{k}.csv": formatting.to_csv(t) for k, t in comparison.tables.items()}
    for d in drawings:
        contents |= {f"{d.name}.svg": d.svg, f"{d.name}.png": d.png, f"{d.name}.pdf": d.pdf}
    contents |= {"compare.json": formatting.to_json(as_json(comparison)), "compare.md": markdown(comparison)}
    contents["compare.html"] = page(comparison, drawings)
    for old in sorted(out.glob("compare*")) if out.is_dir() else []:
        if OUTPUT.fullmatch(old.name) and old.name not in contents:
            old.unlink()  # of an earlier comparison
    _write_run(comparison, out)
    for name, content in contents.items():
        write_file(out / name, content)
    return out / "compare.html"


def _check_folder(out: Path) -> None:
    """Raise LeewayError if a folder with a run is not that of an earlier comparison of logs."""
    try:
        manifest = json.loads((out / "manifest.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        manifest = None
    if formatting.mapping(formatting.mapping(manifest).get("external")).get("kind") != "logs":
        raise LeewayError(f"{out} is a run directory", fix="give another --out")


def _write_run(comparison: LogComparison, out: Path) -> None:
    """Write rows, an empty ledger, study and manifest."""
    results = comparison.results
    for name, table in (("rows.parquet", results.rows), ("ledger.parquet", results.ledger)):
        with atomic_write(out / name) as scratch:
            table.to_parquet(scratch, index=False)
    write_file(out / "study.yaml", dump(results.study))
    hashes = {name: file_digest(out / name) for name in ("rows.parquet", "ledger.parquet", "study.yaml")}
    write_json(out / "manifest.json", results.manifest | {"file_hashes": hashes})


def as_json(comparison: LogComparison) -> dict[str, Any]:
    tables = comparison.tables
    records = {name: formatting.to_records(table) for name, table in tables.items()}
    head: dict[str, Any] = {"format": FORMAT, "kind": "logs", "level": LEVEL, "tool": comparison.checkpoints[0].tool}
    head["checkpoints"] = [
        {
            "name": c.name,
            "tasks": {
                t: {"log": str(log.path), "hash": file_digest(log.path), "model": log.model}
                for t, log in c.tasks.items()
            },
        }
        for c in comparison.checkpoints
    ]
    options = comparison.options
    head["options"] = {"cluster_by": options.cluster_by, "allow": options.allow, "ranges": comparison.matched.ranges}
    head["sentences"] = sentences(comparison)
    types = {name: column_types(lines, [str(c) for c in tables[name]]) for name, lines in records.items()}
    return {**head, "columns": types, **records}


def sentences(comparison: LogComparison) -> list[str]:
    """State what differs, what is equivalent, and every item, answer and setting that does not agree."""
    found = [_differences(comparison)]
    table = comparison.equivalence
    if len(table):
        shown = table[table["equivalent"]]
        margins = sorted(set(table["margin"]))
        margin = f"±{100 * margins[0]:g} points" if len(margins) == 1 else "their margins"
        named = [f"{c} on {m}" for c, m in shown[["checkpoint", "measure"]].itertuples(index=False, name=None)]
        listed = f" ({formatting.join_and(named)})" if named else ""
        found.append(f"Equivalent to {comparison.base} within {margin}: {len(shown)} of {len(table)}{listed}.")
    found += _unpaired(comparison) + _unscored(comparison)
    for d in comparison.matched.differences:
        if d["effect"] == ALLOWED:
            values = "; ".join(f"{n}: {d[n]}" for n in comparison.matched.names)
            found.append(f"Different settings, allowed: {d['what']} ({values}).")
        elif d["effect"].startswith(LEFT_OUT):
            found.append(f"{d['what']} is {d['effect']}.")
    scaled = [f"{m} from {low:g} to {high:g}" for m, (low, high) in comparison.matched.ranges.items()]
    if scaled:
        found.append(f"Scores are fractions of their range ({'; '.join(scaled)}).")
    if by := comparison.options.cluster_by:
        found.append(f"Items with the same value of {by!r} are one cluster.")
    if groups := comparison.matched.by_subtask:
        found.append(f"Means over subtasks of equal weight, as in the logs: {', '.join(groups)}.")
    if subtasks := len(comparison.contrasts) - len(_primary(comparison)):
        found.append(f"{subtasks} differences of subtasks are in compare-contrasts.csv and on the page.")
    notes = _primary(comparison)[["measure", "checkpoint", "note"]].itertuples(index=False, name=None)
    return found + [f"{m}, {c}: {note}." for m, c, note in notes if note]


def _primary(comparison: LogComparison) -> pd.DataFrame:
    """Return the contrasts without those of subtasks."""
    return comparison.contrasts[comparison.contrasts["primary"]]


def _differences(comparison: LogComparison) -> str:
    table = _primary(comparison)
    tested, significant = int(table["p_holm"].notna().sum()), table[table["p_holm"] < LEVEL]
    named = [
        f"{c} on {m}, {points(d)}"
        for c, m, d in significant[["checkpoint", "measure", "difference"]].itertuples(index=False, name=None)
    ]
    listed = f" ({'; '.join(named)} points)" if named else ""
    text = f"Significantly different from {comparison.base}: {len(significant)} of {tested}{listed}"
    text += f"; Holm over {tested} comparison{'s' * (tested != 1)}."
    return f"{text} A non-significant difference is no evidence of equality."


def _unpaired(comparison: LogComparison) -> list[str]:
    found = {}
    for r in comparison.items.to_dict("records"):
        if r["only_base"] or r["only_checkpoint"]:
            only = f"{r['only_base']} only in {comparison.base}, {r['only_checkpoint']} only in {r['checkpoint']}"
            task = comparison.matched.measures[str(r["measure"])][0]
            found[task, r["checkpoint"]] = f"{task}: {r['paired']} items are in both logs, {only}; these do not pair."
    return list(found.values())


def _unscored(comparison: LogComparison) -> list[str]:
    found = []
    for (measure, name), own in comparison.matched.unscored.groupby(["measure", "checkpoint"], sort=False):
        reasons = "; ".join(
            f"{n} {reason}" for reason, n in own[["reason", "answers"]].itertuples(index=False, name=None)
        )
        total = comparison.matched.answers[str(measure), str(name)]
        found.append(f"{measure}: {own['answers'].sum()} of {total} answers of {name} are unscored ({reasons}).")
    return found


def table_rows(comparison: LogComparison) -> list[list[str]]:
    """Return heads and one line per contrast as text."""
    heads, rows = [*HEADS], []
    verdicts = {(r["checkpoint"], r["measure"]): r for r in comparison.equivalence.to_dict("records")}
    heads += ["equivalent"] if verdicts else []
    for r in _primary(comparison).to_dict("records"):
        ci = f"{points(r['low'])} to {points(r['high'])}"
        cells = [r["measure"], r["checkpoint"], percent(r["base"]), percent(r["score"]), points(r["difference"]), ci]
        cells += [p_value(r["p_holm"]), *(str(r[k]) for k in ("higher", "lower", "equal"))]
        if verdicts:
            own = verdicts.get((r["checkpoint"], r["measure"]))
            within = f"±{100 * own['margin']:g}" if own else ""
            cells.append(f"{'yes' if own['equivalent'] else 'not shown'} ({within})" if own else formatting.MISSING)
        rows.append(cells)
    return [heads, *rows]


def text(comparison: LogComparison) -> str:
    """Return the table and the sentences for a terminal."""
    rows = [[escape_invisible(cell)[0] for cell in row] for row in table_rows(comparison)]
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    align = [f"{'>' if k in NUMERIC else '<'}{width}" for k, width in enumerate(widths)]
    lines = ["  ".join(map(format, row, align)).rstrip() for row in rows]
    lines += ["", *(escape_invisible(s)[0] for s in sentences(comparison))]
    return "\n".join(lines)


def markdown(comparison: LogComparison) -> str:
    """Return a summary for a pull request or an issue."""
    heads, *rows = table_rows(comparison)
    lines = [f"# {safe(', '.join(comparison.matched.names[1:]))} against {safe(comparison.base)}", ""]
    lines += [f"| {' | '.join(heads)} |", "|" + "---|" * 2 + "--:|" * (len(heads) - 2)]
    lines += [f"| {' | '.join([safe(cell) for cell in row])} |" for row in rows]
    lines += ["", *(f"- {safe(s)}" for s in sentences(comparison)), "", f"{METHODS[0]} {METHODS[1]}"]
    return "\n".join(lines) + "\n"


METHODS = [
    "Differences are checkpoint − base over the items of both logs, in percentage points; an item's score is the mean "
    "over its epochs.",
    "Interval and p are the wild cluster bootstrap over items (or clusters); with one binary score per item p is "
    "McNemar's mid-p test, and p_mcnemar the exact one.",
]


def draw(comparison: LogComparison) -> list[Drawing]:
    """Draw every difference with its interval, by measure."""
    table, names = _primary(comparison), comparison.matched.names[1:]
    total = len(table) + table["measure"].nunique()
    height = 0.2 * total + 0.95
    with style():
        figure = Figure(figsize=(WIDTH, height))
        ax = figure.subplots()
        figure.subplots_adjust(left=0.3, right=0.97, top=1 - 0.4 / height, bottom=0.5 / height)
        y, ticks = total, []
        for measure, lines in table.groupby("measure", sort=False):
            place = ("axes fraction", "data")
            ax.annotate(short_name(str(measure)), (0, y), xytext=(-0.42, y), xycoords=place, weight="bold", va="center")
            for _, line in lines.iterrows():
                y -= 1
                k = names.index(line["checkpoint"])
                draw_interval(ax, line, y, "difference", MARKERS[k % len(MARKERS)], COLOURS[k % len(COLOURS)])
                ticks.append((y, short_name(line["checkpoint"])))
            y -= 1
        ax.axvline(0, color=INK, linewidth=0.9, zorder=1)
        ax.set_yticks([t for t, _ in ticks], [label for _, label in ticks])
        ax.set_ylim(0.2, total + 0.8)
        ax.grid(axis="y", visible=False)
        points_axis(ax)
        ax.set_xlabel("Difference from the base, percentage points")
        caption = "Differences from the base with 95% CIs, not adjusted for multiplicity."
        alt = "Forest plot of the differences, as in the table."
        return [finish(figure, "compare-differences", f"Differences from {comparison.base}", caption, alt)]


def page(comparison: LogComparison, drawings: list[Drawing]) -> str:
    """Render the page, self-contained and in the report's style."""
    environment = formatting.templates("leeway.report.compare.logs", ".", html=True, invisible=_visible)
    css = files("leeway.report.page").joinpath("styles/page.css").read_text(encoding="utf-8")
    tables: dict[str, pd.DataFrame] = comparison.tables
    return environment.get_template("logs.html.j2").render(
        style=Markup(plotting.with_line_colours(css)),
        comparison=comparison,
        names=comparison.matched.names,
        sentences=sentences(comparison),
        methods=METHODS,
        left_out=[d for d in comparison.matched.differences if d["effect"].startswith((LEFT_OUT, ALLOWED))],
        drawings=[(d, Markup(d.inline)) for d in drawings],
        tables={k: formatting.to_records(t) for k, t in tables.items()},
        level=LEVEL,
    )


def _visible(value: object) -> str:
    return escape_invisible(str(value))[0]
