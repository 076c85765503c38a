"""The command line as a page of Markdown, read from the commands themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

TOP = """\
# The command line

Made from the commands when this page is built. A user's mistake is one line on stderr and exit code 2; `-v` beside any
command shows where it came from. Ctrl-C ends with 130, and the same command carries on.
"""


def page() -> str:
    """Every command with its arguments and options, as `--help` has them."""
    import typer

    from leeway.cli import app

    root = typer.main.get_command(app)
    return "\n".join([TOP, *(line for path, command in walk(root, "leeway") for line in _section(path, command))])


def walk(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    """(how it is called, the command) of every command that does something, groups opened."""
    for name, child in getattr(command, "commands", {}).items():
        if hasattr(child, "commands"):
            yield from walk(child, f"{path} {name}")
        else:
            yield f"{path} {name}", child


def _section(path: str, command: Any) -> Iterator[str]:
    context = command.context_class(command, info_name=path)
    named = [(p.metavar or p.name, p) for p in command.params if p.param_type_name == "argument"]
    usage = " ".join(["[OPTIONS]", *(n if p.required or n.startswith("[") else f"[{n.upper()}]" for n, p in named)])
    yield f"## {path}\n"
    yield f"{' '.join((command.help or '').split())}\n"
    yield f"```text\n{path} {usage}\n```\n"
    told = [said for p in command.params if p.name != "help" and (said := p.get_help_record(context))]
    if told:
        yield "| | |\n|---|---|"
        yield from (f"| `{_cell(said[0])}` | {_cell(said[1])} |" for said in told)
        yield ""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
