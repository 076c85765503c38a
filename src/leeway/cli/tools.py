"""Attacks, judges and the organism by themselves."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from leeway.cli.once import Verbs

app = Verbs()
organism_app = Verbs(no_args_is_help=True, help="The embedded micro chat model: rebuild it, measure it.")
app.add_typer(organism_app, name="organism")
judge_app = Verbs(no_args_is_help=True, help="Who scores answers: hold a judge against labels that people made.")
app.add_typer(judge_app, name="judge")


@app.command()
def attacks(
    name: Annotated[str | None, typer.Argument(help="show what this attack sends")] = None,
    templates: Annotated[Path | None, typer.Option("--templates", help="a file of your own attacks")] = None,
) -> None:
    """List the attacks with version, hash and origin, or show what one of them sends for a harmless placeholder."""
    from leeway.attacks.listing import listed, shown

    typer.echo(shown(name, templates) if name else listed(templates))


@judge_app.command("calibrate")
def judge_calibrate(
    judge: Annotated[str, typer.Argument(metavar="JUDGE", help="keywords, rubric, finetuned, or an installed one")],
    on: Annotated[str, typer.Option("--on", help="xstest, or a file of prompt, response and label")] = "xstest",
    model: Annotated[str | None, typer.Option("--model", help="who is asked: a folder, a hub id or an API's")] = None,
    endpoint: Annotated[str | None, typer.Option("--endpoint", help="an OpenAI-compatible address for --model")] = None,
    key_env: Annotated[str, typer.Option("--key-env", help="the variable that holds its key")] = "OPENAI_API_KEY",
    out: Annotated[Path, typer.Option("--out", help="where the card is kept")] = Path("judges"),
) -> None:
    """Measure a judge's agreement with people, and keep it as the judge's card."""
    from leeway.study.calibration import calibrated

    text, card = calibrated(judge, on, model, endpoint, key_env, out)
    typer.echo(text)
    typer.echo(str(card.resolve()))


@organism_app.command("build")
def organism_build(
    out: Annotated[Path, typer.Option("--out", help="the folder to write the model into")],
) -> None:
    """Train the organism from nothing on this machine's CPU (minutes) and measure its card."""
    from leeway.organism.recipe import build

    build(out, lambda line: print(line, file=sys.stderr, flush=True))
    typer.echo(str(out.resolve()))


@organism_app.command("card")
def organism_card(
    model: Annotated[str, typer.Argument(help="the model's folder")] = "organism",
) -> None:
    """Measure the organism on held-out items and print its card as JSON."""
    from leeway.model.load import resolve
    from leeway.organism.card import measure

    typer.echo(json.dumps(measure(Path(resolve(model))), indent=1))
