"""The rule file, its resolution against a run's checkpoints, and the outcome of each rule: pass, fail, inconclusive."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from pydantic import BeforeValidator, Field, ValidationError, ValidationInfo, field_validator, model_validator

from leeway.errors import LeewayError
from leeway.io import read_utf8
from leeway.report import formatting
from leeway.stats import ContrastReference, WorseDirection
from leeway.stats.contrasts import holm
from leeway.stats.intervals import NAN
from leeway.stats.metrics import BASE, LOG_ODDS, POOLED_CHECKPOINT
from leeway.yaml_config import ConfigModel, faults, nearest, read, tokens

ALL = "all"
LARGEST = "largest"
FIX = "write checkpoint, against and rules as in docs/gate.md"

Kind = Literal["margin", "at_least", "at_most"]


def _budget(value: Any) -> Any:
    """Parse `largest`, `all`, or a number as in a study's budgets."""
    if value in (LARGEST, ALL):
        return value
    found = tokens(value)
    if not isinstance(found, int) or found < 0:
        raise ValueError(f"give a number such as 400k, or {LARGEST}, not {value!r}")
    return found


Budget = Annotated[int | Literal["largest", "all"], BeforeValidator(_budget)]


class CheckpointSelection(ConfigModel):
    """The checkpoints that must pass; the objective may be omitted if the run has only one, as in an audit."""

    objective: str | None = None
    budget: Budget = "largest"
    condition: str = "plain"

    @model_validator(mode="before")
    @classmethod
    def _all(cls, value: Any) -> Any:
        return {"objective": ALL, "budget": ALL, "condition": ALL} if value == ALL else value


class ReferenceSelection(ConfigModel):
    """The reference: the base, or an objective at a budget (default: the checkpoint's own)."""

    objective: str = BASE
    budget: Budget | None = None

    @model_validator(mode="before")
    @classmethod
    def _base(cls, value: Any) -> Any:
        return {"objective": BASE} if value == BASE else value

    def _faults(self) -> Iterator[str]:
        if self.objective == BASE and self.budget is not None:
            yield "the base has no budget; remove it"
        if ALL in (self.objective, self.budget):
            yield "the reference is one checkpoint, not all"


