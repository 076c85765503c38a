"""Figures of rates over budgets: trade-off, by budget, persona traits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from leeway.report import wording
from leeway.report.figures import GHOST, INK, PERCENT, WIDTH, Drawing, finish, grid, head, marker
from leeway.report.marks import Marks
from leeway.report.scale import TOKENS, Scale
from leeway.report.series import Series
from leeway.stats.measures import BASE, PLAIN

NAME = 0.18  # inches that a line's name takes
NAMED = 7.5  # points, the size of a budget's name beside its mark
BETWEEN = 0.71  # inches between one panel and the next


def tradeoff(rates: pd.DataFrame, lines: list[Series], scale: Scale = TOKENS) -> Drawing | None:
    """Capability against ASR, one panel per objective, its trajectory from the base through the budgets."""
    wide = _wide(rates)
    if wide is None or not lines:
        return None
    figure, panels = grid(len(lines), height=2.35, top=0.12)
    marks = Marks()
    for ax, own in zip(panels, lines, strict=True):
        marks.put(ax, own)
        for other in lines:
            path = _path(wide, other)
            if other is not own:
                (ghost,) = ax.plot(path["x"], path["y"], color=GHOST, linewidth=1, zorder=1)
                marks.put(ghost, other)
        _way(ax, own, _path(wide, own), marks, scale)
        head(ax, own)
    _axis_names(figure, "Capability: accuracy (higher is better)", "ASR (lower is better)")
    for ax in panels:
        ax.xaxis.set_major_formatter(PERCENT)
        ax.yaxis.set_major_formatter(PERCENT)
        ax.set_ylim(bottom=0)
    for ax, own in zip(panels, lines, strict=True):  # once the axes are what they stay
        _name_ends(ax, _path(wide, own), scale)
    return finish(
        figure,
        "tradeoff",
        "Each objective’s way from the base",
        "Each panel follows one objective from the base (star) through its budgets; the first and the last "
        "are named, the other objectives are grey. Crosses are 95% intervals: where they overlap, points are "
        "not told apart. Down and to the right is better.",
        f"Scatter of accuracy against attack success rate for {wording.listed([s.label for s in lines])}, "
        "one panel each, every point a token budget.",
        marks,
    )


def _way(ax: Axes, own: Series, path: pd.DataFrame, marks: Marks, scale: Scale) -> None:
    """One trajectory: intervals as crosses, the base as a star, first and last budget named."""
    ax.plot(path["x"], path["y"], color=own.colour, zorder=3)
    for point in path.to_dict("records"):
        is_base, budget = point["objective"] == BASE, int(point["budget"])
        cross: dict[str, Any] = {"color": INK if is_base else own.colour, "alpha": 0.45, "linewidth": 1, "zorder": 2}
        whose: dict[str, Any] = {} if is_base else {"one": own, "budget": budget}
        across = ([point["x_low"], point["x_high"]], [point["y"]] * 2)
        for x, y in (across, ([point["x"]] * 2, [point["y_low"], point["y_high"]])):
            (arm,) = ax.plot(x, y, **cross)
            marks.put(arm, **whose)
        look: dict[str, Any] = {"marker": "*", "markersize": 10, "color": INK, "zorder": 5}
        (dot,) = ax.plot(point["x"], point["y"], linestyle="", **(look if is_base else marker(own) | {"zorder": 4}))
        who = wording.name(str(point["objective"]), own.condition)
        says = f"{who}{'' if is_base else ' ' + scale.at(budget)}: "
        says += f"accuracy {wording.estimate(point['x'], point['x_low'], point['x_high'])}, "
        says += f"ASR {wording.estimate(point['y'], point['y_low'], point['y_high'])}"
        marks.put(dot, **whose, says=says)


def by_budget(rates: pd.DataFrame, lines: list[Series], scale: Scale = TOKENS) -> Drawing | None:
    """Every primary measure over budgets, all objectives in one panel each, named at the right."""
    primary = rates[rates["primary"]]
    names = list(dict.fromkeys(primary["measure"]))
    if not lines or not names:
        return None
    tall = max(2.1, NAME * (len(lines) + 1))  # every line's name finds room at the right
    total = tall * len(names) + BETWEEN * (len(names) - 1) + 0.78
    figure = Figure(figsize=(WIDTH, total))
    panels = figure.subplots(len(names), 1, squeeze=False)[:, 0]
    figure.subplots_adjust(left=0.075, right=0.84, top=1 - 0.3 / total, bottom=0.48 / total, hspace=BETWEEN / tall)
    marks = Marks()
    for ax, measure in zip(panels, names, strict=True):
        table = primary[primary["measure"] == measure]
        spread(ax, table, lines, marks, scale=scale)
        ax.set_title(str(table["label"].iloc[0]))
        _name_lines(ax, table, lines, marks)
        ax.yaxis.set_major_formatter(PERCENT)
    panels[-1].set_xlabel(f"{scale.axis} (logarithmic)")
    return finish(
        figure,
        "by-budget",
        "What each budget bought and cost",
        "Bars are 95% intervals, set side by side so that they can be told apart. The dashed black line is "
        "the base under the plain prompt; a dotted line in an objective’s colour is the base under that "
        "objective’s own prompt at test time, which is what it is compared with.",
        "Line charts of " + wording.listed([str(n) for n in names]) + " over training budgets, one line per objective.",
        marks,
    )


def traits(rates: pd.DataFrame, lines: list[Series], scale: Scale = TOKENS) -> Drawing | None:
    """Endorsement per persona trait over budgets."""
    table = rates[rates["measure"].str.startswith("endorsement:")]
    names = list(dict.fromkeys(table["measure"]))
    if not names or not lines:
        return None
    figure, panels = grid(len(names), height=2.5, top=0.32 + 0.2 * (len(lines) > 6))
    marks = Marks()
    for ax, measure in zip(panels, names, strict=True):
        spread(ax, table[table["measure"] == measure], lines, marks, scale=scale)
        ax.set_title(measure.split(":", 1)[1].replace("-", " ").capitalize())
        ax.yaxis.set_major_formatter(PERCENT)
        ax.tick_params(axis="x", labelsize=7)
    _axis_names(figure, scale.axis, "Endorsement")
    legend(figure, lines)
    return finish(
        figure,
        "persona",
        "Persona, trait by trait",
        "Endorsement is P(matching answer) / (P(Yes) + P(No)), averaged over statements; bars are 95% "
        "intervals by cluster bootstrap. A model that always says Yes scores 50%: the table has the keyed "
        "halves.",
        "Line charts of endorsement over budgets, one panel per trait, one line per objective.",
        marks,
    )


def spread(ax: Axes, table: pd.DataFrame, lines: list[Series], marks: Marks, *, scale: Scale = TOKENS) -> None:
    """All objectives over budgets in one panel, side by side within a budget, with the base's lines."""
    budgets = sorted(int(b) for b in table.loc[table["objective"] != BASE, "budget"].unique())
    place = positions(budgets)
    gap = min(np.diff(sorted(place.values())), default=1.0) if len(place) > 1 else 1.0
    width = 0.55 * float(gap)
    _base_lines(ax, table, lines, marks)
    for n, one in enumerate(lines):
        own = one.of(table)
        own = own[own["rate"].notna()]
        x = np.array([place[int(b)] for b in own["budget"]]) + width * ((n + 0.5) / len(lines) - 0.5)
        (line,) = ax.plot(x, own["rate"], color=one.colour, zorder=3, linewidth=1.3)
        marks.put(line, one)
        for at, point in zip(x, own.to_dict("records"), strict=True):
            _point(ax, float(at), point, one, marks, scale)
    ax.set_xticks(list(place.values()), [scale.tick(b) for b in budgets])
    ax.set_xlim(min(place.values(), default=0) - 0.55 * gap, max(place.values(), default=1) + 0.55 * gap)
    ax.set_ylim(bottom=0)
    ax.grid(axis="x", visible=False)


