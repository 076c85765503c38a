"""Draw a probe's figures for papers: the same numbers as the page's charts, with the seeds pooled in the same way."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from leeway.report.charts.comparison import MOVES
from leeway.report.charts.mechanism import CURVES, checkpoints, effects, movements, series_of_probe
from leeway.report.figures import text_colour
from leeway.report.formatting import MINUS, capitalize_first, join_and, to_records
from leeway.report.mechanism import INTO_CHECKPOINT, SITES, Probe, answer_token
from leeway.report.plotting import FAINT, INK, PERCENT, Drawing, Series, finish, grid, marker

COLOURS = LinearSegmentedColormap.from_list("moves", MOVES["range"])


def drawings(probe: Probe | None, contrasts: pd.DataFrame, lines: list[Series]) -> list[Drawing | None]:
    """Draw every figure that the probe's measures allow."""
    if probe is None:
        return []
    own = series_of_probe(probe, lines)
    return [
        _patching(probe, own),
        _layers(probe, own),
        _scatter(probe, contrasts, own, "mechanism-asr"),
        _scatter(probe, contrasts, own, "mechanism-capability"),
        _depth(probe, own),
    ]


def _patching(probe: Probe, lines: list[Series]) -> Drawing | None:
    """Draw heat maps of layer by budget: a panel per objective and site."""
    table = probe.at("patching", INTO_CHECKPOINT, budget=0)
    shown = [s for s in lines if (table["objective"] == s.objective).any()]
    sites = [site for site in SITES if (table["site"] == site).any()]
    if not shown or not sites:
        return None
    budgets = sorted(int(b) for b in table["budget"].unique())
    height = 0.17 * probe.layers + 0.75
    panels = list(product(shown, sites))
    figure, axes = grid(len(panels), columns=len(sites), height=height, top=0.1, bottom=0.3)
    for ax, (s, site) in zip(axes, panels, strict=True):
        own = table[(table["objective"] == s.objective) & (table["site"] == site)]
        _heat(ax, own, budgets, probe.layers)
        ax.set_xticks(np.arange(len(budgets)) + 0.5, [probe.unit.tick(b) for b in budgets], fontsize=7)
        every = 1 if probe.layers <= 12 else 4
        layers = range(0, probe.layers, every)
        ax.set_yticks([n + 0.5 for n in layers], [str(n + 1) for n in layers], fontsize=7)
        ax.set_title(f"{s.label}, {SITES[site]}")
    return finish(
        figure,
        "mechanism-patching",
        "Patching by layer and budget",
        "Share of the difference in the refusal logit that comes back if the base’s activations are put into the "
        "checkpoint at one layer, in percent. Outlined: named. Dash: withheld.",
        f"Heat maps of layers by budgets for {join_and([s.label for s in shown])}, one panel per site.",
    )


def _heat(ax: Axes, own: pd.DataFrame, budgets: list[int], layers: int) -> None:
    for c in to_records(own):
        x, y, value = budgets.index(c["budget"]), c["layer"], c["value"]
        colour = COLOURS(0.5 + 0.5 * max(-1.0, min(1.0, value or 0.0)))
        edge: dict[str, Any] = {"edgecolor": INK if c["named"] else "white", "linewidth": 0.9 if c["named"] else 0.4}
        if value is not None:
            ax.add_patch(Rectangle((x, y), 1, 1, facecolor=colour, zorder=2 + c["named"], **edge))
        ink = INK if value is None else text_colour(colour)
        text = "–" if value is None else f"{round(100 * value)}".replace("-", MINUS)
        ax.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=7, color=ink, zorder=4)
    ax.set_xlim(0, len(budgets))
    ax.set_ylim(layers, 0)
    ax.grid(visible=False)
    ax.tick_params(length=0)
    ax.spines[["left", "bottom"]].set_visible(False)


def _layers(probe: Probe, lines: list[Series]) -> Drawing | None:
    """Draw the share by layer at the largest budget: one panel per measure and site."""
    known = {title: probe.at(measure, detail) for title, (measure, detail, _) in CURVES.items()}
    known = {t: own[(own["site"] == CURVES[t][2]) & own["value"].notna()] for t, own in known.items()}
    known = {t: own.assign(along=own["layer"] + 1) for t, own in known.items() if len(own)}
    return _curves(
        known,
        lines,
        "mechanism-layers",
        f"Share of the refusal logit’s change by layer, {probe.unit.at(probe.largest)}",
        "Bands: 95% CIs over prompts. Grey, dashed: a random direction of equal norm.",
        "Line charts of the share by layer, one panel per measure and site, one line per objective.",
        percent=True,
    )


