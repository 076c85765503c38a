"""What mkdocs asks while it builds: the command line's page, the public names of a package, the colours of code."""

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

sys.path.insert(0, str(Path(__file__).parent))  # a hook is loaded by its path

from commands import page

EXTRA = ".highlight pre { padding: .6rem .8rem; overflow-x: auto } .filename { font-weight: 600; display: block }\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """`cli.md` is nobody's file: it cannot fall behind the commands."""
    files.append(File.generated(config, "cli.md", content=page()))
    files.append(File.generated(config, "assets/code.css", content=colours()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """`<!-- names: package -->` becomes an entry for everything that the package says is public."""
    return re.sub(r"^<!-- names: ([\w.]+) -->$", lambda m: names(m[1]), markdown, flags=re.M)


def names(package: str) -> str:
    """By the place where each is written: some functions share a name with their file, and modules show their loss."""
    public = importlib.import_module(package)
    found = []
    for name in public.__all__:
        thing = getattr(public, name)
        if isinstance(thing, ModuleType):
            found.append(f"::: {thing.__name__}\n    options: {{members: [loss]}}\n")
        elif (isclass(thing) or isfunction(thing)) and thing.__module__ != package:
            found.append(f"::: {thing.__module__}.{thing.__name__}\n")
        elif not (isfunction(thing) or name.isupper()):  # the name of a type
            found.append(f"::: {package}.{name}\n")
    return "\n".join(found)


def colours() -> str:
    """Styles of highlighted code for the light and the dark page."""
    light = HtmlFormatter(style="default").get_style_defs(".highlight")
    dark = HtmlFormatter(style="github-dark").get_style_defs("[data-bs-theme=dark] .highlight")
    return f"{light}\n{dark}\n{EXTRA}"