def _point(ax: Axes, x: float, point: dict[Any, Any], one: Series, marks: Marks, scale: Scale) -> None:
    """One rate and its interval."""
    budget, (rate, low, high) = int(point["budget"]), (point[k] for k in ("rate", "low", "high"))
    bar = ax.vlines(x, low, high, color=one.colour, linewidth=1, alpha=0.55, zorder=2)
    marks.put(bar, one, budget=budget)
    (dot,) = ax.plot(x, rate, linestyle="", zorder=3, **marker(one, small=True))
    says = f"{one.label} {scale.at(budget)}: {point['label']} {wording.estimate(rate, low, high)}, n {point['n']:,}"
    marks.put(dot, one, budget=budget, says=says)


def _base_lines(ax: Axes, table: pd.DataFrame, lines: list[Series], marks: Marks) -> None:
    base = table[table["objective"] == BASE].dropna(subset="rate").drop_duplicates("condition", keep="last")
    for known in base.to_dict("records"):
        owner = next((s for s in lines if s.condition == known["condition"]), None)
        says = f"{wording.name(BASE, known['condition'])}: {known['label']} "
        says += wording.estimate(known["rate"], known["low"], known["high"])
        if known["condition"] == PLAIN:
            marks.put(ax.axhline(known["rate"], linewidth=1.1, zorder=1, color=INK, dashes=(5, 3)), says=says)
        elif owner:
            line = ax.axhline(known["rate"], linewidth=1.1, zorder=1, color=owner.colour, dashes=(1, 2))
            marks.put(line, owner, says=says)


def positions(budgets: list[int]) -> dict[int, float]:
    """Where a budget stands on a logarithmic axis; one that is not known (0) at its beginning."""
    return {b: math.log2(max(b, 1)) for b in budgets}


