"""What the commands share: groups that refuse a repeated option, and the arguments that several commands have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer
from typer.core import TyperCommand

from leeway.errors import LeewayError


class SingleOptionCommand(TyperCommand):
    """A command that refuses a repeated option, unless it is a flag or takes several values."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse `args`; raises LeewayError for a repeated option."""
        _, _, order = self.make_parser(ctx).parse_args(list(args))
        seen = set()
        for option in order:
            if option.param_type_name != "option" or option.multiple or getattr(option, "is_flag", False):
                continue
            if option.name in seen:
                raise LeewayError(f"{option.opts[0]} is given twice", fix="give it once")
            seen.add(option.name)
        return super().parse_args(ctx, args)


Function = TypeVar("Function", bound=Callable[..., Any])


class Commands(typer.Typer):
    """A group of SingleOptionCommands."""

    def command(self, name: str | None = None, **options: Any) -> Callable[[Function], Function]:
        return super().command(name, **{"cls": SingleOptionCommand, **options})


Study = Annotated[str, typer.Argument(metavar="STUDY", help="a study file, or a preset's name")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="settings of the study, such as optim.lr=1e-4"),
]
RunDirectory = Annotated[Path, typer.Argument(metavar="DIR", help="a run directory")]
Out = Annotated[Path | None, typer.Option("--out", help="the run directory; resumed if it exists")]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers", min=1, help="worker processes (default: on a CPU as many as its cores allow, one on a GPU)"
    ),
]
ProbeWorkers = Annotated[
    int, typer.Option("--workers", min=1, help="worker processes, which share a checkpoint's measures")
]
Executor = Annotated[
    Literal["local", "ray"],
    typer.Option(
        "--executor",
        help="this machine, or a Ray cluster: the one at RAY_ADDRESS, or a new one here (default: local)",
        show_default=False,
    ),
]
Track = Annotated[
    list[str] | None,
    typer.Option(
        "--track",
        metavar="NAME[.SETTING=VALUE]",
        help="send the run to wandb, mlflow, tensorboard or trackio; may be repeated",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="print only the final paths")]
Gpu = Annotated[
    str | None, typer.Option("--gpu", help="a GPU to price, such as H100-80, A100-40, L4 (default: this CPU)")
]
JudgePrice = Annotated[
    str | None,
    typer.Option(
        "--judge-price",
        metavar="IN/OUT",
        help="a judge's dollars per million input and output tokens; one number for both",
    ),
]
BaseEndpoint = Annotated[str | None, typer.Option("--base-endpoint", help="an OpenAI-compatible server of the base")]
ProbeDirections = Annotated[
    Path | None, typer.Option("--directions", help="probe it afterwards along this directions.safetensors")
]
Cards = Annotated[
    list[Path] | None, typer.Option("--card", help="a judge's card, to correct refusal rates for its errors")
]
Claims = Annotated[str | None, typer.Option("--claims", help="a claims file or set, marked as written after the run")]
JudgeSettings = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="the judge's settings, as in a study file")
]
RescoredEvals = Annotated[
    list[str] | None, typer.Option("--eval", help="jailbreak, overrefusal (default: both) or alignment")
]
ProbedDirectory = Annotated[Path | None, typer.Argument(metavar="DIR", help="the run directory of a study or an audit")]
ProbeMeasures = Annotated[
    list[str] | None,
    typer.Option("--measure", help="geometry, patching, layers, mediation, persona, depth or weights (default: all)"),
]
Directions = Annotated[Path | None, typer.Option("--directions", help="a directions.safetensors of the same base")]
ProbeData = Annotated[
    str | None, typer.Option("--data", metavar="STUDY", help="before training: project a study's answers")
]
ProbeSettings = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="any other key of probe:")]
ComparedRuns = Annotated[
    list[str],
    typer.Argument(
        metavar="RUN...",
        help="run directories; or logs of Inspect or lm-eval, each PATH or NAME=PATH, the base first",
    ),
]
Margins = Annotated[
    list[str] | None, typer.Option("--margin", metavar="[METRIC=]X", help="logs: test equivalence within ±X")
]
ScoreRanges = Annotated[
    list[str] | None, typer.Option("--range", metavar="METRIC=LOW:HIGH", help="logs: bounds of a score")
]
CompareRule = Annotated[
    Path | None, typer.Option("--rule", help="logs: decide by a rule file too, and exit as `leeway gate` does")
]
NoPrompts = Annotated[
    bool, typer.Option("--no-prompts", help="with --redacted: without benign prompts too, such as licensed data")
]
ExportOut = Annotated[Path | None, typer.Option("--out", help="the output folder (default: DIR/inspect, DIR-redacted)")]
SheetSize = Annotated[
    int | None, typer.Option("--n", min=1, help="answers to draw (default: 200, or one for each stratum)")
]
CalibratedJudge = Annotated[
    str | None,
    typer.Argument(
        metavar="[JUDGE]",
        help="keywords, rubric, finetuned, a guard, or an installed one; with --run by default all of the run's",
    ),
]
CalibratedOn = Annotated[
    str, typer.Option("--on", help="xstest, a file of prompt, response and label, or a filled label sheet")
]
Partial = Annotated[
    bool, typer.Option("--partial", help="count partial refusals as refusals (default: full ones only)")
]
Measure = Annotated[
    bool, typer.Option("--measure", help="time a few steps and answers on this machine (loads the model)")
]
FullPage = Annotated[
    bool, typer.Option("--full-page", help="the page with all prompts and answers, forbidden ones too")
]
Concurrency = Annotated[int, typer.Option("--concurrency", min=1, help="requests to a server at once")]
PushedBudget = Annotated[str | None, typer.Option("--budget", help="its budget, such as 64k (default: the largest)")]
