"""The command line. Each command parses its options and calls one function of the package."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shlex
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import typer
from typer.core import TyperCommand

from leeway.errors import LeewayError, first_line

INTERRUPTED = 130  # what shells report for a program ended by Ctrl-C
CLOSED_PIPE = 141  # and for one that writes into a pipe whose reader has gone, as `| head` does
CRASH = 70  # EX_SOFTWARE; 0, 1 and 3 are a gate's verdicts
STOPPED = "stopped; the same command carries on from here"


class SingleOptionCommand(TyperCommand):
    """A command that refuses an option given twice, unless it is a flag or takes several."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse as ever, after a look at what was named; raises LeewayError."""
        _, _, order = self.make_parser(ctx).parse_args(list(args))
        seen = set()
        for option in order:
            if option.param_type_name != "option" or option.multiple or getattr(option, "is_flag", False):
                continue
            if option.name in seen:
                raise LeewayError(f"{option.opts[0]} is given twice", fix="give it once")
            seen.add(option.name)
        return super().parse_args(ctx, args)


Command = TypeVar("Command", bound=Callable[..., Any])


class Commands(typer.Typer):
    """Commands, each of them a SingleOptionCommand."""

    def command(self, name: str | None = None, **more: Any) -> Callable[[Command], Command]:
        """As in Typer."""
        return super().command(name, **{"cls": SingleOptionCommand, **more})


app = Commands(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Measure how far fine-tuning pushes a chat model off course. Add -v to any command for a traceback.",
)


def main() -> None:
    """Run a command and exit with its code.

    A user's mistake is one line on stderr and exit code 2; any other exception is one line and 70; `-v` adds the
    traceback to either. A closed pipe on stdout is 141.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads that spin starve a busy machine
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an ASCII-only terminal must not raise UnicodeEncodeError
    verbose = any(a in ("-v", "--verbose") for a in sys.argv[1:])
    sys.argv[1:] = [a for a in sys.argv[1:] if a not in ("-v", "--verbose")]
    try:
        code = app(standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()  # at interpreter shutdown it would be too late to report a failure
    except KeyboardInterrupt:
        _fail(STOPPED, INTERRUPTED, verbose)
    except LeewayError as error:
        _fail(str(error), 2, verbose)
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # the command-line and terminal libraries exit 1 on it
            _leave(CLOSED_PIPE)
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, it must not exit 1
        if isinstance(error, BrokenPipeError) and _stdout_is_closed():
            _leave(CLOSED_PIPE)
        line = _mistake(error)
        if line is None:
            name, detail = type(error).__name__, first_line(error)
            named = name if detail == name else f"{name}: {detail}"
            _fail(f"internal error: {named}; add -v for the traceback", CRASH, verbose)
        _fail(line, 2, verbose)
    if code == INTERRUPTED:
        _fail(STOPPED, INTERRUPTED, verbose=False)
    sys.exit(code if isinstance(code, int) else 0)


def _stdout_is_closed() -> bool:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return True
    return False


def _leave(code: int) -> NoReturn:
    """Exit with `code` even where stdout or stderr cannot be flushed: the interpreter would exit 120 then."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


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


def _fail(line: str, code: int, verbose: bool) -> NoReturn:
    with contextlib.suppress(OSError):  # stderr may be a closed pipe too
        if verbose:
            traceback.print_exc()
        print(f"leeway: {line}", file=sys.stderr)
    _leave(code)


Study = Annotated[str, typer.Argument(metavar="STUDY", help="a study file, or a preset's name")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="settings of the study, such as optim.lr=1e-4"),
]
Out = Annotated[Path | None, typer.Option("--out", help="the run directory; carried on with if it exists")]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=1,
        help="how many work at once (default: on a CPU as many as there are cores for, one on a GPU)",
    ),
]
Executor = Annotated[
    Literal["local", "ray"],
    typer.Option(
        "--executor",
        help="this machine, or a Ray cluster: RAY_ADDRESS's, else one started here (default: local)",
        show_default=False,
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="print nothing but the final paths")]


@app.command()
def demo(out: Out = None, workers: Workers = None, quiet: Quiet = False) -> None:
    """Run the embedded study, on a CPU, without any download."""
    _run("demo", (), out or Path("leeway-demo"), workers, quiet)


