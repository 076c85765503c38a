"""The comparison as a page, as Markdown, and as one forest plot per measure."""

from __future__ import annotations

import math
import re
from importlib.resources import files
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from leeway.report import inline, tables, wording
from leeway.report.compare.compare import Comparison
from leeway.report.figures import FAINT, INK, WIDTH, Drawing, finish, style
from leeway.report.files.cards import markdown as safe
from leeway.report.verdict import LEVEL

MARKS = ["o", "s", "D", "^", "v", "P", "X", "h"]
SHADES = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6A3D9A", "#666666"]
MEAN = "mean over studies"
STYLES = "styles/page.css"


def draw(found: Comparison) -> list[Drawing]:
    """One forest plot per primary measure, at the largest budget of each objective."""
    own = found.tables["effects"]
    over = found.tables["meta"] if "meta" in found.tables else _pooled(found)
    with style():
        return [
            _forest(found, str(m), own[own["measure"] == m], over[over["measure"] == m])
            for m in own["measure"].unique()
        ]


def _pooled(found: Comparison) -> pd.DataFrame:
    table = found.tables["contrasts"]
    return table[table["primary"]].rename(columns={"difference": "estimate"})


def _forest(found: Comparison, measure: str, own: pd.DataFrame, over: pd.DataFrame) -> Drawing:
    keys = ["objective", "condition"]
    groups = []
    for (objective, condition), lines in own.groupby(keys, sort=False):
        at = int(lines["budget"].max())
        mean = over[(over["objective"] == objective) & (over["condition"] == condition) & (over["budget"] == at)]
        groups.append(
            (
                f"{wording.name(str(objective), str(condition))}, {found.scale.tick(at)}",
                lines[lines["budget"] == at],
                mean,
            )
        )
    names = [s.name for s in found.studies]
    total = sum(len(lines) + len(mean) + 1 for _, lines, mean in groups)
    height = 0.2 * total + 0.95
    figure = Figure(figsize=(WIDTH, height))
    ax = figure.subplots()
    figure.subplots_adjust(left=0.3, right=0.97, top=1 - 0.4 / height, bottom=0.5 / height)
    y, ticks = total, []
    for title, lines, mean in groups:
        ax.annotate(title, (0, y), xytext=(-0.42, y), xycoords=("axes fraction", "data"), weight="bold", va="center")
        for _, line in lines.iterrows():
            y -= 1
            k = names.index(line["study"])
            _point(ax, line, y, "difference", MARKS[k % len(MARKS)], SHADES[k % len(SHADES)])
            ticks.append((y, _short(line["study"])))
        for _, line in mean.iterrows():
            y -= 1
            _point(ax, line, y, "estimate", "d", INK, size=8)
            ticks.append((y, MEAN if found.kind == "contrasted" else "pooled"))
        y -= 1
    ax.axvline(0, color=INK, linewidth=0.9, zorder=1)
    ax.set_yticks([t for t, _ in ticks], [label for _, label in ticks])
    ax.set_ylim(0.2, total + 0.8)
    ax.grid(axis="y", visible=False)
    left, right = ax.get_xlim()
    digits = 0 if right - left > 0.04 else 1 if right - left > 0.004 else 2 if right - left > 0.0004 else 3
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: wording.points(v, digits)))
    ax.set_xlabel("Difference from the base, percentage points")
    label = str(own["label"].iloc[0])
    return finish(
        figure,
        f"compare-{re.sub('[^a-z0-9]+', '-', measure)}",
        label,
        "Each study’s own effect at the largest budget that it shares with another, and below it "
        + ("their random-effects mean" if found.kind == "contrasted" else "the pooled rows’ effect")
        + ", all with 95% intervals for one effect by itself.",
        f"Forest plot of {label}: effects of {wording.listed(names)} with intervals; the tables hold the same numbers.",
    )


