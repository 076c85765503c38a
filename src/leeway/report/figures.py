"""Figures of rates over budgets: trade-off, by budget, persona traits.

Figures that are not curves: contrasts at a budget, ASR by attack, outcomes.
"""

from __future__ import annotations

import math
import textwrap
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FuncFormatter

from leeway.report import formatting
from leeway.report.formatting import TOKENS, Scale
from leeway.report.plotting import GHOST, INK, PERCENT, SOFT, WIDTH, Drawing, Marks, Series, finish, grid, head, marker
from leeway.report.verdict import LEVEL
from leeway.stats.metrics import BASE, DIRECT, PLAIN
from leeway.stats.rates import ATTACKED, OUTCOMES

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
        f"Scatter of accuracy against attack success rate for {formatting.listed([s.label for s in lines])}, "
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
        who = formatting.name(str(point["objective"]), own.condition)
        says = f"{who}{'' if is_base else ' ' + scale.at(budget)}: "
        says += f"accuracy {formatting.estimate(point['x'], point['x_low'], point['x_high'])}, "
        says += f"ASR {formatting.estimate(point['y'], point['y_low'], point['y_high'])}"
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
        "Line charts of "
        + formatting.listed([str(n) for n in names])
        + " over training budgets, one line per objective.",
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
    says = f"{one.label} {scale.at(budget)}: {point['label']} {formatting.estimate(rate, low, high)}, n {point['n']:,}"
    marks.put(dot, one, budget=budget, says=says)


def _base_lines(ax: Axes, table: pd.DataFrame, lines: list[Series], marks: Marks) -> None:
    base = table[table["objective"] == BASE].dropna(subset="rate").drop_duplicates("condition", keep="last")
    for known in base.to_dict("records"):
        owner = next((s for s in lines if s.condition == known["condition"]), None)
        says = f"{formatting.name(BASE, known['condition'])}: {known['label']} "
        says += formatting.estimate(known["rate"], known["low"], known["high"])
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


HEAT = LinearSegmentedColormap.from_list("leeway", ["#fdf6ee", "#f7c58b", "#e6842a", "#a83c00", "#5c1d00"])
EDGE = "#6b6b6b"
BEFORE = -1  # where the base stands: a budget of 0 is a checkpoint whose tokens are not known
FILLS = {
    "refused": ("#9CC9E8", ""),
    "deflected": ("#D9D9D9", "///"),
    "incoherent": ("#F0E442", "..."),
    "harmful": ("#D55E00", ""),
}


