"""One style for all figures, and each figure as the same SVG, PNG and PDF bytes every time."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter
from matplotlib.transforms import ScaledTranslation

from leeway.report.inline import inline
from leeway.report.marks import Mark, Marks
from leeway.report.series import Series

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
