"""Draw the figures: contrasts, trade-off, measures by budget, ASR by attack, outcomes, persona traits, learning."""

from __future__ import annotations

import math
import textwrap
from dataclasses import replace
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

from leeway.report import formatting, plotting
from leeway.report.formatting import TOKENS, BudgetUnit
from leeway.report.plotting import INK, PERCENT, Drawing, Series, finish, grid, marker, panel_title
from leeway.report.verdict import LEVEL, headline
from leeway.stats.intervals import Floats
from leeway.stats.learning import LABELS
from leeway.stats.metrics import BASE, DIRECT, LOG_ODDS, PLAIN
from leeway.stats.rates import ATTACKED, OUTCOMES

LABEL_HEIGHT = 0.18  # inches, of a line's label
FONT_SIZE = 7.5  # points, of labels inside panels
PANEL_GAP = 0.71  # inches
STEPS = 10  # of the training loss's running mean
BASE_BUDGET = -1  # position of the base; a budget of 0 is a checkpoint with an unknown number of tokens
HEAT = LinearSegmentedColormap.from_list("leeway", ["#fdf6ee", "#f7c58b", "#e6842a", "#a83c00", "#5c1d00"])
EDGE = "#6b6b6b"
FILLS = {
    "refused": ("#9CC9E8", ""),
    "deflected": ("#D9D9D9", "///"),
    "incoherent": ("#F0E442", "..."),
    "harmful": ("#D55E00", ""),
}


def tradeoff(rates: pd.DataFrame, lines: list[Series], unit: BudgetUnit = TOKENS) -> Drawing | None:
    """Plot capability against ASR: one panel per objective, its trajectory from the base through the budgets."""
    wide = _capability_and_asr(rates)
    if wide is None or not lines:
        return None
    figure, panels = grid(len(lines), height=2.35, top=0.12)
    for ax, own in zip(panels, lines, strict=True):
        for other in lines:
            path = other.with_base(wide)
            if other is not own:
                ax.plot(path["x"], path["y"], color=plotting.GHOST, linewidth=1, zorder=1)
        _trajectory(ax, own, own.with_base(wide))
        panel_title(ax, own)
    _axis_labels(figure, "Capability: accuracy (higher is better)", "ASR (lower is better)")
    for ax in panels:
        ax.xaxis.set_major_formatter(PERCENT)
        ax.yaxis.set_major_formatter(PERCENT)
        ax.set_ylim(bottom=0)
    for ax, own in zip(panels, lines, strict=True):  # once the axis limits are final
        _label_ends(ax, own.with_base(wide), unit)
    return finish(
        figure,
        "tradeoff",
        "Trajectories from the base",
        "One panel per objective: its trajectory from the base (star) through its budgets, the first and last "
        "labelled; other objectives in grey. Crosses: 95% CIs. Lower right is better.",
        f"Scatter plots of accuracy against attack success rate for {formatting.join_and([s.label for s in lines])}, "
        "one panel each, with one point per budget.",
    )


def _trajectory(ax: Axes, own: Series, path: pd.DataFrame) -> None:
    """Plot one trajectory: the base as a star, intervals as crosses."""
    ax.plot(path["x"], path["y"], color=own.colour, zorder=3)
    for point in path.to_dict("records"):
        is_base = point["objective"] == BASE
        cross: dict[str, Any] = {"color": INK if is_base else own.colour, "alpha": 0.45, "linewidth": 1, "zorder": 2}
        across = ([point["x_low"], point["x_high"]], [point["y"]] * 2)
        for x, y in (across, ([point["x"]] * 2, [point["y_low"], point["y_high"]])):
            ax.plot(x, y, **cross)
        look: dict[str, Any] = {"marker": "*", "markersize": 10, "color": INK, "zorder": 5}
        ax.plot(point["x"], point["y"], linestyle="", **(look if is_base else marker(own) | {"zorder": 4}))