class Rule(ConfigModel):
    """One measure's margin against the reference, or a bound on its own rate."""

    measure: str
    margin: float | None = None
    at_least: float | None = None
    at_most: float | None = None
    worse: WorseDirection | None = Field(default=None, description="for measures without a worse direction")

    @field_validator("margin", "at_least", "at_most")
    @classmethod
    def _in_range(cls, value: float | None, info: ValidationInfo) -> float | None:
        low, example = (-1, "two points are 0.02") if info.field_name == "margin" else (0, "60 per cent are 0.6")
        if info.data.get("measure") in LOG_ODDS:
            example = "in log-odds 0.2 is 5 points at even odds"
        if value is not None and not low < value < 1:
            raise ValueError(f"{value:g} is outside ({low}, 1); {example}")
        return value

    def _faults(self) -> Iterator[str]:
        given = [k for k in ("margin", "at_least", "at_most") if getattr(self, k) is not None]
        if len(given) != 1:
            yield f"{self.measure}: give one of margin, at_least, at_most, not {len(given)} of them"
        elif self.worse and given != ["margin"]:
            yield f"{self.measure}: {given[0]} implies the worse direction; remove worse"

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

    checkpoint: CheckpointSelection = Field(default_factory=CheckpointSelection)
    against: ReferenceSelection = Field(default_factory=ReferenceSelection)
    level: float = Field(default=0.05, gt=0, lt=0.5)
    rules: tuple[Rule, ...]

    @field_validator("rules")
    @classmethod
    def _distinct(cls, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
        if not rules:
            raise ValueError("there are none; a gate without rules would pass everything")
        keys = [(r.measure, r.kind) for r in rules]
        if duplicates := sorted({k for k in keys if keys.count(k) > 1}):
            raise ValueError("\n".join(f"{measure} has two rules of kind {kind}" for measure, kind in duplicates))
        return rules


def load(path: Path) -> Rules:
    """Load a rule file; raises one LeewayError with all faults."""
    if not path.is_file():
        raise LeewayError(f"{path}: no such rule file", fix=FIX)
    raw = read(read_utf8(path), str(path))
    if not isinstance(raw, dict):
        what = "empty" if raw is None else f"contains {type(raw).__name__}, not a mapping"
        raise LeewayError(f"{path}: {what}", fix=FIX)
    try:
        return Rules.model_validate(raw)
    except ValidationError as error:
        raise LeewayError(f"{path}: " + "; ".join(faults(error, Rules))) from error


@dataclass(frozen=True, order=True)
class GatedCheckpoint:
    """One checkpoint under one test-time prompt."""

    objective: str
    budget: int
    condition: str


@dataclass(frozen=True)
class ResolvedRules:
    """What the gate decides, all of it present in the run."""

    checkpoints: tuple[GatedCheckpoint, ...]
    against: ContrastReference | None  # None: the base
    rules: tuple[tuple[Rule, WorseDirection], ...]
    level: float


def resolve(rules: Rules, rates: pd.DataFrame, where: str) -> ResolvedRules:
    """Resolve a rule file against the rates of a run; raises one LeewayError with everything that does not match."""
    problems: list[str] = []
    keys = rates[POOLED_CHECKPOINT].drop_duplicates().itertuples(index=False)
    tuned = sorted(GatedCheckpoint(str(o), int(b), str(c)) for o, b, c in keys if o != BASE)
    if not tuned:
        raise LeewayError(f"{where}: the run has only the base", fix="run or audit a checkpoint")
    against = _reference(rules, tuned, problems)
    checkpoints = _checkpoints(rules, tuned, problems)
    directed = tuple(_direction(rule, rates, problems) for rule in rules.rules)
    if against is not None and not problems:
        reference = (against[0], against[1])
        checkpoints = [c for c in checkpoints if (c.objective, c.budget) != (reference[0], reference[1] or c.budget)]
        if not checkpoints:
            problems.append("against: it is the checkpoint itself; name another one, or base")
    if problems:
        raise LeewayError(f"{where}: " + "; ".join(problems))
    return ResolvedRules(tuple(checkpoints), against, directed, rules.level)


def _reference(rules: Rules, tuned: list[GatedCheckpoint], problems: list[str]) -> ContrastReference | None:
    wanted = rules.against
    if wanted.objective == BASE:
        return None
    budgets = _budgets(wanted.objective, tuned, "against.objective", problems)
    if not budgets or wanted.budget is None:
        return (wanted.objective, None)
    return (wanted.objective, _resolve_budget(wanted.budget, budgets, f"against.budget: {wanted.objective}", problems))


def _budgets(objective: str, tuned: list[GatedCheckpoint], where: str, problems: list[str]) -> list[int]:
    """Return the budgets of an objective; empty, with a problem added, if it was not measured."""
    found = sorted({c.budget for c in tuned if c.objective == objective})
    if not found:
        problems.append(f"{where}: {_unknown(objective, sorted({c.objective for c in tuned}), 'objective')}")
    return found


def _resolve_budget(wanted: int | str, budgets: list[int], where: str, problems: list[str]) -> int:
    if wanted == LARGEST:
        return budgets[-1]
    if wanted not in budgets:
        known = ", ".join(map(formatting.format_budget, budgets))
        closest = min(budgets, key=lambda b: (abs(b - int(wanted)), b))
        problems.append(f"{where} has {known}, not {wanted}; did you mean {formatting.format_budget(closest)}?")
    return int(wanted)


def _checkpoints(rules: Rules, tuned: list[GatedCheckpoint], problems: list[str]) -> list[GatedCheckpoint]:
    """Return every checkpoint that the file selects."""
    wanted, known = rules.checkpoint, list(dict.fromkeys(c.objective for c in tuned))
    if wanted.objective is None and len(known) > 1:
        problems.append(f"checkpoint.objective is missing: name one of {', '.join(known)}, or {ALL}")
        return []
    if wanted.objective == BASE:
        problems.append("checkpoint.objective: the base is a reference; name a trained objective")
        return []
    chosen = known if wanted.objective in (None, ALL) else [str(wanted.objective)]
    found = []
    for objective in chosen:
        budgets = _budgets(objective, tuned, "checkpoint.objective", problems)
        if not budgets:
            continue
        if wanted.budget == ALL:
            at = budgets
        else:
            at = [_resolve_budget(wanted.budget, budgets, f"checkpoint.budget: {objective}", problems)]
        own = [c for c in tuned if c.objective == objective and c.budget in at]
        selected = [c for c in own if wanted.condition in (ALL, c.condition)]
        if own and not selected:
            unknown = _unknown(wanted.condition, sorted({c.condition for c in own}), "condition")
            problems.append(f"checkpoint.condition: {objective}: {unknown}")
        found += selected
    return found


def _direction(rule: Rule, rates: pd.DataFrame, problems: list[str]) -> tuple[Rule, WorseDirection]:
    """Return the worse direction of the rule's measure: the measure's own, or the rule's if it has none."""
    known = list(dict.fromkeys(rates["measure"]))
    default: WorseDirection = "lower" if rule.kind == "at_least" else rule.worse or "higher"
    if rule.measure not in known:
        problems.append(f"{rule.measure}: {_unknown(rule.measure, known, 'measure')}")
        return rule, default
    if rule.kind != "margin" and rule.measure in LOG_ODDS:
        problems.append(f"{rule.measure}: {rule.kind} bounds a rate, and {rule.measure} is in log-odds; give a margin")
        return rule, default
    better = str(rates.loc[rates["measure"] == rule.measure, "better"].iloc[0])
    if rule.kind == "margin" and better:
        own: WorseDirection = "lower" if better == "higher" else "higher"
        if rule.worse not in (None, own):
            problems.append(f"{rule.measure}: {own} is worse, but the rule has worse: {rule.worse}; remove worse")
        return rule, own
    if rule.kind == "margin" and rule.worse is None:
        problems.append(f"{rule.measure}: the measure has no worse direction; add worse: higher, or worse: lower")
    return rule, default


def _unknown(word: str, known: list[str], kind: str) -> str:
    return f"the run has no {kind} {word!r}{nearest(word, known)} (it has {', '.join(known)})"


Outcome = Literal["pass", "fail", "inconclusive"]
EXIT: dict[Outcome, int] = {"pass": 0, "fail": 1, "inconclusive": 3}
MIN_PROMPTS = 10  # with fewer the error is too uncertain for planning


@dataclass(frozen=True)
class Evidence:
    """The data on one rule at one checkpoint. Differences are checkpoint − reference."""

    rule: Rule
    worse: WorseDirection
    reference: float = NAN  # the reference's rate; NaN for a bound on the checkpoint's own rate
    rate: float = NAN
    estimate: float = NAN  # the difference, or the rate
    limit: float = NAN  # the worst value compatible with the data, one-sided at the level
    se: float = NAN  # clustered by prompt
    p: float = NAN  # H0: the rule is broken or just met
    p_exceeded: float = NAN  # H0: the rule is kept or just met
    n: int = 0
    n_clusters: int = 0
    n_unscored: int = 0
    withheld: str = ""  # why there is no number
    if_worst: float = NAN  # the estimate if all unscored responses had the worst score
    notes: tuple[str, ...] = ()

    @property
    def bound(self) -> float:
        """The bound on the difference, or on the rate."""
        if self.rule.kind != "margin":
            return self.rule.bound
        return self.rule.bound if self.worse == "higher" else -self.rule.bound

    def satisfies(self, value: float) -> bool:
        """Return whether a difference, or a rate, is on the good side of the bound."""
        return value < self.bound if self.worse == "higher" else value > self.bound


@dataclass(frozen=True)
class RuleResult:
    """The outcome of one rule."""

    evidence: Evidence
    outcome: Outcome
    p_holm: float = NAN  # `p_exceeded`, corrected over the checkpoint's rules
    downgrade_reason: str = ""  # why a pass by the numbers is inconclusive
    prompts_needed: int | None = None  # more prompts that would decide it; None if decided or unknown


@dataclass(frozen=True)
class Replication:
    """A checkpoint's outcomes on re-drawn sets of prompts, as shares of the sets (`stats.replication`)."""

    sets: int
    again: dict[Outcome, float]
    no_drift: dict[Outcome, float]  # as many prompts change, in random directions; empty without a margin
    all_margins: bool  # else `no_drift` is of the rules with a margin alone


@dataclass(frozen=True)
class Decision:
    """The outcome of one checkpoint."""

    checkpoint: GatedCheckpoint
    seeds: tuple[int, ...]
    results: tuple[RuleResult, ...]
    warnings: tuple[str, ...] = ()
    replication: Replication | None = None  # None if no number can be re-drawn

    @property
    def outcome(self) -> Outcome:
        return worst([r.outcome for r in self.results])

    @property
    def flip_rate(self) -> float:
        """The share of re-drawn sets of prompts with another outcome; NaN without any."""
        return 1 - self.replication.again[self.outcome] if self.replication else NAN


def worst(outcomes: list[Outcome]) -> Outcome:
    """Return fail if any is, else inconclusive if any is or there are none, else pass."""
    if "fail" in outcomes:
        return "fail"
    return "pass" if outcomes and set(outcomes) == {"pass"} else "inconclusive"


def decide(evidence: list[Evidence], level: float) -> list[RuleResult]:
    """Decide the rules of one checkpoint together.

    The checkpoint passes only if every rule does: an intersection–union test, of size at most `level` with each rule
    tested at `level` (Berger 1982, Technometrics 24:295). It fails if any rule does, so failures are corrected over its
    rules (Holm 1979): the probability of any false failure is at most `level` too.
    """
    corrected = holm(np.array([e.p_exceeded for e in evidence], dtype=float)).tolist()
    results = []
    for e, p in zip(evidence, corrected, strict=True):
        if e.withheld or math.isnan(e.p):
            results.append(RuleResult(e, "inconclusive", p))
        else:
            results.append(RuleResult(e, "fail" if p <= level else "pass" if e.p <= level else "inconclusive", p))
    return results
