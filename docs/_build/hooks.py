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

EXTRA = ".highlight pre { padding: .6rem .8rem; overflow-x: auto } .filename { font-weight: 600; display: block }\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add `cli.md`, the styles and the page of the published study, which exist only in the build."""
    files.append(File.generated(config, "cli.md", content=page()))
    files.append(File.generated(config, "assets/code.css", content=code_styles()))
    report = Path(config.config_file_path).parent / "examples" / "smollm2" / "report.html"
    files.append(File.generated(config, "smollm2-report.html", abs_src_path=str(report)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace `<!-- names: package -->` with an entry for every public name of the package."""
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
