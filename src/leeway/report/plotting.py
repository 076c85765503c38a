"""One style for all figures, and each figure as the same SVG, PNG and PDF bytes every time.

The lines of the figures: an objective under a test condition, always in the same colour and marker.

What each mark of a figure stands for: the page names it, picks it out, and dims the others.

A figure's SVG inside the page: no styles of its own, colours that follow the theme, marks with their words.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter
from matplotlib.transforms import ScaledTranslation

from leeway.report import formatting
from leeway.stats.metrics import BASE, PLAIN

mpl.use("Agg")


# Okabe & Ito (2008), told apart by people of every colour vision; its yellow is too pale for a line on white
COLOURS = {
    "sft": "#D55E00",
    "dpo": "#E69F00",
    "cft": "#56B4E9",
    "ip": "#CC79A7",
    "orpo": "#009E73",
    "kl": "#0072B2",
}
SPARE = ["#8C6D1F", "#6A3D9A", "#666666", "#B2182B", "#1B7837", "#35978F", "#D55E00", "#0072B2"]
MARKERS = {"sft": "o", "dpo": "s", "cft": "D", "ip": "^", "orpo": "v", "kl": "P"}
SPARE_MARKERS = ["X", "h", "<", ">", "p", "*", "d", "H"]


@dataclass(frozen=True)
class Series:
    """One line: what it shows and how it is drawn."""

    objective: str
    condition: str
    colour: str
    marker: str
    filled: bool

    @property
    def label(self) -> str:
        return formatting.name(self.objective, self.condition)

    def of(self, table: pd.DataFrame) -> pd.DataFrame:
        """This line's rows of a table, by budget."""
        chosen = (table["objective"] == self.objective) & (table["condition"] == self.condition)
        return table[chosen].sort_values("budget")

    def base_of(self, table: pd.DataFrame) -> pd.DataFrame:
        """The base under this line's own test condition."""
        chosen = (table["objective"] == BASE) & (table["condition"] == self.condition)
        return table[chosen]


def series_of(table: pd.DataFrame, order: list[str]) -> list[Series]:
    """One per objective and condition: the study's order of objectives, plain prompts first."""
    pairs = table.loc[table["objective"] != BASE, ["objective", "condition"]].drop_duplicates()
    present = [str(o) for o in pairs["objective"].unique()]
    objectives = [o for o in order if o in present] + sorted(set(present) - set(order))
    strangers = [o for o in objectives if o not in COLOURS]
    found = []
    for objective in objectives:
        spare = strangers.index(objective) % len(SPARE) if objective in strangers else 0
        conditions = sorted(pairs.loc[pairs["objective"] == objective, "condition"], key=lambda c: (c != PLAIN, c))
        for n, condition in enumerate(conditions):
            colour = COLOURS.get(objective, SPARE[spare])
            marker = MARKERS.get(objective, SPARE_MARKERS[spare])
            found.append(Series(objective, str(condition), colour, marker, filled=n == 0))
    return found


@dataclass(frozen=True)
class Mark:
    """A drawn thing: whose it is, and what it says where a reader can stop at it."""

    line: str = ""  # the objective and its test prompt; empty: the base's, or everybody's
    budget: int | None = None
    attack: str = ""
    says: str = ""

    def attributes(self) -> dict[str, str]:
        """For the element of the page that shows it."""
        found = {"data-line": self.line, "data-attack": self.attack, "data-says": self.says}
        found["data-budget"] = "" if self.budget is None else str(self.budget)
        return {k: v for k, v in sorted(found.items()) if v}


class Marks:
    """The marks of one figure, by the id that each has in its SVG."""

    def __init__(self) -> None:
        self.found: dict[str, Mark] = {}

    def put(
        self, artist: Artist, one: Series | None = None, *, budget: int | None = None, attack: str = "", says: str = ""
    ) -> None:
        """Say what an artist stands for."""
        key = f"mark{len(self.found)}"
        artist.set_gid(key)
        self.found[key] = Mark(key_of(one.objective, one.condition) if one else "", budget, attack, says)


def key_of(objective: str, condition: str) -> str:
    """How the page calls a line; empty for the base, which no choice of objectives hides."""
    return "" if objective == BASE else f"{objective}|{condition}"


THEMED = {
    "#1c1e21": "ink",
    "#5b6168": "soft",
    "#9aa0a6": "faint",
    "#e4e6e8": "grid",
    "#d3d6d9": "ghost",
    "#ffffff": "card",
}
# a line's colour on a dark page, where its own would be too dim
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


def inline(svg: str, name: str, alt: str, marks: Mapping[str, Mark]) -> str:
    """SVG as matplotlib writes it, for inside a page: named for a reader, with nothing that a strict policy forbids.

    Declarations become attributes (a policy without inline styles forbids the former); ids are made the figure's own
    by `figures.finish`.
    """
    body = svg[svg.index("<svg") :]
    body = re.sub(r' xmlns(:xlink)?="[^"]*"', "", body).replace("xlink:href=", "href=")
    body = re.sub(r"\s*<defs>\s*<style.*?</style>\s*</defs>", "", body, count=1, flags=re.DOTALL)
    body = STYLE_ATTRIBUTE.sub(lambda m: _attributes(m.group(1)), body)
    body = PAINT.sub(lambda m: f'{m.group(1)}="{themed(m.group(2))}"', body)
    body = re.sub(r"\n\s*", " ", body).replace("> <", "><")
    body = re.sub(rf'id="{re.escape(name)}-(mark\d+)"', lambda m: _marked(m.group(1), m.group(0), marks), body)
    title = f'<title id="{name}-title">{html.escape(alt, quote=False)}</title>'
    opened = f'<svg role="img" aria-labelledby="{name}-title" stroke-linejoin="round" stroke-linecap="butt" '
    return re.sub(r"<svg ([^>]*)>", lambda m: f"{opened}{m.group(1)}>{title}", body, count=1)


