"""The rule file: which checkpoint is held against what, and how much worse it may be."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from leeway.errors import LeewayError
from leeway.faults import faults
from leeway.loader import read
from leeway.part import Part
from leeway.study.parts import tokens

ALL = "all"
BASE = "base"
LARGEST = "largest"
START = "write checkpoint, against and rules as docs/gate.md shows"

Worse = Literal["higher", "lower"]
Kind = Literal["margin", "at_least", "at_most"]


def _budget(value: Any) -> Any:
    """`largest`, `all`, or a number as a study's budgets are written."""
    if value in (LARGEST, ALL):
        return value
    found = tokens(value)
    if not isinstance(found, int) or found < 0:
        raise ValueError(f"give a number such as 400k, or {LARGEST}, not {value!r}")
    return found


Budget = Annotated[int | Literal["largest", "all"], BeforeValidator(_budget)]


class Which(Part):
    """The checkpoints that have to pass. Without an objective: the run's only one, as in an audit."""

    objective: str | None = None
    budget: Budget = "largest"
    condition: str = "plain"

    @model_validator(mode="before")
    @classmethod
    def _all(cls, value: Any) -> Any:
        return {"objective": ALL, "budget": ALL, "condition": ALL} if value == ALL else value


class Against(Part):
    """What they are compared with: the base, or an objective at a budget (without one: at the same)."""

    objective: str = BASE
    budget: Budget | None = None

    @model_validator(mode="before")
    @classmethod
    def _base(cls, value: Any) -> Any:
        return {"objective": BASE} if value == BASE else value

    @model_validator(mode="after")
    def _fits(self) -> Against:
        if self.objective == BASE and self.budget is not None:
            raise ValueError("the base has no budget; leave it out")
        if ALL in (self.objective, self.budget):
            raise ValueError("one checkpoint is compared with, not all")
        return self


class Rule(Part):
    """One measure's margin against the reference, or a bound on its own rate."""

    measure: str
    margin: float | None = None
    at_least: float | None = None
    at_most: float | None = None
    worse: Worse | None = Field(default=None, description="where the measure itself does not say")

    @field_validator("margin")
    @classmethod
    def _margin(cls, value: float | None) -> float | None:
        if value is not None and not -1 < value < 1:
            raise ValueError(f"{value:g} lies outside (-1, 1); two points are 0.02")
        return value

    @field_validator("at_least", "at_most")
    @classmethod
    def _bound(cls, value: float | None) -> float | None:
        if value is not None and not 0 < value < 1:
            raise ValueError(f"{value:g} lies outside (0, 1); sixty per cent are 0.6")
        return value

    @model_validator(mode="after")
    def _one_kind(self) -> Rule:
        given = [k for k in ("margin", "at_least", "at_most") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(f"{self.measure}: give one of margin, at_least, at_most, not {len(given)} of them")
        if self.worse and given != ["margin"]:
            raise ValueError(f"{self.measure}: {given[0]} says itself which way is worse; leave out worse")
        return self

    @property
    def kind(self) -> Kind:
        return "margin" if self.margin is not None else "at_least" if self.at_least is not None else "at_most"

    @property
    def bound(self) -> float:
        """The margin, or the bound on the rate."""
        found = getattr(self, self.kind)
        assert isinstance(found, float)
        return found


class Rules(Part):
    """A rule file."""

    checkpoint: Which = Field(default_factory=Which)
    against: Against = Field(default_factory=Against)
    level: float = Field(default=0.05, gt=0, lt=0.5)
    rules: tuple[Rule, ...]

    @field_validator("rules")
    @classmethod
    def _some_and_each_once(cls, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
        if not rules:
            raise ValueError("there is none; a gate without rules would pass anything")
        keys = [(r.measure, r.kind) for r in rules]
        if twice := sorted({k for k in keys if keys.count(k) > 1}):
            raise ValueError("\n".join(f"{measure} has two rules of kind {kind}" for measure, kind in twice))
        return rules


def load(path: Path) -> Rules:
    """A rule file, checked; all its faults in one LeewayError."""
    if not path.is_file():
        raise LeewayError(f"{path}: there is no such rule file", fix=START)
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise LeewayError(f"{path}: not UTF-8 text (byte {error.start})", fix="save it as UTF-8") from error
    raw = read(text, str(path))
    if raw is None:
        raise LeewayError(f"{path}: empty", fix=START)
    if not isinstance(raw, dict):
        raise LeewayError(f"{path}: holds {type(raw).__name__}, not a mapping", fix=START)
    try:
        return Rules.model_validate(raw)
    except ValidationError as error:
        raise LeewayError(f"{path}: " + "; ".join(faults(error, Rules))) from error