def _depth(probe: Probe, lines: list[Series]) -> Drawing | None:
    table = probe.at("token-kl").dropna(subset="value")
    table = table.assign(along=answer_token(table)) if len(table) else table
    known = {capitalize_first(str(k)): own for k, own in table.groupby("detail", sort=True)}
    return _curves(
        known,
        lines,
        "mechanism-depth",
        f"KL to the base by answer token, {probe.unit.at(probe.largest)}",
        "KL(checkpoint ‖ base) of the next token, in nats, along fixed answers. Bands: 95% CIs over answers.",
        "Line charts of KL by answer token, along harmful and harmless answers, one line per objective.",
        percent=False,
    )


def _curves(
    panels: dict[str, pd.DataFrame],
    lines: list[Series],
    name: str,
    title: str,
    caption: str,
    alt: str,
    *,
    percent: bool,
) -> Drawing | None:
    """Plot `value` with its band over `along`, and the control in grey."""
    if not panels:
        return None
    figure, axes = grid(len(panels), height=2.1, top=0.34, share=False)
    for ax, (panel, table) in zip(axes, panels.items(), strict=True):
        ax.axhline(0, color=INK, linewidth=0.8, zorder=1)
        for s in lines:
            own = table[table["objective"] == s.objective].sort_values("along")
            x = own["along"].to_numpy(float)
            ax.fill_between(x, own["low"].astype(float), own["high"].astype(float), color=s.colour, alpha=0.14, lw=0)
            ax.plot(x, own["control"].astype(float), color=FAINT, linewidth=1, dashes=(4, 3), zorder=2)
            ax.plot(x, own["value"].astype(float), zorder=3, **marker(s, small=True))
        ax.set_title(panel)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        if percent:
            ax.yaxis.set_major_formatter(PERCENT)
    _legend(figure, [s for s in lines if any((t["objective"] == s.objective).any() for t in panels.values())])
    return finish(figure, name, title, caption, alt)


def _scatter(probe: Probe, contrasts: pd.DataFrame, lines: list[Series], name: str) -> Drawing | None:
    """Plot the probe's values against changes of behaviour: one panel per measure, one point per checkpoint."""
    behaviour = name == "mechanism-asr"
    panels = [(p, [*checkpoints(p, contrasts, lines)]) for p in (effects if behaviour else movements)(probe)]
    panels = [(p, points) for p, points in panels if points]
    if not panels:
        return None
    figure, axes = grid(len(panels), height=2.4, top=0.34, share=False)
    for ax, ((title, _, scale, _), points) in zip(axes, panels, strict=True):
        for s, own, other in points:
            value = [math.nan if own[k] is None else scale * own[k] for k in ("value", "low", "high")]
            moved = [math.nan if other[k] is None else 100 * other[k] for k in ("difference", "low", "high")]
            _cross(ax, s, *((value, moved) if behaviour else (moved, value)))
        ax.set_title(title)
    _legend(figure, [s for s in lines if any(s is p[0] for _, points in panels for p in points)])
    what = "change of attack success" if behaviour else "change of accuracy"
    axis = f"{'Vertical' if behaviour else 'Horizontal'}: {what} from the base, points."
    return finish(
        figure,
        name,
        "Causal effect against attack success" if behaviour else "Movement inside the model against capability",
        f"One point per checkpoint. {axis} Crosses: 95% CIs.",
        f"Scatter plots of the probe’s values and the {what}, one point per checkpoint.",
    )


def _cross(ax: Axes, s: Series, x: list[float], y: list[float]) -> None:
    """Plot a point and its intervals; each of x and y is value, low, high."""
    look: dict[str, Any] = {"color": s.colour, "alpha": 0.45, "linewidth": 1, "zorder": 2}
    ax.plot(x[1:], [y[0]] * 2, **look)
    ax.plot([x[0]] * 2, y[1:], **look)
    ax.plot(x[0], y[0], linestyle="", **marker(s, small=True) | {"zorder": 3})


def _legend(figure: Figure, lines: list[Series]) -> None:
    handles = [Line2D([], [], label=s.label, **marker(s, small=True)) for s in lines]
    figure.legend(handles=handles, loc="upper center", ncols=min(len(handles), 7), columnspacing=1.4, handlelength=1.8)
