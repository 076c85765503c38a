"""What is made of a finished run: its ledger, its page, its files for other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from leeway.errors import LeewayError

app = typer.Typer()


@app.command()
def ledger(directory: Annotated[Path, typer.Argument(metavar="DIR", help="a run directory")]) -> None:
    """Print what was matched over objectives and what each cost; exit 1 if anything differs."""
    from leeway.study.ledger_view import view

    found = view(directory)
    typer.echo(found.text)
    raise typer.Exit(1 if found.faults else 0)


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="a run directory")],
    card: Annotated[
        list[Path] | None, typer.Option("--card", help="a judge's card: refusal rates corrected for its errors too")
    ] = None,
) -> None:
    """Rebuild tables, figures and page from the rows alone."""
    from leeway.report import build

    typer.echo(str(build(directory, card or ()).resolve()))


@app.command()
def export(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="a run directory")],
    inspect: Annotated[bool, typer.Option("--inspect", help="as logs of Inspect, one per checkpoint and eval")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="the folder to write into (default: DIR/inspect)")] = None,
) -> None:
    """Write a finished run in another tool's format."""
    if not inspect:
        raise LeewayError("export: no format named", fix="add --inspect")
    from leeway.inspect.export import export as write

    typer.echo(str(write(directory, out)[0].parent.resolve()))