def _point(ax: Axes, line: pd.Series, y: int, at: str, mark: str, colour: str, size: float = 5) -> None:
    if math.isnan(line[at]):
        ax.text(0, y, " no number", va="center", fontsize=7.5, color=FAINT)
        return
    ax.plot([max(line["low"], -1), min(line["high"], 1)], [y, y], color=colour, linewidth=1.3, zorder=2)
    ax.plot([line[at]], [y], marker=mark, color=colour, markersize=size, zorder=3)


def _short(name: str) -> str:
    text = wording.visible(name)[0]
    return text if len(text) < 30 else f"{text[:28]}…"


def page(found: Comparison, drawings: list[Drawing]) -> str:
    """One file that works offline, in the report's style."""
    environment = Environment(
        loader=PackageLoader("leeway.report.compare", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for words in (wording.name, wording.percent, wording.points, wording.count):
        environment.filters[words.__name__] = words
    environment.filters |= {"p": wording.p_value, "budget": found.scale.tick}
    return environment.get_template("compare.html.j2").render(context(found, drawings))


def context(found: Comparison, drawings: list[Drawing]) -> dict[str, Any]:
    """What the page's template is filled with."""
    css = files("leeway.report.page").joinpath(STYLES).read_text(encoding="utf-8")
    for place, dark in (("/* lines, light */", False), ("/* lines, dark */", True)):
        css = css.replace(place, inline.colours(dark=dark))
    return {
        "style": Markup(css),
        "found": found,
        "names": [s.name for s in found.studies],
        "told": [(s.name, s.results.manifest, s.results.seeds) for s in found.studies],
        "drawings": [(d, Markup(d.inline)) for d in drawings],
        "tables": {k: tables.records(t) for k, t in found.tables.items()},
        "left_out": found.checked.left_out,
        "level": LEVEL,
    }


def markdown(found: Comparison) -> str:
    """A summary for a pull request or an issue."""
    names = [s.name for s in found.studies]
    lines = [f"# {wording.listed([safe(n) for n in names])}, {found.kind}", ""]
    if found.organisms:
        lines += [
            f"> No evidence about real models: {safe(wording.listed(found.organisms))} measured the organism.",
            "",
        ]
    lines += [f"- {safe(s)}" for s in found.sentences]
    lines += [f"- {safe(d['what'])} {safe(d['effect'])}" for d in found.checked.left_out]
    if "meta" in found.tables:
        lines += [
            "",
            "| Objective | Budget | Measure | Studies | Mean effect | I² | τ | p, Holm |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += [_mean_line(r, found) for r in tables.records(found.tables["meta"])]
        lines += ["", "Effects are checkpoint − base in percentage points, with 95% intervals."]
    else:
        lines += ["", "| Objective | Budget | Measure | Seeds | Effect | p, Holm |", "|---|---|---|---|---|---|"]
        for r in tables.records(found.tables["contrasts"]):
            if r["primary"]:
                cells = [
                    safe(wording.name(r["objective"], r["condition"])),
                    found.scale.tick(r["budget"]),
                    safe(r["label"]),
                ]
                cells += [r["seeds"], _effect(r, "difference"), wording.p_value(r["p_holm"])]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _mean_line(r: dict[str, Any], found: Comparison) -> str:
    cells = [safe(wording.name(r["objective"], r["condition"])), found.scale.tick(r["budget"]), safe(r["label"])]
    spread = "–" if r["tau2"] is None else f"{100 * math.sqrt(r['tau2']):.1f}"
    cells += [
        str(r["studies"]),
        _effect(r, "estimate"),
        wording.percent(r["i2"], 0),
        spread,
        wording.p_value(r["p_holm"]),
    ]
    return f"| {' | '.join(cells)} |"


def _effect(r: dict[str, Any], at: str) -> str:
    if r[at] is None:
        return f"– ({safe(r['note'])})"
    return f"{wording.points(r[at])} [{wording.points(r['low'])}, {wording.points(r['high'])}]"