def by_budget(rates: pd.DataFrame, lines: list[Series], unit: BudgetUnit = TOKENS) -> Drawing | None:
    """Plot each primary measure by budget: one panel per measure, all objectives, labelled at the right."""
    primary = rates[rates["primary"]]
    names = list(dict.fromkeys(primary["measure"]))
    if not lines or not names:
        return None
    tall = max(2.1, LABEL_HEIGHT * (len(lines) + 1))  # room for every label at the right
    total = tall * len(names) + PANEL_GAP * (len(names) - 1) + 0.78
    figure = Figure(figsize=(plotting.WIDTH, total))
    panels = figure.subplots(len(names), 1, squeeze=False)[:, 0]
    figure.subplots_adjust(left=0.075, right=0.84, top=1 - 0.3 / total, bottom=0.48 / total, hspace=PANEL_GAP / tall)
    for ax, measure in zip(panels, names, strict=True):
        table = primary[primary["measure"] == measure]
        _by_budget_panel(ax, table, lines, unit=unit)
        ax.set_title(str(table["label"].iloc[0]))
        _label_lines(ax, table, lines)
        ax.yaxis.set_major_formatter(PERCENT)
    panels[-1].set_xlabel(f"{unit.axis} (logarithmic)")
    return finish(
        figure,
        "by-budget",
        "Primary measures by budget",
        "Bars: 95% CIs, offset horizontally for legibility. Dashed black line: base with the plain prompt. Dotted line "
        "in an objective’s colour: base with that objective’s test-time prompt, with which it is compared.",
        f"Line charts of {formatting.join_and([str(n) for n in names])} by training budget, one line per objective.",
    )


def traits(rates: pd.DataFrame, lines: list[Series], unit: BudgetUnit = TOKENS) -> Drawing | None:
    """Plot endorsement by budget: one panel per persona trait."""
    table = rates[rates["measure"].str.startswith("endorsement:")]
    names = list(dict.fromkeys(table["measure"]))
    if not names or not lines:
        return None
    figure, panels = grid(len(names), height=2.5, top=0.32 + 0.2 * (len(lines) > 6))
    for ax, measure in zip(panels, names, strict=True):
        _by_budget_panel(ax, table[table["measure"] == measure], lines, unit=unit)
        ax.set_title(measure.split(":", 1)[1].replace("-", " ").capitalize())
        ax.yaxis.set_major_formatter(PERCENT)
        ax.tick_params(axis="x", labelsize=7)
    _axis_labels(figure, unit.axis, "Endorsement")
    _legend(figure, lines)
    return finish(
        figure,
        "persona",
        "Endorsement by trait",
        "Endorsement is P(matching answer) / (P(Yes) + P(No)), averaged over statements. Bars: 95% CIs by cluster "
        "bootstrap. A model that always answers Yes scores 50%; the table separates Yes-keyed and No-keyed statements.",
        "Line charts of endorsement by budget, one panel per trait, one line per objective.",
    )


def learning(measured: pd.DataFrame, lines: list[Series], unit: BudgetUnit = TOKENS) -> Drawing | None:
    """Plot each measure of the learning check by budget: one panel per measure, all objectives."""
    table = measured.rename(columns={"value": "rate"})
    shown = [m for m in LABELS if m != "train-loss" and (table["measure"] == m).any()]
    if not shown or not lines:
        return None
    figure, panels = grid(len(shown), columns=2, height=2.2, top=0.32 + 0.2 * (len(lines) > 6), share=False)
    for ax, measure in zip(panels, shown, strict=True):
        own = table[table["measure"] == measure]
        _by_budget_panel(ax, own, lines, unit=unit, bottom=None if measure in ("nll", "margin") else 0)
        ax.set_title(LABELS[measure])
        if measure in ("preference", "weight-change"):
            ax.yaxis.set_major_formatter(PERCENT)
    _axis_labels(figure, unit.axis, "")
    _legend(figure, lines)
    return finish(
        figure,
        "learning",
        "What each checkpoint learned",
        "On held-out examples of the task: NLL of preferred answers; preferred against dispreferred answers, by mean "
        "log-probability per token; KL(checkpoint ‖ base) of the next token along reference answers. Bars: 95% CIs "
        "over examples. Dashed black line: base with the plain prompt.",
        f"Line charts of {formatting.join_and([LABELS[m] for m in shown])} by training budget, one line per objective.",
    )


