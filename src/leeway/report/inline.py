"""A figure's SVG inside the page: no styles of its own, colours that follow the theme, marks with their words."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping

from leeway.report.marks import Mark

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
STYLE = re.compile(r' style="([^"]*)"')
PAINT = re.compile(r'(?<= )(fill|stroke)="(#[0-9a-f]{6})"')


def inline(svg: str, name: str, alt: str, marks: Mapping[str, Mark]) -> str:
    """SVG as matplotlib writes it, for inside a page: named for a reader, with nothing that a strict policy forbids.

    Declarations become attributes (a policy without inline styles forbids the former); ids are made the figure's own
    by `figures.finish`.
    """
    body = svg[svg.index("<svg") :]
    body = re.sub(r' xmlns(:xlink)?="[^"]*"', "", body).replace("xlink:href=", "href=")
    body = re.sub(r"\s*<defs>\s*<style.*?</style>\s*</defs>", "", body, count=1, flags=re.DOTALL)
    body = STYLE.sub(lambda m: _attributes(m.group(1)), body)
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
