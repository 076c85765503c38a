"""Shared parts of the figures: style, lines and their colours, rendering, inline SVG."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter
from matplotlib.transforms import ScaledTranslation

from leeway.report import formatting
from leeway.stats.metrics import BASE, PLAIN

mpl.use("Agg")


# Okabe & Ito (2008), distinguishable with any colour vision; without yellow, which is too pale on white
LOOKS = {
    "sft": ("#D55E00", "o"),
    "dpo": ("#E69F00", "s"),
    "cft": ("#56B4E9", "D"),
    "ip": ("#CC79A7", "^"),
    "orpo": ("#009E73", "v"),
    "kl": ("#0072B2", "P"),
}
SPARE = [("#8C6D1F", "X"), ("#6A3D9A", "h"), ("#666666", "<"), ("#B2182B", ">")]
SPARE += [("#1B7837", "p"), ("#35978F", "*"), ("#D55E00", "d"), ("#0072B2", "H")]


@dataclass(frozen=True)
class Series:
    """An objective under one test-time condition, drawn with the same colour and marker in every figure."""

    objective: str
    condition: str
    colour: str
    marker: str
    filled: bool

    @property
    def label(self) -> str:
        return formatting.objective_name(self.objective, self.condition)

    def of(self, table: pd.DataFrame) -> pd.DataFrame:
        """Return this line's rows of a table, by budget."""
        chosen = (table["objective"] == self.objective) & (table["condition"] == self.condition)
        return table[chosen].sort_values("budget")

    def with_base(self, table: pd.DataFrame) -> pd.DataFrame:
        """Return the base's rows under this line's condition, then this line's."""
        base = (table["objective"] == BASE) & (table["condition"] == self.condition)
        return pd.concat([table[base], self.of(table)])


def series_of(table: pd.DataFrame, order: list[str]) -> list[Series]:
    """Return one line per objective and condition, objectives in the study's order, plain prompts first."""
    pairs = table.loc[table["objective"] != BASE, ["objective", "condition"]].drop_duplicates()
    present = [str(o) for o in pairs["objective"].unique()]
    objectives = [o for o in order if o in present] + sorted(set(present) - set(order))
    others = [o for o in objectives if o not in LOOKS]
    lines = []
    for objective in objectives:
        colour, marker = LOOKS.get(objective) or SPARE[others.index(objective) % len(SPARE)]
        conditions = sorted(pairs.loc[pairs["objective"] == objective, "condition"], key=lambda c: (c != PLAIN, c))
        for n, condition in enumerate(conditions):
            lines.append(Series(objective, str(condition), colour, marker, filled=n == 0))
    return lines


def order_objectives(objectives: list[str], study: dict[str, Any]) -> list[str]:
    """Sort objectives as in the study file; others follow alphabetically."""
    named = study.get("objectives")
    order: list[str] = []
    for entry in named if isinstance(named, list | dict) else []:
        order += [str(alias) for alias in entry] if isinstance(entry, dict) else [str(entry)]
    return [o for o in order if o in objectives] + sorted(set(objectives) - set(order))


def key_of(objective: str, condition: str) -> str:
    """Return the filter key of a line; empty for the base, which no filter hides."""
    return "" if objective == BASE else f"{objective}|{condition}"


THEMED = {
    "#1c1e21": "ink",
    "#5b6168": "soft",
    "#9aa0a6": "faint",
    "#e4e6e8": "grid",
    "#d3d6d9": "ghost",
    "#ffffff": "card",
}
# line colours in the dark theme, where the original would be too dim
ON_DARK = {
    "#d55e00": "#f0803c",
    "#0072b2": "#4fa8e0",
    "#009e73": "#2fbf94",
    "#8c6d1f": "#c9a64a",
    "#6a3d9a": "#b79ae0",
    "#666666": "#a3a9b0",
    "#b2182b": "#f2777f",
    "#1b7837": "#5fbf7a",
    "#35978f": "#56bdb4",
}
STYLE_ATTRIBUTE = re.compile(r' style="([^"]*)"')
PAINT = re.compile(r'(?<= )(fill|stroke)="(#[0-9a-f]{6})"')


def inline(svg: str, name: str, alt: str) -> str:
    """Convert matplotlib's SVG for embedding in a page with a strict Content Security Policy.

    Style declarations become attributes, colours become theme variables, and the figure gets `alt` as its title.
    """
    body = svg[svg.index("<svg") :]
    body = re.sub(r' xmlns(:xlink)?="[^"]*"', "", body).replace("xlink:href=", "href=")
    body = re.sub(r"\s*<defs>\s*<style.*?</style>\s*</defs>", "", body, count=1, flags=re.DOTALL)
    body = STYLE_ATTRIBUTE.sub(lambda m: _attributes(m.group(1)), body)
    body = PAINT.sub(lambda m: f'{m.group(1)}="{themed(m.group(2))}"', body)
    body = re.sub(r"\n\s*", " ", body).replace("> <", "><")
    title = f'<title id="{name}-title">{html.escape(alt, quote=False)}</title>'
    opened = f'<svg role="img" aria-labelledby="{name}-title" stroke-linejoin="round" stroke-linecap="butt" '
    return re.sub(r"<svg ([^>]*)>", lambda m: f"{opened}{m.group(1)}>{title}", body, count=1)


def themed(colour: str) -> str:
    """Return the theme variable of a colour, or the colour itself if it has none."""
    if colour in THEMED:
        return f"var(--{THEMED[colour]})"
    return f"var(--c{colour[1:]})" if colour in ON_DARK else colour


