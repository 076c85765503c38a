"""Pass, fail or inconclusive: the outcome of each rule, and of all rules of a checkpoint together."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from leeway.gate.rules import GatedCheckpoint, Rule
from leeway.stats import WorseDirection
from leeway.stats.contrasts import holm
from leeway.stats.intervals import NAN

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
class Decision:
    """The outcome of one checkpoint."""

    checkpoint: GatedCheckpoint
    seeds: tuple[int, ...]
    results: tuple[RuleResult, ...]
    warnings: tuple[str, ...] = ()

    @property
    def outcome(self) -> Outcome:
        return worst([r.outcome for r in self.results])


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
    exceeded = np.array([e.p_exceeded for e in evidence], dtype=float)
    corrected = np.full(len(exceeded), NAN)
    tested = np.isfinite(exceeded)
    corrected[tested] = holm(exceeded[tested])
    return [_decide_rule(e, float(p), level) for e, p in zip(evidence, corrected, strict=True)]


def _decide_rule(evidence: Evidence, p_holm: float, level: float) -> RuleResult:
    if evidence.withheld or math.isnan(evidence.p):
        return RuleResult(evidence, "inconclusive", p_holm)
    if p_holm <= level:
        return RuleResult(evidence, "fail", p_holm)
    return RuleResult(evidence, "pass" if evidence.p <= level else "inconclusive", p_holm)


def downgrade_if_incoherent(result: RuleResult, reason: str) -> RuleResult:
    """Return a pass as inconclusive if there is a `reason` to doubt it."""
    if not reason or result.outcome != "pass":
        return result
    return replace(result, outcome="inconclusive", downgrade_reason=reason)