def forest(contrasts: pd.DataFrame, lines: list[Series], scale: Scale = TOKENS) -> Drawing | None:
    """Every objective against the base at the largest budget, on each primary measure."""
    if contrasts.empty or not lines:
        return None
    largest = int(contrasts["budget"].max())
    table = contrasts[contrasts["primary"] & (contrasts["budget"] == largest)]
    names = list(dict.fromkeys(table["measure"]))
    height = 0.27 * len(lines) + 1.25
    figure, marks = Figure(figsize=(WIDTH, height)), Marks()
    axes = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
    figure.subplots_adjust(left=0.13, right=0.97, top=1 - 0.54 / height, bottom=0.72 / height, wspace=0.1)
    for ax, measure in zip(axes, names, strict=True):
        own = table[table["measure"] == measure]
        ax.axvline(0, color=INK, linewidth=0.9, zorder=1)
        for n, one in enumerate(lines):
            _effect(ax, one, one.of(own), len(lines) - 1 - n, marks)
        ax.set_title(textwrap.fill(str(own["label"].iloc[0]), 84 // len(names)))
        left, right = ax.get_xlim()
        digits = 0 if right - left > 0.04 else 1 if right - left > 0.004 else 2
        ax.xaxis.set_major_formatter(FuncFormatter(partial(_tick, digits=digits)))
        ax.grid(axis="y", visible=False)
        ax.set_ylim(-0.6, len(lines) - 0.4)
    axes[0].set_yticks(range(len(lines)), [s.label for s in reversed(lines)])
    figure.text(0.5, 0.36 / height, "Difference from the base, percentage points", ha="center")
    _significance(figure)
    return finish(
        figure,
        "contrasts",
        f"Against the base, {scale.at(largest)}",
        "Paired differences with 95% intervals over prompts. Each interval is for one contrast by itself; "
        "a filled point is significant after Holm’s correction in its family of one axis at one budget.",
        f"Differences from the base {scale.at(largest)} with intervals, "
        "per objective and measure; the same numbers stand in the table of contrasts.",
        marks,
    )


def _tick(value: float, _: int, digits: int) -> str:
    return formatting.points(value, digits)


def _effect(ax: Axes, one: Series, line: pd.DataFrame, y: int, marks: Marks) -> None:
    if line.empty or math.isnan(line["difference"].iloc[0]):
        text = ax.text(0, y, " not printed", va="center", fontsize=7.5, color=SOFT)
        note = "" if line.empty else f": {line['note'].iloc[0]}"
        marks.put(text, one, says=f"{one.label}: not printed{note}")
        return
    found = line.iloc[0]
    significant = found["p_holm"] < LEVEL
    (bar,) = ax.plot([found["low"], found["high"]], [y, y], color=one.colour, linewidth=1.6, zorder=2)
    look: dict[str, Any] = {"color": one.colour, "markerfacecolor": one.colour if significant else "white"}
    (dot,) = ax.plot(found["difference"], y, marker="o", markersize=6, zorder=3, **look)
    low, high = formatting.points(found["low"]), formatting.points(found["high"])
    says = f"{one.label}, {found['label']}: {formatting.points(found['difference'])} points "
    says += f"(95% interval {low} to {high}), p after Holm {formatting.p_value(found['p_holm'])}"
    marks.put(bar, one)
    marks.put(dot, one, says=says)


def _significance(figure: Figure) -> None:
    look: dict[str, Any] = {"linestyle": "", "marker": "o", "color": INK, "markersize": 5}
    handles = [
        Line2D([], [], label="significant after Holm (5%)", **look),
        Line2D(
            [],
            [],
            label="not significant: no evidence of a move, nor of none",
            markerfacecolor="white",
            **look,
        ),
    ]
    figure.legend(handles=handles, loc="lower center", ncols=2, handlelength=1)


def by_attack(rates: pd.DataFrame, lines: list[Series], scale: Scale = TOKENS) -> Drawing | None:
    """ASR of every attack at every budget as numbers on colour, one panel per objective."""
    table = rates[rates["measure"].str.startswith("asr:")]
    if table.empty or not lines:
        return None
    table = _base_before(table).assign(attack=table["measure"].str.split(":", n=1).str[1])
    attacks = sorted(table["attack"].unique(), key=lambda a: (a != DIRECT, a))
    budgets = [BEFORE, *sorted(int(b) for b in table.loc[table["objective"] != BASE, "budget"].unique())]
    columns = 2 if len(budgets) > 7 else 3
    height = 0.25 * len(attacks) + 0.62
    figure, axes = grid(len(lines), columns=columns, height=height, top=0.1, left=0.13, bottom=0.3)
    highest, marks = max(0.2, float(table["rate"].max())), Marks()
    for ax, one in zip(axes, lines, strict=True):
        own = pd.concat([one.base_of(table), one.of(table)])
        marks.put(ax, one)
        _heat(ax, one, own, [str(a) for a in attacks], budgets, highest, marks, scale)
        ax.set_xticks(np.arange(len(budgets)) + 0.5, [_short(b, scale) for b in budgets], fontsize=7)
        ax.set_yticks(np.arange(len(attacks)) + 0.5, [formatting.attack(str(a)) for a in attacks])
        head(ax, one)
    return finish(
        figure,
        "by-attack",
        "Attack by attack",
        "Attack success rate in percent; left of the gap the base under the objective’s own prompt at test "
        "time, above the gap the question asked directly. A dash: not measured, or too many answers "
        "unscored. Intervals: tables/rates.csv.",
        "Heat maps of attack success rate by attack and budget, one panel per objective, numbers printed.",
        marks,
    )


def _heat(
    ax: Axes,
    one: Series,
    own: pd.DataFrame,
    attacks: list[str],
    budgets: list[int],
    highest: float,
    marks: Marks,
    scale: Scale,
) -> None:
    # rectangles stay vector; an image would be an embedded bitmap, which the page's own policy forbids
    cells = {(str(c["attack"]), int(c["budget"])): c for c in own.to_dict("records")}
    for (i, attack), (j, budget) in product(enumerate(attacks), enumerate(budgets)):
        cell = cells.get((attack, budget))
        rate = float(cell["rate"]) if cell else math.nan
        where: dict[str, Any] = {"one": one, "budget": None if budget == BEFORE else budget, "attack": attack}
        if cell and not math.isnan(rate):
            colour = HEAT(rate / highest)
            box = ax.add_patch(Rectangle((j, i), 1, 1, facecolor=colour, edgecolor="white", linewidth=0.4))
            who = formatting.name(BASE, one.condition) if budget == BEFORE else f"{one.label} {scale.at(budget)}"
            says = f"{who}, {formatting.attack(attack)}: ASR {formatting.estimate(rate, cell['low'], cell['high'])}"
            marks.put(box, **where, says=says)
        ink = _on(HEAT(rate / highest)) if not math.isnan(rate) else INK
        text = "–" if math.isnan(rate) else f"{100 * rate:.0f}"
        marks.put(ax.text(j + 0.5, i + 0.5, text, ha="center", va="center", fontsize=7.5, color=ink), **where)
    ax.set_xlim(0, len(budgets))
    ax.set_ylim(len(attacks), 0)
    ax.axvline(1, color="white", linewidth=4)
    ax.axhline(1, color="white", linewidth=4)
    ax.grid(visible=False)
    ax.tick_params(length=0)
    ax.spines[["left", "bottom"]].set_visible(False)


def _on(colour: tuple[float, float, float, float]) -> str:
    """Near-black or near-white, whichever stands out more; a cell and its number look the same on a dark page."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#0b0b0c" if luminance > 0.18 else "#fefefe"


def outcomes(table: pd.DataFrame, lines: list[Series], scale: Scale = TOKENS) -> Drawing | None:
    """What answers were, as stacked shares, base and budgets side by side, one panel per objective."""
    chosen, asked = table[table["attack"] == ATTACKED], "under attack"
    if chosen.empty:
        chosen, asked = table[table["attack"] == DIRECT], "asked directly"
    if chosen.empty or not lines:
        return None
    chosen = _base_before(chosen.groupby(["objective", "condition", "budget"])[OUTCOMES].mean().reset_index())
    budgets = [BEFORE, *sorted(int(b) for b in chosen.loc[chosen["objective"] != BASE, "budget"].unique())]
    x = np.arange(len(budgets)) + 0.25 * (np.array(budgets) > BEFORE)
    figure, axes = grid(len(lines), height=1.9, top=0.28, bottom=0.3)
    marks = Marks()
    for ax, one in zip(axes, lines, strict=True):
        own = pd.concat([one.base_of(chosen), one.of(chosen)]).set_index("budget").reindex(budgets)
        marks.put(ax, one)
        _stack(ax, x, own, one, marks, scale)
        ax.set_xticks(x, [_short(b, scale) for b in budgets], fontsize=7)
        head(ax, one)
    handles = [
        Patch(facecolor=FILLS[o][0], hatch=FILLS[o][1], edgecolor=EDGE, linewidth=0.3, label=o) for o in OUTCOMES
    ]
    figure.legend(handles=handles, loc="upper center", ncols=4)
    return finish(
        figure,
        "outcomes",
        f"What the answers were, {asked}",
        "Shares of the answers that have an outcome, each attack weighing the same. A model that falls apart "
        "looks safe to a harmfulness score: incoherent answers are shown for what they are.",
        "Stacked bars of refused, deflected, incoherent and harmful answers by budget, a panel each.",
        marks,
    )


def _stack(
    ax: Axes, x: np.ndarray[Any, np.dtype[np.float64]], own: pd.DataFrame, one: Series, marks: Marks, scale: Scale
) -> None:
    floor = np.zeros(len(x))
    for outcome in reversed(OUTCOMES):
        fill, hatch = FILLS[outcome]
        share = own[outcome].fillna(0).to_numpy(float)
        bars = ax.bar(
            x,
            share,
            0.86,
            bottom=floor,
            color=fill,
            hatch=hatch,
            edgecolor=EDGE if hatch else fill,
            linewidth=0,
        )
        floor += share
        for bar, budget, height in zip(bars, own.index, share, strict=True):
            of_base = budget == BEFORE
            who = formatting.name(BASE, one.condition) if of_base else f"{one.label} {scale.at(int(budget))}"
            says = f"{who}: {formatting.percent(height)} of answers {outcome}" if height else ""
            marks.put(bar, one, budget=None if of_base else int(budget), says=says)
    for place in x[own[OUTCOMES].isna().all(axis=1).to_numpy()]:
        ax.text(place, 0.02, "–", ha="center", va="bottom", fontsize=7.5, color=INK)
    ax.set_ylim(0, 1)
    ax.yaxis.set_major_formatter(PERCENT)
    ax.grid(axis="x", visible=False)


def _base_before(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(budget=table["budget"].where(table["objective"] != BASE, BEFORE))


def _short(budget: int, scale: Scale) -> str:
    return "base" if budget == BEFORE else scale.tick(budget)
