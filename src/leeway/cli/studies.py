"""What a study is and takes, and carrying it out; and the same questions for models trained elsewhere."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from leeway.cli.once import Verbs
from leeway.errors import LeewayError

app = Verbs()
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
    from leeway.study.presets import PRESETS, preset_text

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
    from leeway.study.parse import load
    from leeway.study.plan import plan as make_plan
    from leeway.study.plan import priced

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
    from leeway.study.parse import load
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


def _run(
    study: str,
    overrides: tuple[str, ...],
    out: Path | None,
    workers: int | None,
    quiet: bool,
    executor: Literal["local", "ray"] = "local",
) -> None:
    from leeway.study.parse import load
    from leeway.study.progress import Reporter
    from leeway.study.run import run as carry_out

    spec = load(study, overrides)
    command = "leeway " + shlex.join(sys.argv[1:])
    page = carry_out(spec, out or Path("runs") / spec.name, Reporter(quiet=quiet), command, workers, executor)
    typer.echo(str(page.resolve()))