def loss(losses: pd.DataFrame, lines: list[Series]) -> Drawing | None:
    """Plot the training loss by optimiser step: one panel per objective, seeds averaged, smoothed over STEPS steps."""
    if losses.empty or not lines:
        return None
    firsts = list({s.objective: s for s in lines}.values())
    figure, panels = grid(len(firsts), height=1.75, top=0.12, share=False)
    for ax, series in zip(panels, firsts, strict=True):
        own = losses[losses["objective"] == series.objective].groupby("step")["loss"].mean()
        ax.plot(own.index, own, color=plotting.GHOST, linewidth=0.8)
        smooth = own.rolling(STEPS, min_periods=1).mean()
        ax.plot(smooth.index, smooth, color=series.colour)
        panel_title(ax, replace(series, condition=PLAIN))
    _axis_labels(figure, "Optimiser step", "Training loss, nats")
    about = (
        f"Grey: each step. Coloured: mean over the last {STEPS} steps. Losses of different objectives are different "
    )
    about += "quantities: compare shapes, not heights."
    alt = "Line charts of the training loss by optimiser step, one panel per objective."
    return finish(figure, "loss", "Training loss", about, alt)


def _legend(figure: Figure, lines: list[Series]) -> None:
    handles = [Line2D([], [], label=s.label, **marker(s, small=True)) for s in lines]
    handles.append(Line2D([], [], label="base", color=INK, dashes=(5, 3), linewidth=1.1))
    figure.legend(handles=handles, loc="upper center", ncols=min(len(handles), 7), columnspacing=1.4, handlelength=1.8)


def _by_budget_panel(
    ax: Axes,
    table: pd.DataFrame,
    lines: list[Series],
    *,
    unit: BudgetUnit = TOKENS,
    bottom: float | None = 0,
) -> None:
    """Plot all objectives by budget in one panel, offset within a budget, with the base as horizontal lines."""
    budgets = sorted(int(b) for b in table.loc[table["objective"] != BASE, "budget"].unique())
    place = {b: math.log2(max(b, 1)) for b in budgets}  # an unknown budget (0) comes first
    gap = min(np.diff(sorted(place.values())), default=1.0) if len(place) > 1 else 1.0
    width = 0.55 * float(gap)
    _base_lines(ax, table, lines)
    for n, series in enumerate(lines):
        own = series.of(table)
        own = own[own["rate"].notna()]
        x = np.array([place[int(b)] for b in own["budget"]]) + width * ((n + 0.5) / len(lines) - 0.5)
        ax.plot(x, own["rate"], color=series.colour, zorder=3, linewidth=1.3)
        for at, point in zip(x, own.to_dict("records"), strict=True):
            ax.vlines(at, point["low"], point["high"], color=series.colour, linewidth=1, alpha=0.55, zorder=2)
            ax.plot(at, point["rate"], linestyle="", zorder=3, **marker(series, small=True))
    ax.set_xticks(list(place.values()), [unit.tick(b) for b in budgets])
    ax.set_xlim(min(place.values(), default=0) - 0.55 * gap, max(place.values(), default=1) + 0.55 * gap)
    ax.set_ylim(bottom=bottom)
    ax.grid(axis="x", visible=False)


def _base_lines(ax: Axes, table: pd.DataFrame, lines: list[Series]) -> None:
    base = table[table["objective"] == BASE].dropna(subset="rate").drop_duplicates("condition", keep="last")
    for line in base.to_dict("records"):
        owner = next((s for s in lines if s.condition == line["condition"]), None)
        if line["condition"] == PLAIN:
            ax.axhline(line["rate"], linewidth=1.1, zorder=1, color=INK, dashes=(5, 3))
        elif owner:
            ax.axhline(line["rate"], linewidth=1.1, zorder=1, color=owner.colour, dashes=(1, 2))


def _capability_and_asr(rates: pd.DataFrame) -> pd.DataFrame | None:
    """Return accuracy (x) and ASR (y) of the checkpoints that have both."""
    keys = ["objective", "budget", "condition"]
    asr = rates[(rates["axis"] == "jailbreak") & rates["primary"]]
    accuracy = rates[rates["measure"] == "accuracy"]
    if accuracy.empty or asr.empty:
        return None
    columns = ["rate", "low", "high"]
    x, y = (
        t.set_index(keys)[columns].set_axis([a, f"{a}_low", f"{a}_high"], axis=1)
        for a, t in zip("xy", (accuracy, asr), strict=True)
    )
    return x.join(y, how="inner").dropna().reset_index()


