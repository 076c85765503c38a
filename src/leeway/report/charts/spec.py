"""Shared parts of the charts, which are Vega-Lite specifications.

Each chart is one JSON specification with its data inside. The page draws it with the vendored Vega, a notebook
with its own. Every datum carries `line` (key of objective and test prompt, which the page's filter uses), `point` (what
it is about) and `reading` (value, interval, n); tooltip and screen-reader label join the two. The parameters `lines`,
`budgets`, `attacks` and `budget` are set by the page's filter and its budget picker.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from leeway.report.plotting import Series, key_of
from leeway.stats.metrics import BASE

SCHEMA = "https://vega.github.io/schema/vega-lite/v5.json"
Spec = dict[str, Any]
Datum = dict[str, Any]
PANEL = 230  # pixels, least width of one of several panels
SHAPES = {  # of matplotlib's markers
    "o": "circle",
    "s": "square",
    "D": "diamond",
    "^": "triangle-up",
    "v": "triangle-down",
    "P": "cross",
    "X": "M-1,-.6L-.6,-1L0,-.4L.6,-1L1,-.6L.4,0L1,.6L.6,1L0,.4L-.6,1L-1,.6L-.4,0Z",
    "h": "M-.5,-.87L.5,-.87L1,0L.5,.87L-.5,.87L-1,0Z",
    "<": "triangle-left",
    ">": "triangle-right",
    "p": "M0,-1L.95,-.31L.59,.81L-.59,.81L-.95,-.31Z",
    "*": "M0,-1L.22,-.31L.95,-.31L.36,.12L.59,.81L0,.38L-.59,.81L-.36,.12L-.95,-.31L-.22,-.31Z",
    "d": "M0,-1L.6,0L0,1L-.6,0Z",
    "H": "M-.87,-.5L0,-1L.87,-.5L.87,.5L0,1L-.87,.5Z",
}
INK, CARD = "#1c1e21", "#ffffff"  # the page replaces them in the dark theme, as it does `plotting.ON_DARK`
QUANTITY, NOMINAL = "quantitative", "nominal"
PARENTHESES = r" \([^)]*\)"


@dataclass(frozen=True)
class Chart:
    """A chart: name, title, caption, a text alternative in one sentence, and its Vega-Lite specification."""

    name: str
    title: str
    caption: str
    alt: str
    spec: Spec = field(repr=False)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        """Show the chart in a notebook."""
        return {"application/vnd.vegalite.v5+json": self.spec, "text/plain": f"{self.title}. {self.alt}"}


def spec_of(
    name: str,
    title: str,
    caption: str,
    alt: str,
    data: list[Datum],
    body: Spec,
    *,
    key: str = "value",
    extremes_of: list[Datum] | None = None,
    **params: Any,
) -> Chart:
    """Return a chart with its data; `params` are the page's parameters that its filters name.

    `alt` says what is drawn; the text alternative goes on with the extremes of `key` in the data, or `extremes_of`.
    """
    found = [{"name": parameter, "value": value} for parameter, value in params.items()]
    alt = " ".join([alt, *extremes(data if extremes_of is None else extremes_of, key)])
    spec = {"$schema": SCHEMA, "description": alt, "data": {"values": data}, "params": found, **body}
    is_computed = body.get("usermeta", {}).get("computed", False)
    spec["transform"] = [*body.get("transform", ())] if is_computed else [LABEL, *body.get("transform", ())]
    return Chart(name, title, caption, alt, spec)


def extremes(data: list[Datum], key: str) -> list[str]:
    """Return, for each panel, the lowest and the highest of the lines' last points, and the base, as sentences."""
    last: dict[tuple[str, ...], Datum] = {}
    for d in data:
        if d.get(key) is not None and "point" in d:
            last[tuple(str(d.get(name, "")) for name in ("panel", "label", "attack"))] = d
    sentences = []
    for panel in dict.fromkeys(place[0] for place in last):
        drawn = [d for place, d in last.items() if place[0] == panel]
        lines = sorted((d for d in drawn if d.get("line") != ""), key=lambda d: float(d[key]))
        named = dict(zip(("Lowest", "Highest"), (lines[0], lines[-1]), strict=True)) if len(lines) > 1 else {}
        named |= {"Only": lines[0]} if len(lines) == 1 else {}
        base = [d for d in drawn if d.get("line") == ""]
        named |= {"For comparison": base[0]} if len(base) == 1 else {}
        sentences += [f"{what}: {d['point']}: {re.sub(PARENTHESES, '', d['reading'])}." for what, d in named.items()]
    return sentences


def flat(names: list[str], point: str, reading: str) -> list[Spec]:
    """Return transforms that make one datum of each place in the lists `names`, with expressions for its label.

    A chart that uses them has `usermeta.computed`: its points exist only once it is drawn.
    """
    made = {"point": point, "reading": reading}
    return [{"flatten": names}, *({"calculate": text, "as": name} for name, text in made.items()), LABEL]


def clean(value: float) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")


def line_keys(lines: list[Series]) -> list[str]:
    return [key_of(s.objective, s.condition) for s in lines]


def shown_by(*names: str) -> list[Spec]:
    """Return filters by the page's parameters: `lines`, `budgets`, `attacks` hold what is shown, `budget` one value."""
    tests = {
        "lines": "datum.line == '' || indexof(lines, datum.line) >= 0",
        "budgets": "datum.line == '' || datum.budget == -1 || indexof(budgets, datum.budget) >= 0",
        "attacks": "indexof(attacks, datum.attack) >= 0",
        "budget": "datum.budget == budget",
    }
    return [{"filter": tests[name]} for name in names]


def point_looks(lines: list[Series], *, base: bool = False) -> Spec:
    """Return the channels of a point by objective, the same in every chart: hollow unless under the plain prompt."""
    labels, colours = [s.label for s in lines], [s.colour for s in lines]
    fills = [s.colour if s.filled else CARD for s in lines]
    shapes = [SHAPES.get(s.marker, "circle") for s in lines]
    if base:
        labels, colours, fills, shapes = [*labels, BASE], [*colours, INK], [*fills, INK], [*shapes, SHAPES["*"]]
    ranges = {"stroke": colours, "fill": fills, "shape": shapes}
    return {c: _by_label(labels, values) | {"legend": {"title": None}} for c, values in ranges.items()}


def _by_label(labels: list[str], values: list[str]) -> Spec:
    return {"field": "label", "type": NOMINAL, "scale": {"domain": labels, "range": values}}


def line_colour(lines: list[Series], *, base: bool = False) -> Spec:
    """Return the colour of lines by objective, as in `point_looks`."""
    stroke: Spec = point_looks(lines, base=base)["stroke"]
    return stroke


RAW: Spec = {"field": "colour", "type": NOMINAL, "scale": None}  # of the datum
LABEL: Spec = {"calculate": "datum.point + ': ' + datum.reading", "as": "text"}
TIP: Spec = {"tooltip": {"field": "text"}, "description": {"field": "text"}}
TOGGLE: Spec = {"name": "on", "select": {"type": "point", "fields": ["label"]}, "bind": "legend"}
FADE: Spec = {"opacity": {"condition": {"param": "on", "value": 1}, "value": 0.08}}