def themed(colour: str) -> str:
    """A colour as the page's variable, where it has one."""
    if colour in THEMED:
        return f"var(--{THEMED[colour]})"
    return f"var(--c{colour[1:]})" if colour in ON_DARK else colour


def colours(*, dark: bool) -> str:
    """The lines' colours as CSS variables."""
    return " ".join(f"--c{light[1:]}: {of_dark if dark else light};" for light, of_dark in ON_DARK.items())


def _attributes(declarations: str) -> str:
    found = []
    for declaration in declarations.split(";"):
        key, _, value = declaration.partition(":")
        if key.strip() not in ("", "font-family"):  # the page's own fonts
            found.append(f'{key.strip()}="{value.strip()}"')
    return "".join(f" {one}" for one in found)


def _marked(key: str, as_is: str, marks: Mapping[str, Mark]) -> str:
    if key not in marks:
        return as_is
    more = "".join(f' {k}="{html.escape(v)}"' for k, v in marks[key].attributes().items())
    return as_is + (' class="mark"' if marks[key].says else "") + more


WIDTH = 8.0  # inches, drawn 960 CSS pixels wide: 8.5 pt text is 14 pixels
PERCENT = FuncFormatter(lambda v, _: f"{100 * v:.0f}%")
INK, SOFT, FAINT, GRID, GHOST = "#1c1e21", "#5b6168", "#9aa0a6", "#e4e6e8", "#d3d6d9"
FONTS = "'DejaVu Sans', Verdana, 'Segoe UI', Helvetica, Arial, sans-serif"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.color": INK,
    "text.parse_math": False,  # a name may hold a dollar sign
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.fonttype": "none",  # words stay words: searchable, a tenth of the size
    "svg.hashsalt": "leeway",
    "pdf.fonttype": 42,  # TrueType: journals refuse Type 3
    "hatch.linewidth": 0.5,
}


@dataclass(frozen=True)
class Drawing:
    """A finished figure: file name, what it shows in words, and its bytes."""

    name: str
    title: str
    caption: str
    alt: str
    svg: str
    png: bytes
    pdf: bytes
    marks: dict[str, Mark] = field(default_factory=dict)

    @property
    def inline(self) -> str:
        """The SVG for inside an HTML page."""
        return inline(self.svg, self.name, self.alt, self.marks)


@contextmanager
def style() -> Iterator[None]:
    """Draw inside this, whatever the caller's own matplotlib settings are."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        yield


def finish(figure: Figure, name: str, title: str, caption: str, alt: str, marks: Marks | None = None) -> Drawing:
    """Render to SVG, PNG and PDF; the bytes hold no date and no random id."""
    svg, png, pdf = io.BytesIO(), io.BytesIO(), io.BytesIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(svg, format="svg", metadata=nothing)
    figure.savefig(png, format="png", dpi=150, metadata={"Software": None})
    figure.savefig(pdf, format="pdf", metadata=dict.fromkeys(("CreationDate", "Creator", "Producer")))
    drawn = _tidy(svg.getvalue().decode("utf-8"), name)
    return Drawing(name, title, caption, alt, drawn, png.getvalue(), pdf.getvalue(), marks.found if marks else {})


def marker(one: Series, *, small: bool = False) -> dict[str, Any]:
    """How a line's points look: filled under plain prompts, open under others."""
    return {
        "color": one.colour,
        "marker": one.marker,
        "markersize": 4.2 if small else 5.5,
        "markerfacecolor": one.colour if one.filled else "white",
        "markeredgecolor": "white" if one.filled else one.colour,
        "markeredgewidth": 0.5 if one.filled else 1.0,
    }


def head(ax: Axes, one: Series) -> None:
    """A panel's title: the line's marker in its colour, its name in ink (pale colours are no colours for words)."""
    figure = ax.figure
    where = ax.transAxes + ScaledTranslation(4 / 72, 9.5 / 72, figure.dpi_scale_trans)
    ax.add_artist(Line2D([0], [1], linestyle="", transform=where, clip_on=False, **marker(one)))
    ax.annotate(
        one.label,
        (0, 1),
        xytext=(12, 6),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=9.5,
        weight="bold",
        annotation_clip=False,
    )


def grid(
    panels: int,
    *,
    columns: int = 3,
    height: float = 2.3,
    top: float = 0.5,
    left: float = 0.085,
    bottom: float = 0.5,
) -> tuple[Figure, list[Axes]]:
    """Small multiples: `panels` axes of equal size; `top` and `bottom` inches are for legend and names."""
    columns = min(columns, max(panels, 1))
    lines = -(-panels // columns)
    total = lines * height + top
    figure = Figure(figsize=(WIDTH, total))
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    inside = total - top - 0.25 - bottom
    gap = 0.52  # inches between lines of panels: a title and a line of ticks
    hspace = gap * lines / max(inside - gap * (lines - 1), 0.1) if lines > 1 else 0.0
    figure.subplots_adjust(
        left=left, right=0.985, top=1 - (top + 0.25) / total, bottom=bottom / total, wspace=0.1, hspace=hspace
    )
    flat = [ax for line in axes for ax in line]
    for n, ax in enumerate(flat):
        ax.set_visible(n < panels)
        ax.tick_params(labelbottom=True)
    return figure, flat[:panels]


def _tidy(svg: str, name: str) -> str:
    """Ids of this figure's own (several stand in one page) and fonts that any machine has."""
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    return re.sub(r"'DejaVu Sans'(, sans-serif)?", FONTS, svg)