@app.command()
def studies(name: Annotated[str | None, typer.Argument(help="print this preset")] = None) -> None:
    """List the presets, or print one to start a file from."""
    from leeway.study.load import PRESETS, preset_text

    if name:
        typer.echo(preset_text(name), nl=False)
        return
    for preset, what in PRESETS.items():
        typer.echo(f"{preset:18} {what}")


@app.command()
def plan(
    study: Study,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="a GPU to price it on, such as H100-80, A100-40, L4 (default: this CPU)")
    ] = None,
    mfu: Annotated[float | None, typer.Option("--mfu", help="the share of its peak rate that is reached")] = None,
    mbu: Annotated[float | None, typer.Option("--mbu", help="the share of its bandwidth that is reached")] = None,
    price: Annotated[float | None, typer.Option("--price", min=0, help="dollars for an hour of it")] = None,
    judge_price: Annotated[
        str | None,
        typer.Option(
            "--judge-price",
            metavar="IN/OUT",
            help="a judge's dollars per million tokens, read and written; one number for both",
        ),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="time some steps and answers on this machine: loads the model")
    ] = False,
    workers: Workers = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Say what a study takes: trajectories, exact tokens, hours, memory, dollars, disk; by formulas, or --measure."""
    from leeway.plan.plan import plan as make_plan
    from leeway.plan.plan import priced
    from leeway.study.load import load

    machine, prices = priced(gpu, mfu, mbu, price, judge_price)
    if gpu is not None and measure:
        raise LeewayError("--measure is of this machine, --gpu of another", fix="leave one of them out")
    if workers is not None and not measure:
        raise LeewayError("--workers is for what is measured", fix="add --measure")
    planned = make_plan(load(study, tuple(overrides or ())), machine, prices, measure=measure, workers=workers)
    typer.echo(json.dumps(planned.to_json(), indent=1) if as_json else planned.to_text())


@app.command()
def show(
    study: Study,
    overrides: Overrides = None,
    n: Annotated[int, typer.Option("-n", min=1, help="examples per objective")] = 1,
) -> None:
    """Print rendered training examples per objective, their targets marked: what is trained on."""
    from leeway.study.load import load
    from leeway.study.show import show as make_text

    typer.echo(make_text(load(study, tuple(overrides or ())), n))


@app.command()
def run(
    study: Study,
    overrides: Overrides = None,
    out: Out = None,
    workers: Workers = None,
    executor: Executor = "local",
    quiet: Quiet = False,
) -> None:
    """Run a study; the same command carries on where it stopped."""
    _run(study, tuple(overrides or ()), out, workers, quiet, executor)


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
    from leeway.audit import run as audits
    from leeway.audit.models import served, subjects
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


def _run(
    study: str,
    overrides: tuple[str, ...],
    out: Path | None,
    workers: int | None,
    quiet: bool,
    executor: Literal["local", "ray"] = "local",
) -> None:
    from leeway.study.load import load
    from leeway.study.progress import Reporter
    from leeway.study.run import run as carry_out

    spec = load(study, overrides)
    command = "leeway " + shlex.join(sys.argv[1:])
    page = carry_out(spec, out or Path("runs") / spec.name, Reporter(quiet=quiet), command, workers, executor)
    typer.echo(str(page.resolve()))


@app.command()
def ledger(directory: Annotated[Path, typer.Argument(metavar="DIR", help="a run directory")]) -> None:
    """Print what was matched over objectives and what each cost; exit 1 if anything differs."""
    from leeway.study.ledger_report import view

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
    from leeway.report.exports.model_card import of_leeway, of_run

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
    from leeway.integrations.inspect.export import export as write

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
    from leeway.gate.output import show

    found = decide(directory, rule, out)
    show(found, Console())
    raise typer.Exit(EXIT[found.outcome])


organism_app = Commands(no_args_is_help=True, help="The embedded micro chat model: rebuild it, measure it.")
app.add_typer(organism_app, name="organism")
judge_app = Commands(no_args_is_help=True, help="Who scores answers: hold a judge against labels that people made.")
app.add_typer(judge_app, name="judge")


@app.command()
def attacks(
    name: Annotated[str | None, typer.Argument(help="show what this attack sends")] = None,
    templates: Annotated[Path | None, typer.Option("--templates", help="a file of your own attacks")] = None,
) -> None:
    """List the attacks with version, hash and origin, or show what one of them sends for a harmless placeholder."""
    from leeway.attacks.registry import listed, shown

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
    from leeway.study.judge_calibration import calibrated

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
