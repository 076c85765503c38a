"""mkdocs hooks: generate the command-line page, entries for public names, and styles for highlighted code."""

from __future__ import annotations

import importlib
import re
import sys
from inspect import isclass, isfunction
from pathlib import Path
from types import ModuleType
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pygments.formatters import HtmlFormatter

sys.path.insert(0, str(Path(__file__).parent))  # mkdocs loads a hook by its path

from commands import page

DEMO = "demo-report.html"
FRAME = """This is the page of the demo, as `make demo` wrote it here. [Open it alone]({page}).

<iframe src="{page}" title="Report of the demo" style="width:100%;height:48rem;border:0"></iframe>
"""
NO_DEMO = "This site was built without it: `make demo`, then `make docs`, puts the demo's page here.\n"
EXTRA = ".highlight pre { padding: .6rem .8rem; overflow-x: auto } .filename { font-weight: 600; display: block }\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add `cli.md`, the styles, the page of the published study and, where it was run, the demo's.

    They exist only in the build.
    """
    files.append(File.generated(config, "cli.md", content=page()))
    files.append(File.generated(config, "assets/code.css", content=code_styles()))
    report = Path(config.config_file_path).parent / "examples" / "smollm2" / "report.html"
    files.append(File.generated(config, "smollm2-report.html", abs_src_path=str(report)))
    demo = Path(config.config_file_path).parent / "leeway-demo" / "report.html"
    if demo.is_file():
        files.append(File.generated(config, DEMO, abs_src_path=str(demo)))
    return files


def on_page_markdown(markdown: str, files: Files, **_: Any) -> str:
    """Replace `<!-- demo -->` with the demo's page, `<!-- names: package -->` with its public names."""
    frame = FRAME.format(page=DEMO) if files.get_file_from_path(DEMO) else NO_DEMO
    markdown = markdown.replace("<!-- demo -->\n", frame)
    return re.sub(r"^<!-- names: ([\w.]+) -->$", lambda m: names(m[1]), markdown, flags=re.M)


def names(package: str) -> str:
    """Return entries by the module that defines each name (a function may share its module's name)."""
    public = importlib.import_module(package)
    entries = []
    for name in public.__all__:
        thing = getattr(public, name)
        if isinstance(thing, ModuleType):
            entries.append(f"::: {thing.__name__}\n    options: {{members: [loss]}}\n")
        elif (isclass(thing) or isfunction(thing)) and thing.__module__ != package:
            entries.append(f"::: {thing.__module__}.{thing.__name__}\n")
        elif not (isfunction(thing) or name.isupper()):  # a type alias
            entries.append(f"::: {package}.{name}\n")
    return "\n".join(entries)


def code_styles() -> str:
    """Return the CSS of highlighted code for the light and the dark page."""
    light = HtmlFormatter(style="default").get_style_defs(".highlight")
    dark = HtmlFormatter(style="github-dark").get_style_defs("[data-bs-theme=dark] .highlight")
    return f"{light}\n{dark}\n{EXTRA}"
