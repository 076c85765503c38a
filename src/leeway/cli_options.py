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
