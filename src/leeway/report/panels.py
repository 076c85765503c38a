"""Figures that are not curves: contrasts at a budget, ASR by attack, outcomes."""

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

from leeway.report import wording
from leeway.report.figures import INK, PERCENT, SOFT, WIDTH, Drawing, finish, grid, head
from leeway.report.marks import Marks
from leeway.report.scale import TOKENS, Scale
from leeway.report.series import Series
from leeway.report.verdict import LEVEL
from leeway.stats.measures import BASE, DIRECT
from leeway.stats.outcomes import ATTACKED, OUTCOMES

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
    return wording.points(value, digits)


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
    low, high = wording.points(found["low"]), wording.points(found["high"])
    says = f"{one.label}, {found['label']}: {wording.points(found['difference'])} points "
    says += f"(95% interval {low} to {high}), p after Holm {wording.p_value(found['p_holm'])}"
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
        ax.set_yticks(np.arange(len(attacks)) + 0.5, [wording.attack(str(a)) for a in attacks])
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
            who = wording.name(BASE, one.condition) if budget == BEFORE else f"{one.label} {scale.at(budget)}"
            says = f"{who}, {wording.attack(attack)}: ASR {wording.estimate(rate, cell['low'], cell['high'])}"
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
            who = wording.name(BASE, one.condition) if of_base else f"{one.label} {scale.at(int(budget))}"
            says = f"{who}: {wording.percent(height)} of answers {outcome}" if height else ""
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
