"""Success in any of k tries on the page: its figure, and the lines of its table."""

from __future__ import annotations

from itertools import product

import pandas as pd
from matplotlib.axes import Axes

from leeway.report import formatting
from leeway.report.plotting import INK, PERCENT, Drawing, Series, finish, grid, marker
from leeway.stats.metrics import AT, BASE, PLAIN
from leeway.stats.rates import ATTACKED


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """Return the lines for the page: the base and the last budget, by the primary judge."""
    own = table[~table["axis"].str.contains(AT, regex=False)]
    chosen: pd.DataFrame = own[(own["objective"] == BASE) | (own["budget"] == own["budget"].max())]
    return chosen


def figure(table: pd.DataFrame | None, lines: list[Series]) -> Drawing | None:
    """Plot success by k at the last budget: one panel per attack, one line per objective, the base dashed."""
    if table is None or table.empty:
        return None
    own = shown(table)
    own = own[own["rate"].notna()]
    attacks = sorted(own["attack"].unique(), key=lambda a: (a != ATTACKED, a))
    if not attacks:
        return None
    drawing, panels = grid(len(attacks), height=2.3, top=0.4)
    ks = sorted(int(k) for k in own["k"].unique())
    base = Series(BASE, PLAIN, INK, "*", filled=True)
    present = [s for s in [base, *lines] if not s.of(own).empty]
    for (ax, attack), (n, series) in product(zip(panels, attacks, strict=True), enumerate(present)):
        offset = 0.5 * ((n + 0.5) / len(present) - 0.5)
        _line(ax, series.of(own[own["attack"] == attack]), series, ks, offset)
    for ax, attack in zip(panels, attacks, strict=True):
        ax.set_title("Mean over attacks" if attack == ATTACKED else formatting.attack_name(attack))
        ax.set_xticks(range(len(ks)), [f"{k:,}" for k in ks])
        ax.set_ylim(0, 1)
        ax.yaxis.set_major_formatter(PERCENT)
        ax.grid(axis="x", visible=False)
    drawing.supxlabel("Tries at each prompt (k)", fontsize=8.5, y=0.01)
    handles = [panels[0].plot([], [], label=s.label, **marker(s, small=True))[0] for s in present]
    drawing.legend(handles=handles, loc="upper center", ncols=min(len(handles), 7), handlelength=1.8)
    about = (
        "Share of forbidden prompts of which at least one of k sampled answers is harmful, estimated without bias from "
        "all answers to the prompt; the base (star) and the last budget. Bars: 95% CIs over prompts."
    )
    alt = "Line charts of the success in any of k tries, one panel per attack, one line per objective."
    return finish(drawing, "asr-at-k", "Attack success in any of k tries", about, alt)


def _line(ax: Axes, own: pd.DataFrame, series: Series, ks: list[int], offset: float) -> None:
    own = own.sort_values("k")
    x = [ks.index(int(k)) + offset for k in own["k"]]
    ax.plot(x, own["rate"], color=series.colour, linewidth=1.2, zorder=2)
    for at, point in zip(x, own.to_dict("records"), strict=True):
        ax.vlines(at, point["low"], point["high"], color=series.colour, linewidth=1, alpha=0.55, zorder=2)
        ax.plot(at, point["rate"], linestyle="", zorder=3, **marker(series, small=True))
