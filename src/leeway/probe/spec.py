"""The `probe:` section of a study file, and the options of `leeway probe`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from leeway.errors import LeewayError
from leeway.yaml_config import ConfigModel, Tokens, Unique, read

Measure = Literal["geometry", "patching", "layers", "mediation", "persona", "depth", "weights"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
Harmless = Literal["auto", "organism", "alpaca", "jailbreakbench"]


class ProbeSpec(ConfigModel):
    """Which checkpoints are probed, by which measures, on which prompts."""

    measures: Annotated[tuple[Measure, ...], Field(min_length=1), Unique] = MEASURES
    objectives: Annotated[tuple[str, ...], Unique] = Field(default=(), description="default: all")
    budgets: Annotated[tuple[Tokens, ...], Unique] = Field(default=(), description="default: all")
    prompts: int = Field(
        default=64, ge=8, le=10_000, description="of each kind, to test on and to make directions from"
    )
    selection: int = Field(default=24, ge=8, le=1_000, description="of each kind, to choose the direction on")
    harmful: str | None = Field(default=None, description="a file of prompts; default: the study's own source")
    harmless: Harmless | str = Field(default="auto", description="organism, alpaca, jailbreakbench, or a file")
    attacks: tuple[str, ...] = Field(default=("none",), description="under which mediation answers are generated")
    mediation: int = Field(default=32, ge=8, le=10_000, description="prompts of mediation")
    reference: str = Field(default="sft", description="the objective that the others are contrasted with")
    states: bool = Field(default=False, description="keep both models' states of the test prompts, as safetensors")
    directions: str | None = Field(default=None, description="a directions file of the same base, instead of new ones")

    def absent(self, aliases: tuple[str, ...], budgets: tuple[int, ...]) -> Iterator[str]:
        """Yield the objectives and budgets that a study does not have."""
        for name in self.objectives:
            if name not in aliases:
                yield f"objectives: no objective {name!r} (there are: {', '.join(aliases)})"
        for budget in self.budgets:
            if budget not in budgets:
                yield f"budgets: no checkpoint at {budget:,} tokens (there are: {', '.join(f'{b:,}' for b in budgets)})"


def options_of(given: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """Return the options that were given, with `key=value` settings; raises LeewayError for one without a value."""
    options = {k: v for k, v in given.items() if v is not None}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise LeewayError(f"--set {setting}: no value", fix="write KEY=VALUE, such as --set mediation=64")
        options[key] = read(value, f"--set {key}")
    return options