def legend(figure: Figure, lines: list[Series]) -> None:
    """One row of names over the panels, the base last."""
    handles = [Line2D([], [], label=s.label, **marker(s, small=True)) for s in lines]
    handles.append(Line2D([], [], label="base", color=INK, dashes=(5, 3), linewidth=1.1))
    figure.legend(handles=handles, loc="upper center", ncols=min(len(handles), 7), columnspacing=1.4, handlelength=1.8)


def _wide(rates: pd.DataFrame) -> pd.DataFrame | None:
    """Accuracy as x and ASR as y of every checkpoint that has both."""
    keys = ["objective", "budget", "condition"]
    vulnerable = rates[(rates["axis"] == "jailbreak") & rates["primary"]]
    able = rates[rates["measure"] == "accuracy"]
    if able.empty or vulnerable.empty:
        return None
    x = able.set_index(keys)[["rate", "low", "high"]].set_axis(["x", "x_low", "x_high"], axis=1)
    y = vulnerable.set_index(keys)[["rate", "low", "high"]].set_axis(["y", "y_low", "y_high"], axis=1)
    return x.join(y, how="inner").dropna().reset_index()


def _path(wide: pd.DataFrame, one: Series) -> pd.DataFrame:
    return pd.concat([one.base_of(wide), one.of(wide)])


def _name_ends(ax: Axes, path: pd.DataFrame, scale: Scale) -> None:
    """Name the first and the last budget; where the two are too close for both names, the lower one from below."""
    trained = path[path["objective"] != BASE]
    ends = [trained.iloc[n] for n in sorted({0, len(trained) - 1})] if len(trained) else []
    places = ax.transData.transform([(e["x"], e["y"]) for e in ends]) if ends else np.empty((0, 2))
    apart_x, apart_y = np.abs(places[0] - places[-1]) * 72 / ax.figure.dpi if ends else (0.0, 0.0)  # points
    close = len(ends) > 1 and apart_x < 6 * NAMED and apart_y < 1.4 * NAMED
    lower = int(np.argmin(places[:, 1])) if close else -1
    for n, end in enumerate(ends):
        ax.annotate(
            scale.tick(int(end["budget"])),
            (end["x"], end["y"]),
            xytext=(5, -5 if n == lower else 5),
            va="top" if n == lower else "baseline",
            textcoords="offset points",
            fontsize=NAMED,
            zorder=6,
        )


def _name_lines(ax: Axes, table: pd.DataFrame, lines: list[Series], marks: Marks) -> None:
    """Names at the right end, each with its line's marker, moved apart where the lines end close together."""
    ends: list[tuple[float, str, Series | None]] = []
    for one in lines:
        own = one.of(table)
        own = own[own["rate"].notna()]
        if len(own):
            ends.append((float(own["rate"].iloc[-1]), one.label, one))
    base = table[(table["objective"] == BASE) & (table["condition"] == PLAIN)]["rate"].dropna()
    if len(base):
        ends.append((float(base.iloc[0]), "base", None))
    low, high = ax.get_ylim()
    tall = ax.get_window_extent().height / ax.figure.dpi
    heights = apart([e[0] for e in ends], NAME / tall * (high - low), low, high)
    right = ax.get_xlim()[1]
    for (rate, label, line), height in zip(ends, heights, strict=True):
        up = (height - low) / (high - low)
        arrow: dict[str, Any] = {"arrowstyle": "-", "color": line.colour if line else INK, "linewidth": 0.5}
        arrow |= {"shrinkA": 0, "shrinkB": 1, "relpos": (0, 0.5)}
        end: dict[str, Any] = {"textcoords": "axes fraction", "va": "center", "annotation_clip": False}
        text = ax.annotate(label, (right, rate), xytext=(1.045, up), arrowprops=arrow, **end)
        marks.put(text, line)
        if line:
            look = marker(line, small=True)
            dot = ax.add_artist(Line2D([1.037], [up], transform=ax.transAxes, clip_on=False, linestyle="", **look))
            marks.put(dot, line)


def apart(heights: list[float], gap: float, low: float, high: float) -> list[float]:
    """The same heights in the same order, inside the panel and at least `gap` from each other; evenly if too many."""
    gap = min(gap, (high - low) / max(1, len(heights) - 1))
    order = np.argsort(heights, kind="stable")
    placed = np.array(heights, dtype=float)[order]
    for n in range(1, len(placed)):
        placed[n] = max(placed[n], placed[n - 1] + gap)
    if len(placed) and placed[-1] > high:
        placed[-1] = high
        for n in range(len(placed) - 2, -1, -1):
            placed[n] = min(placed[n], placed[n + 1] - gap)
    found = np.empty_like(placed)
    found[order] = placed
    return [float(h) for h in found]


def _axis_names(figure: Figure, x: str, y: str) -> None:
    total = figure.get_figheight()
    figure.text(0.5, 0.1 / total, x, ha="center", va="bottom")
    figure.text(0.012, 0.5, y, ha="left", va="center", rotation=90)
