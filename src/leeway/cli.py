"""The command line: verbs only, each a call or two into the rooms below."""

from __future__ import annotations

import errno
import json
import os
import shlex
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from leeway.errors import LeewayError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Measure how far fine-tuning pushes a chat model off course. Add -v to any command for a traceback.",
)
organism_app = typer.Typer(no_args_is_help=True, help="The embedded micro chat model: rebuild it, measure it.")
app.add_typer(organism_app, name="organism")
judge_app = typer.Typer(no_args_is_help=True, help="Who scores answers: hold a judge against labels that people made.")
app.add_typer(judge_app, name="judge")

Study = Annotated[str, typer.Argument(metavar="STUDY", help="a study file, or a preset's name")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="settings of the study, such as optim.lr=1e-4"),
]
Out = Annotated[Path | None, typer.Option("--out", help="the run directory; carried on with if it exists")]
Workers = Annotated[
    int | None,
    typer.Option("--workers", min=1, help="processes on this machine (default: one per core on a CPU)"),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="print nothing but the final paths")]


@app.command()
def demo(out: Out = None, workers: Workers = None, quiet: Quiet = False) -> None:
    """Run the embedded study, on a CPU, without any download."""
    _run("demo", (), out or Path("leeway-demo"), workers, quiet)


@app.command()
def studies(name: Annotated[str | None, typer.Argument(help="print this preset")] = None) -> None:
    """List the presets, or print one to start a file from."""
    from leeway.study.presets import PRESETS, preset_text

    if name:
        typer.echo(preset_text(name), nl=False)
        return
    for preset, what in PRESETS.items():
        typer.echo(f"{preset:12} {what}")


@app.command()
def plan(
    study: Study,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Say what a study takes: trajectories, exact tokens, estimated hours, memory, disk. Touches no GPU."""
    from leeway.study.parse import load
    from leeway.study.plan import plan as make_plan

    planned = make_plan(load(study, tuple(overrides or ())))
    typer.echo(json.dumps(planned.to_json(), indent=1) if as_json else planned.to_text())


@app.command()
def show(
    study: Study,
    overrides: Overrides = None,
    n: Annotated[int, typer.Option("-n", min=1, help="examples per objective")] = 1,
) -> None:
    """Print rendered training examples per objective, their targets marked: what is trained on."""
    from leeway.study.parse import load
    from leeway.study.show import show as make_text

    typer.echo(make_text(load(study, tuple(overrides or ())), n))


@app.command()
def run(
    study: Study, overrides: Overrides = None, out: Out = None, workers: Workers = None, quiet: Quiet = False
) -> None:
    """Run a study; the same command carries on where it stopped."""
    _run(study, tuple(overrides or ()), out, workers, quiet)


@app.command()
def audit(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="the fine-tuned model, or the base")] = None,
    overrides: Overrides = None,
    base: Annotated[str | None, typer.Option("--base", help="what it is compared with: a folder or hub id")] = None,
    adapter: Annotated[Path | None, typer.Option("--adapter", help="a PEFT folder on MODEL or --base")] = None,
    name: Annotated[str | None, typer.Option("--name", help="its name on rows and page")] = None,
    study: Annotated[str | None, typer.Option("--study", help="a study file or preset: its evals are asked")] = None,
    endpoint: Annotated[str | None, typer.Option("--endpoint", help="an OpenAI-compatible server of MODEL")] = None,
    base_endpoint: Annotated[str | None, typer.Option("--base-endpoint", help="and one of the base")] = None,
    key_env: Annotated[str | None, typer.Option("--key-env", help="the variable that holds the server's key")] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=0, help="that it was trained on, where known")] = 0,
    own_template: Annotated[bool, typer.Option("--own-template", help="ask each under its own template")] = False,
    other_base: Annotated[bool, typer.Option("--other-base", help="use a base the adapter does not name")] = False,
    out: Out = None,
    quiet: Quiet = False,
) -> None:
    """Measure a model that was trained elsewhere against its base; the same command carries on."""
    from leeway.study import audit as audits
    from leeway.study.audit_spec import served, subjects
    from leeway.study.progress import Reporter

    settings = list(overrides or ())
    if model is not None and "=" in model and not Path(model).exists():
        settings, model = [model, *settings], None  # no MODEL was given: what stands there is a setting
    if endpoint or base_endpoint:
        compared = served(model, base, endpoint, base_endpoint, key_env)
    else:
        compared = subjects(model, base, adapter, other_base=other_base)
    one = audits.checked(*compared, study, settings, name=name, tokens=tokens, own_template=own_template)
    command = "leeway " + shlex.join(sys.argv[1:])
    page = audits.run(one, out or Path("runs") / f"audit-{one.name}", Reporter(quiet=quiet), command)
    typer.echo(str(page.resolve()))


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


def _run(study: str, overrides: tuple[str, ...], out: Path | None, workers: int | None, quiet: bool) -> None:
    from leeway.study.parse import load
    from leeway.study.progress import Reporter
    from leeway.study.run import run as carry_out

    spec = load(study, overrides)
    command = "leeway " + shlex.join(sys.argv[1:])
    page = carry_out(spec, out or Path("runs") / spec.name, Reporter(quiet=quiet), command, workers)
    typer.echo(str(page.resolve()))


INTERRUPTED = 130  # what shells say of a program ended by Ctrl-C
STOPPED = "stopped; the same command carries on from here"


def main() -> None:
    """Run a command: a user's mistake is one line on stderr and exit code 2; `-v` shows where it came from."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads that spin starve a busy machine
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    verbose = any(a in ("-v", "--verbose") for a in sys.argv[1:])
    sys.argv[1:] = [a for a in sys.argv[1:] if a not in ("-v", "--verbose")]
    try:
        code = app(standalone_mode=False)
    except KeyboardInterrupt:
        _fail(STOPPED, INTERRUPTED, verbose)
    except LeewayError as error:
        _fail(str(error), 2, verbose)
    except Exception as error:
        line = _mistake(error)
        if line is None:
            raise
        _fail(line, 2, verbose)
    if code == INTERRUPTED:
        _fail(STOPPED, INTERRUPTED, verbose=False)
    sys.exit(code if isinstance(code, int) else 0)


def _mistake(error: Exception) -> str | None:
    """One line for what a user can mend and other libraries raise: a usage error, a full disk, a folder of others."""
    if hasattr(error, "format_message"):  # the command-line library's own
        said = error.format_message().replace("\n", " ")
        return f"{said} (see `leeway --help`)" if said else "name a command (see `leeway --help`)"
    code = error.errno if isinstance(error, OSError) else None
    full = any(sign in str(error) for sign in ("No space left", "StorageFull"))  # writers in Rust raise their own kind
    if full or code in (errno.ENOSPC, errno.EDQUOT):
        return "no disk space left for the output folder; free some and run the same command again: it carries on"
    if code in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG):
        where = getattr(error, "filename", None) or "the output folder"
        return f"{where}: may not be written; give another --out"
    return None


def _fail(line: str, code: int, verbose: bool) -> None:
    if verbose:
        traceback.print_exc()
    print(f"leeway: {line}", file=sys.stderr)
    sys.exit(code)
