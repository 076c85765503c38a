"""The page itself: its templates over what they are given."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from leeway.report import inline, wording
from leeway.report.marks import key_of
from leeway.report.page.context import CONTENTS, PARTIALS


def page(shown_in: dict[str, Any]) -> str:
    """One file that works offline, from everything that its templates are given (`context`)."""
    environment = Environment(
        loader=PackageLoader("leeway.report.page", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    said = (wording.name, wording.attack, wording.percent, wording.points, wording.plain_points, wording.count)
    for words in (*said, wording.remark):
        environment.filters[words.__name__] = words
    environment.filters |= {"p": wording.p_value, "budget": shown_in["scale"].tick}
    environment.filters |= {"line_key": key_of, "themed": inline.themed, "effect": wording.effect}
    partials = [f"{name}.html.j2" for name in PARTIALS]
    body = environment.get_template("page.html.j2")
    shown = "".join(environment.get_template(p).render(shown_in) for p in partials)
    contents = [(key, title) for key, title in CONTENTS.items() if f'<section id="{key}"' in shown]
    return body.render(shown_in, evidence=Markup(shown), contents=contents)
