"""Commands whose options may stand once: of two values the command line would take the last and say nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import typer
from typer.core import TyperCommand

from leeway.errors import LeewayError


class Once(TyperCommand):
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


Verb = TypeVar("Verb", bound=Callable[..., Any])


class Verbs(typer.Typer):
    """Commands, each of them `Once`."""

    def command(self, name: str | None = None, **more: Any) -> Callable[[Verb], Verb]:
        """As in Typer."""
        return super().command(name, **{"cls": Once, **more})
