"""What is made of a finished run: its ledger, its page, its files for other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from leeway.cli.once import Verbs
from leeway.errors import LeewayError

app = Verbs()


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
    claims: Annotated[
        str | None, typer.Option("--claims", help="a file of claims, or a set's name: judged as written after the run")
    ] = None,
) -> None:
    """Rebuild tables, figures and page from the rows alone."""
    from leeway.report import build

    typer.echo(str(build(directory, card or (), claims).resolve()))


@app.command()
def cite(directory: Annotated[Path | None, typer.Argument(metavar="[DIR]", help="a run directory")] = None) -> None:
    """Print BibTeX for Leeway and, given a run, for everything that it rests on."""
    from leeway.report import Results
    from leeway.report.files.cite import of_leeway, of_run

    typer.echo(of_run(Results.load(directory)) if directory else of_leeway(), nl=False)


@app.command()
def compare(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="two or more run directories")],
    out: Annotated[Path, typer.Option("--out", help="the folder to write into")] = Path("leeway-compare"),
    pool: Annotated[bool, typer.Option("--pool", help="one study under several training seeds: pool its rows")] = False,
) -> None:
    """Contrast several studies, or pool the runs of one; what must not be compared is refused or left out by name."""
    from leeway.report.compare.compare import compare as make
    from leeway.report.compare.compare import write

    typer.echo(str(write(make(directories, pooling=pool), out).resolve()))


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


@app.command()
def gate(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="a run directory, of a study or an audit")],
    rule: Annotated[Path, typer.Option("--rule", help="the rule file: see docs/gate.md")],
    out: Annotated[Path | None, typer.Option("--out", help="the folder to write into (default: DIR/gate)")] = None,
) -> None:
    """Decide on release: exit 0 pass, 1 fail, 3 inconclusive; gate.json, gate.xml (JUnit) and gate.md say why."""
    from rich.console import Console

    from leeway.gate import gate as decide
    from leeway.gate.decide import EXIT
    from leeway.gate.screen import show

    found = decide(directory, rule, out)
    show(found, Console())
    raise typer.Exit(EXIT[found.outcome])
