"""The rule file: which checkpoint is held against what, and how much worse it may be.

A rule file held against a run: which checkpoints it means, and in which direction each measure gets worse.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from leeway.errors import LeewayError
from leeway.report import formatting
from leeway.yaml_config import ConfigModel, faults, nearest, read, tokens

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


class Which(ConfigModel):
    """The checkpoints that have to pass. Without an objective: the run's only one, as in an audit."""

    objective: str | None = None
    budget: Budget = "largest"
    condition: str = "plain"

    @model_validator(mode="before")
    @classmethod
    def _all(cls, value: Any) -> Any:
        return {"objective": ALL, "budget": ALL, "condition": ALL} if value == ALL else value


class Against(ConfigModel):
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


class Rule(ConfigModel):
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


class Rules(ConfigModel):
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


KEY = ["objective", "budget", "condition"]
AT_LEAST_WORSE: Worse = "lower"
AT_MOST_WORSE: Worse = "higher"


@dataclass(frozen=True, order=True)
class Place:
    """One checkpoint under one test-time prompt."""

    objective: str
    budget: int
    condition: str

    @property
    def name(self) -> str:
        """For messages: `sft at 400k, plain`."""
        return f"{self.objective} at {formatting.format_budget(self.budget)}, {self.condition}"


@dataclass(frozen=True)
class Task:
    """What the gate has to decide, all of it known to be in the run."""

    places: tuple[Place, ...]
    against: tuple[str, int | None] | None  # as `stats.contrasts` takes it; nothing: the base
    rules: tuple[tuple[Rule, Worse], ...]
    level: float


def resolve(rules: Rules, rates: pd.DataFrame, where: str) -> Task:
    """The task that a rule file sets for the run with these rates; all that does not fit in one LeewayError."""
    faults: list[str] = []
    there = [Place(str(o), int(b), str(c)) for o, b, c in rates[KEY].drop_duplicates().itertuples(index=False)]
    tuned = sorted(p for p in there if p.objective != BASE)
    if not tuned:
        raise LeewayError(f"{where}: the run holds the base alone", fix="run or audit a checkpoint")
    against = _against(rules, tuned, faults)
    places = _places(rules, tuned, faults)
    directed = tuple(_direction(rule, rates, faults) for rule in rules.rules)
    if against is not None and not faults:
        places = [p for p in places if (p.objective, p.budget) != (against[0], against[1] or p.budget)]
        if not places:
            faults.append("against: it is the checkpoint itself; name another one, or base")
    if faults:
        raise LeewayError(f"{where}: " + "; ".join(faults))
    return Task(tuple(places), against, directed, rules.level)


def _against(rules: Rules, tuned: list[Place], faults: list[str]) -> tuple[str, int | None] | None:
    wanted = rules.against
    if wanted.objective == BASE:
        return None
    budgets = _budgets(wanted.objective, tuned, "against.objective", faults)
    if not budgets or wanted.budget is None:
        return (wanted.objective, None)
    return (wanted.objective, _resolve_budget(wanted.budget, budgets, f"against.budget: {wanted.objective}", faults))


def _budgets(objective: str, tuned: list[Place], where: str, faults: list[str]) -> list[int]:
    """The budgets at which an objective was measured; none and a fault where it was not."""
    found = sorted({p.budget for p in tuned if p.objective == objective})
    if not found:
        known = sorted({p.objective for p in tuned})
        faults.append(f"{where}: {_unknown(objective, known, 'objective')}")
    return found


def _resolve_budget(wanted: int | str, budgets: list[int], where: str, faults: list[str]) -> int:
    if wanted == LARGEST:
        return budgets[-1]
    if wanted not in budgets:
        told = ", ".join(map(formatting.format_budget, budgets))
        closest = min(budgets, key=lambda b: (abs(b - int(wanted)), b))
        faults.append(f"{where} has {told}, not {wanted}; did you mean {formatting.format_budget(closest)}?")
    return int(wanted)


def _places(rules: Rules, tuned: list[Place], faults: list[str]) -> list[Place]:
    """Every checkpoint that the file asks about."""
    wanted, known = rules.checkpoint, list(dict.fromkeys(p.objective for p in tuned))
    if wanted.objective is None and len(known) > 1:
        faults.append(f"checkpoint.objective is missing: name one of {', '.join(known)}, or {ALL}")
        return []
    if wanted.objective == BASE:
        faults.append("checkpoint.objective: the base is what others are compared with; name a trained objective")
        return []
    chosen = known if wanted.objective in (None, ALL) else [str(wanted.objective)]
    found = []
    for objective in chosen:
        budgets = _budgets(objective, tuned, "checkpoint.objective", faults)
        if not budgets:
            continue
        if wanted.budget == ALL:
            at = budgets
        else:
            at = [_resolve_budget(wanted.budget, budgets, f"checkpoint.budget: {objective}", faults)]
        found += _under(wanted.condition, [p for p in tuned if p.objective == objective and p.budget in at], faults)
    return found


def _under(condition: str, places: list[Place], faults: list[str]) -> list[Place]:
    if condition == ALL or not places:
        return places
    found = [p for p in places if p.condition == condition]
    if not found:
        known = sorted({p.condition for p in places})
        faults.append(f"checkpoint.condition: {places[0].objective}: {_unknown(condition, known, 'condition')}")
    return found


def _direction(rule: Rule, rates: pd.DataFrame, faults: list[str]) -> tuple[Rule, Worse]:
    """Which way the measure gets worse: as it says itself, or as the rule says where it does not."""
    known = list(dict.fromkeys(rates["measure"]))
    if rule.kind != "margin":
        worse = AT_LEAST_WORSE if rule.kind == "at_least" else AT_MOST_WORSE
    else:
        worse = rule.worse or AT_MOST_WORSE
    if rule.measure not in known:
        faults.append(f"{rule.measure}: {_unknown(rule.measure, known, 'measure')}")
        return rule, worse
    better = str(rates.loc[rates["measure"] == rule.measure, "better"].iloc[0])
    if rule.kind == "margin" and better:
        own: Worse = "lower" if better == "higher" else "higher"
        if rule.worse not in (None, own):
            faults.append(f"{rule.measure}: {own} is worse, and the rule says {rule.worse}; leave out worse")
        return rule, own
    if rule.kind == "margin" and rule.worse is None:
        faults.append(f"{rule.measure}: neither direction is worse in itself; add worse: higher, or worse: lower")
    return rule, worse


def _unknown(word: str, known: list[str], kind: str) -> str:
    return f"the run has no {kind} {word!r}{nearest(word, known)} (it has {', '.join(known)})"