def _label_ends(ax: Axes, path: pd.DataFrame, unit: BudgetUnit) -> None:
    """Label the first and the last budget; if they are too close, the lower one below its mark."""
    trained = path[path["objective"] != BASE]
    ends = [trained.iloc[n] for n in sorted({0, len(trained) - 1})] if len(trained) else []
    places = ax.transData.transform([(e["x"], e["y"]) for e in ends]) if ends else np.empty((0, 2))
    distance_x, distance_y = np.abs(places[0] - places[-1]) * 72 / ax.figure.dpi if ends else (0.0, 0.0)  # points
    close = len(ends) > 1 and distance_x < 6 * FONT_SIZE and distance_y < 1.4 * FONT_SIZE
    lower = int(np.argmin(places[:, 1])) if close else -1
    look: dict[str, Any] = {"textcoords": "offset points", "fontsize": FONT_SIZE, "zorder": 6}
    for n, end in enumerate(ends):
        side = {"xytext": (5, -5), "va": "top"} if n == lower else {"xytext": (5, 5), "va": "baseline"}
        ax.annotate(unit.tick(int(end["budget"])), (end["x"], end["y"]), **side, **look)


def _label_lines(ax: Axes, table: pd.DataFrame, lines: list[Series]) -> None:
    """Label the lines at the right end, with their markers, without overlaps."""
    ends: list[tuple[float, str, Series | None]] = []
    for series in lines:
        own = series.of(table)
        own = own[own["rate"].notna()]
        if len(own):
            ends.append((float(own["rate"].iloc[-1]), series.label, series))
    base = table[(table["objective"] == BASE) & (table["condition"] == PLAIN)]["rate"].dropna()
    if len(base):
        ends.append((float(base.iloc[0]), "base", None))
    low, high = ax.get_ylim()
    tall = ax.get_window_extent().height / ax.figure.dpi
    heights = spread_labels([e[0] for e in ends], LABEL_HEIGHT / tall * (high - low), low, high)
    right = ax.get_xlim()[1]
    for (rate, label, line), height in zip(ends, heights, strict=True):
        up = (height - low) / (high - low)
        arrow: dict[str, Any] = {"arrowstyle": "-", "color": line.colour if line else INK, "linewidth": 0.5}
        arrow |= {"shrinkA": 0, "shrinkB": 1, "relpos": (0, 0.5)}
        end: dict[str, Any] = {"textcoords": "axes fraction", "va": "center", "annotation_clip": False}
        ax.annotate(label, (right, rate), xytext=(1.045, up), arrowprops=arrow, **end)
        if line:
            look = marker(line, small=True)
            ax.add_artist(Line2D([1.037], [up], transform=ax.transAxes, clip_on=False, linestyle="", **look))


def spread_labels(heights: list[float], gap: float, low: float, high: float) -> list[float]:
    """Move label heights at least `gap` from each other, in order and within [low, high]; evenly spaced if too many."""
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


def _axis_labels(figure: Figure, x: str, y: str) -> None:
    total = figure.get_figheight()
    figure.text(0.5, 0.1 / total, x, ha="center", va="bottom")
    figure.text(0.012, 0.5, y, ha="left", va="center", rotation=90)


