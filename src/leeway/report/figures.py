"""One style for all figures, and each figure as the same SVG and PNG bytes every time."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib as mpl

mpl.use("Agg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

WIDTH = 8.0  # inches, drawn 960 CSS pixels wide: 8.5 pt text is 14 pixels
PERCENT = FuncFormatter(lambda v, _: f"{100 * v:.0f}%")
INK, FAINT, GRID = "#1c1e21", "#9aa0a6", "#e4e6e8"
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

    @property
    def inline(self) -> str:
        """The SVG for inside an HTML page: no prolog, no namespaces, ids of its own, named for a reader."""
        body = self.svg[self.svg.index("<svg") :]
        body = re.sub(r' xmlns(:xlink)?="[^"]*"', "", body)
        body = body.replace("xlink:href=", "href=")
        title = f'<title id="{self.name}-title">{_escape(self.alt)}</title>'
        opened = f'<svg role="img" aria-labelledby="{self.name}-title" '
        return re.sub(r"<svg ([^>]*)>", lambda m: f"{opened}{m.group(1)}>{title}", body, count=1)


@contextmanager
def style() -> Iterator[None]:
    """Draw inside this, whatever the caller's own matplotlib settings are."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        yield


def finish(figure: Figure, name: str, title: str, caption: str, alt: str) -> Drawing:
    """Render to SVG and PNG; the bytes hold no date and no random id."""
    svg, png = io.BytesIO(), io.BytesIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(svg, format="svg", metadata=nothing)
    figure.savefig(png, format="png", dpi=150, metadata={"Software": None})
    return Drawing(name, title, caption, alt, _tidy(svg.getvalue().decode("utf-8"), name), png.getvalue())


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


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
