"""Generate the command-line page as Markdown from the commands themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

TOP = """\
# The command line

Generated from the commands when the site is built. A user's mistake is one line on stderr and exit code 2; a crash
exits 70. `-v` with any command adds the traceback. Ctrl-C exits 130, and the same command resumes.
"""


def page() -> str:
    """Return every command with its arguments and options, as in `--help`."""
    import typer

    from leeway.cli import app

    root = typer.main.get_command(app)
    return "\n".join([TOP, *(line for path, command in walk(root, "leeway") for line in _section(path, command))])


def walk(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield (full name, command) for every command that is not a group."""
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
    records = [record for p in command.params if p.name != "help" and (record := p.get_help_record(context))]
    if records:
        yield "| | |\n|---|---|"
        yield from (f"| `{_cell(option)}` | {_cell(description)} |" for option, description in records)
        yield ""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