def with_line_colours(css: str) -> str:
    """Insert the lines' colours as CSS variables into the page's style sheet, for both themes."""
    light = " ".join(f"--c{colour[1:]}: {colour};" for colour in ON_DARK)
    dark = " ".join(f"--c{colour[1:]}: {on_dark};" for colour, on_dark in ON_DARK.items())
    return css.replace("/* lines, light */", light).replace("/* lines, dark */", dark)


def _attributes(declarations: str) -> str:
    """Return style declarations as attributes, without the font, which the page sets."""
    pairs = [[part.strip() for part in declaration.split(":", 1)] for declaration in declarations.split(";")]
    return "".join(f' {pair[0]}="{pair[-1]}"' for pair in pairs if pair[0] not in ("", "font-family"))


WIDTH = 8.0  # inches, drawn 960 CSS pixels wide: 8.5 pt text is 14 pixels
PERCENT = FuncFormatter(lambda v, _: f"{100 * v:.3g}%")
INK, SOFT, FAINT, GRID, GHOST = "#1c1e21", "#5b6168", "#9aa0a6", "#e4e6e8", "#d3d6d9"
FONTS = "'DejaVu Sans', Verdana, 'Segoe UI', Helvetica, Arial, sans-serif"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "text.parse_math": False,  # names may contain a dollar sign
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize"), 8),
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    **dict.fromkeys(("figure.facecolor", "savefig.facecolor"), "white"),
    "svg.fonttype": "none",  # keep text as text: searchable and small
    "svg.hashsalt": "leeway",
    "pdf.fonttype": 42,  # TrueType, since journals reject Type 3
    "hatch.linewidth": 0.5,
}


@dataclass(frozen=True)
class Drawing:
    """A finished figure: file name, title, caption, alt text and files."""

    name: str
    title: str
    caption: str
    alt: str
    svg: str
    png: bytes
    pdf: bytes

    @property
    def inline(self) -> str:
        """The SVG for embedding in an HTML page."""
        return inline(self.svg, self.name, self.alt)


@contextmanager
def style() -> Iterator[None]:
    """Draw with the report's matplotlib settings, whatever the caller's are."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        yield


def finish(figure: Figure, name: str, title: str, caption: str, alt: str) -> Drawing:
    """Render to SVG, PNG and PDF without dates or random ids, so that equal figures give equal bytes."""
    svg, png, pdf = io.BytesIO(), io.BytesIO(), io.BytesIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(svg, format="svg", metadata=no_metadata)
    figure.savefig(png, format="png", dpi=150, metadata={"Software": None})
    figure.savefig(pdf, format="pdf", metadata=dict.fromkeys(("CreationDate", "Creator", "Producer")))
    drawn = _unique_ids(formatting.show_invisible(svg.getvalue().decode("utf-8")), name)
    return Drawing(name, title, caption, alt, drawn, png.getvalue(), pdf.getvalue())


def points_axis(ax: Axes) -> None:
    """Label the x axis in signed percentage points, with as many digits as its range needs."""
    left, right = ax.get_xlim()
    digits = sum(right - left <= width for width in (0.04, 0.004, 0.0004))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: formatting.points(value, digits)))


def marker(line: Series, *, small: bool = False) -> dict[str, Any]:
    """Return the marker style of a line: filled for its first condition, open for others."""
    return {
        "color": line.colour,
        "marker": line.marker,
        "markersize": 4.2 if small else 5.5,
        "markerfacecolor": line.colour if line.filled else "white",
        "markeredgecolor": "white" if line.filled else line.colour,
        "markeredgewidth": 0.5 if line.filled else 1.0,
    }


def panel_title(ax: Axes, line: Series) -> None:
    """Title a panel with the line's marker in its colour and its name in black (pale colours are hard to read)."""
    figure = ax.figure
    where = ax.transAxes + ScaledTranslation(4 / 72, 9.5 / 72, figure.dpi_scale_trans)
    ax.add_artist(Line2D([0], [1], linestyle="", transform=where, clip_on=False, **marker(line)))
    look: dict[str, Any] = {"fontsize": 9.5, "weight": "bold", "annotation_clip": False}
    ax.annotate(line.label, (0, 1), xytext=(12, 6), xycoords="axes fraction", textcoords="offset points", **look)


def grid(
    panels: int,
    columns: int = 3,
    height: float = 2.3,
    top: float = 0.5,
    left: float = 0.085,
    bottom: float = 0.5,
    *,
    share: bool = True,
) -> tuple[Figure, list[Axes]]:
    """Create `panels` axes of equal size; `top` and `bottom` are inches for the legend and axis names.

    `share`: all have the same limits.
    """
    columns = min(columns, max(panels, 1))
    rows = -(-panels // columns)
    total = rows * height + top
    figure = Figure(figsize=(WIDTH, total))
    axes = figure.subplots(rows, columns, squeeze=False, sharex=share, sharey=share)
    inside = total - top - 0.25 - bottom
    gap = 0.52  # inches between rows of panels, for a title and tick labels
    hspace = gap * rows / max(inside - gap * (rows - 1), 0.1) if rows > 1 else 0.0
    upper, lower = 1 - (top + 0.25) / total, bottom / total
    figure.subplots_adjust(left=left, right=0.985, top=upper, bottom=lower, wspace=0.1 if share else 0.2, hspace=hspace)
    flat = [ax for row in axes for ax in row]
    for n, ax in enumerate(flat):
        ax.set_visible(n < panels)
        ax.tick_params(labelbottom=True)
    return figure, flat[:panels]


def _unique_ids(svg: str, name: str) -> str:
    """Prefix ids with the figure's name, since one page holds several, and add fallback fonts."""
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    return re.sub(r"'DejaVu Sans'(, sans-serif)?", FONTS, svg)