def forest(contrasts: pd.DataFrame, lines: list[Series], unit: BudgetUnit = TOKENS) -> Drawing | None:
    """Plot the contrasts with the base at the largest budget: one panel per measure of the verdict."""
    if contrasts.empty or not lines:
        return None
    largest = int(contrasts["budget"].max())
    table = contrasts[headline(contrasts, contrasts) & (contrasts["budget"] == largest)]
    names = list(dict.fromkeys(table["measure"]))
    height = 0.27 * len(lines) + 1.25
    figure = Figure(figsize=(plotting.WIDTH, height))
    axes = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
    figure.subplots_adjust(left=0.13, right=0.97, top=1 - 0.54 / height, bottom=0.72 / height, wspace=0.1)
    for ax, measure in zip(axes, names, strict=True):
        own = table[table["measure"] == measure]
        ax.axvline(0, color=INK, linewidth=0.9, zorder=1)
        for n, series in enumerate(lines):
            _contrast(ax, series, series.of(own), len(lines) - 1 - n)
        ax.set_title(textwrap.fill(str(own["label"].iloc[0]), 84 // len(names)))
        if measure in LOG_ODDS:
            ax.xaxis.set_major_formatter(partial(_log_odds_tick, measure=measure))
        else:
            plotting.points_axis(ax)
        ax.grid(axis="y", visible=False)
        ax.set_ylim(-0.6, len(lines) - 0.4)
    axes[0].set_yticks(range(len(lines)), [s.label for s in reversed(lines)])
    scale = "percentage points" + " (trait: log-odds)" * bool(set(LOG_ODDS) & set(names))
    figure.text(0.5, 0.36 / height, f"Difference from the base, {scale}", ha="center")
    look: dict[str, Any] = {"linestyle": "", "marker": "o", "color": INK, "markersize": 5}
    filled = Line2D([], [], label="significant after Holm (5%)", **look)
    open_ = Line2D([], [], label="not significant (no evidence of equivalence)", markerfacecolor="white", **look)
    figure.legend(handles=[filled, open_], loc="lower center", ncols=2, handlelength=1)
    return finish(
        figure,
        "contrasts",
        f"Contrasts with the base {unit.at(largest)}",
        "Paired differences with 95% CIs (prompt sampling), not adjusted for multiplicity. Filled: significant after "
        "Holm’s correction in the family of one axis at one budget.",
        f"Forest plots of differences from the base {unit.at(largest)} by objective and measure; the table of "
        "contrasts has the numbers.",
    )


def _log_odds_tick(value: float, _: int | None, *, measure: str) -> str:
    return formatting.change(value, measure)


def _contrast(ax: Axes, series: Series, line: pd.DataFrame, y: int) -> None:
    if line.empty or math.isnan(line["difference"].iloc[0]):
        ax.text(0, y, " not available", va="center", fontsize=7.5, color=plotting.SOFT)
        return
    found = line.iloc[0]
    significant = found["p_holm"] < LEVEL
    ax.plot([found["low"], found["high"]], [y, y], color=series.colour, linewidth=1.6, zorder=2)
    look: dict[str, Any] = {"color": series.colour, "markerfacecolor": series.colour if significant else "white"}
    ax.plot(found["difference"], y, marker="o", markersize=6, zorder=3, **look)


def by_attack(rates: pd.DataFrame, lines: list[Series], unit: BudgetUnit = TOKENS) -> Drawing | None:
    """Draw heat maps of ASR by attack and budget: one panel per objective."""
    table = rates[rates["measure"].str.startswith("asr:")]
    if table.empty or not lines:
        return None
    table = _with_base_budget(table).assign(attack=table["measure"].str.split(":", n=1).str[1])
    attacks = sorted(map(str, table["attack"].unique()), key=lambda a: (a != DIRECT, a))
    budgets = _budgets(table)
    columns = 2 if len(budgets) > 7 else 3
    height = 0.25 * len(attacks) + 0.62
    figure, axes = grid(len(lines), columns=columns, height=height, top=0.1, left=0.13, bottom=0.3)
    highest = max(0.2, float(table["rate"].max()))
    for ax, series in zip(axes, lines, strict=True):
        _heat(ax, series, table, attacks, highest)
        ax.set_xticks(np.arange(len(budgets)) + 0.5, [_short(b, unit) for b in budgets], fontsize=7)
        ax.set_yticks(np.arange(len(attacks)) + 0.5, [formatting.attack_name(a) for a in attacks])
        panel_title(ax, series)
    return finish(
        figure,
        "by-attack",
        "ASR by attack",
        "Attack success rate in percent. Left of the gap: base with the objective’s test-time prompt. Above the gap: "
        "direct requests without an attack. Dash: not measured, or too many unscored responses. Intervals: "
        "tables/rates.csv.",
        "Heat maps of attack success rate by attack and budget, one panel per objective, with numbers.",
    )


def _heat(ax: Axes, series: Series, table: pd.DataFrame, attacks: list[str], highest: float) -> None:
    """Draw one panel, with rectangles: imshow would embed a bitmap, which the page's policy forbids."""
    budgets = _budgets(table)
    cells = {(str(c["attack"]), int(c["budget"])): c for c in series.with_base(table).to_dict("records")}
    for (i, attack), (j, budget) in product(enumerate(attacks), enumerate(budgets)):
        cell = cells.get((attack, budget))
        rate = float(cell["rate"]) if cell else math.nan
        if cell and not math.isnan(rate):
            colour = HEAT(rate / highest)
            ax.add_patch(Rectangle((j, i), 1, 1, facecolor=colour, edgecolor="white", linewidth=0.4))
        ink = text_colour(HEAT(rate / highest)) if not math.isnan(rate) else INK
        text = "–" if math.isnan(rate) else f"{100 * rate:.0f}"
        ax.text(j + 0.5, i + 0.5, text, ha="center", va="center", fontsize=7.5, color=ink)
    ax.set_xlim(0, len(budgets))
    ax.set_ylim(len(attacks), 0)
    ax.axvline(1, color="white", linewidth=4)
    ax.axhline(1, color="white", linewidth=4)
    ax.grid(visible=False)
    ax.tick_params(length=0)
    ax.spines[["left", "bottom"]].set_visible(False)


def text_colour(colour: tuple[float, float, float, float]) -> str:
    """Return near-black or near-white for contrast; a constant colour, so the dark theme does not change it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#0b0b0c" if luminance > 0.18 else "#fefefe"


def outcomes(table: pd.DataFrame, lines: list[Series], unit: BudgetUnit = TOKENS) -> Drawing | None:
    """Draw stacked bars of response outcomes by budget: one panel per objective."""
    chosen, setting = table[table["attack"] == ATTACKED], "under attack"
    if chosen.empty:
        chosen, setting = table[table["attack"] == DIRECT], "to direct requests"
    if chosen.empty or not lines:
        return None
    chosen = _with_base_budget(chosen.groupby(["objective", "condition", "budget"])[OUTCOMES].mean().reset_index())
    budgets = _budgets(chosen)
    x = np.arange(len(budgets)) + 0.25 * (np.array(budgets) > BASE_BUDGET)
    figure, axes = grid(len(lines), height=1.9, top=0.28, bottom=0.3)
    for ax, series in zip(axes, lines, strict=True):
        own = series.with_base(chosen).set_index("budget").reindex(budgets)
        _stacked_bars(ax, x, own)
        ax.set_xticks(x, [_short(b, unit) for b in budgets], fontsize=7)
        panel_title(ax, series)
    handles = [
        Patch(facecolor=FILLS[o][0], hatch=FILLS[o][1], edgecolor=EDGE, linewidth=0.3, label=o) for o in OUTCOMES
    ]
    figure.legend(handles=handles, loc="upper center", ncols=4)
    return finish(
        figure,
        "outcomes",
        f"Outcomes of responses {setting}",
        "Shares of the responses with an outcome, averaged over attacks. Incoherent responses are shown separately: a "
        "model that only produces them has a low ASR.",
        "Stacked bars of refused, deflected, incoherent and harmful responses by budget, one panel per objective.",
    )


def _stacked_bars(ax: Axes, x: Floats, own: pd.DataFrame) -> None:
    floor = np.zeros(len(x))
    for outcome in reversed(OUTCOMES):
        fill, hatch = FILLS[outcome]
        share = own[outcome].fillna(0).to_numpy(float)
        look: dict[str, Any] = {"color": fill, "hatch": hatch, "edgecolor": EDGE if hatch else fill, "linewidth": 0}
        ax.bar(x, share, 0.86, bottom=floor, **look)
        floor += share
    for place in x[own[OUTCOMES].isna().all(axis=1).to_numpy()]:
        ax.text(place, 0.02, "–", ha="center", va="bottom", fontsize=7.5, color=INK)
    ax.set_ylim(0, 1)
    ax.yaxis.set_major_formatter(PERCENT)
    ax.grid(axis="x", visible=False)


def _with_base_budget(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(budget=table["budget"].where(table["objective"] != BASE, BASE_BUDGET))


def _budgets(table: pd.DataFrame) -> list[int]:
    return [BASE_BUDGET, *sorted(int(b) for b in table.loc[table["objective"] != BASE, "budget"].unique())]


def _short(budget: int, unit: BudgetUnit) -> str:
    return "base" if budget == BASE_BUDGET else unit.tick(budget)
