"""Pass, fail or inconclusive: what the evidence on each rule allows, and what the rules of a checkpoint amount to."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from leeway.gate.rules import Place, Rule, Worse
from leeway.stats.contrasts import holm

Outcome = Literal["pass", "fail", "inconclusive"]
EXIT: dict[Outcome, int] = {"pass": 0, "fail": 1, "inconclusive": 3}
NAN = float("nan")
FEW = 10  # prompts: with fewer the error is not known well enough to plan with


@dataclass(frozen=True)
class Evidence:
    """What the rows say about one rule at one checkpoint. Differences are checkpoint − reference."""

    rule: Rule
    worse: Worse
    reference: float = NAN  # the reference's rate; NaN for a bound on the checkpoint's own
    rate: float = NAN
    estimate: float = NAN  # the difference, or the rate
    limit: float = NAN  # the worst value that the data leave open, one-sided at the level
    se: float = NAN  # clustered by prompt
    p: float = NAN  # of the rule being broken or just met: small where it is kept
    p_exceeded: float = NAN  # of the rule being kept or just met: small where it is broken
    n: int = 0
    n_clusters: int = 0
    n_unscored: int = 0
    withheld: str = ""  # why there is no number
    if_worst: float = NAN  # the estimate, had all unscored answers gone the worst way
    notes: tuple[str, ...] = ()

    @property
    def bound(self) -> float:
        """The value that may not be passed: of the difference, or of the rate."""
        if self.rule.kind != "margin":
            return self.rule.bound
        return self.rule.bound if self.worse == "higher" else -self.rule.bound

    @property
    def kept(self) -> bool:
        """Does the estimate itself lie on the right side?"""
        return self.keeps(self.estimate)

    def keeps(self, value: float) -> bool:
        """Does a difference, or a rate, lie on the right side?"""
        return value < self.bound if self.worse == "higher" else value > self.bound


@dataclass(frozen=True)
class Finding:
    """One rule decided."""

    evidence: Evidence
    outcome: Outcome
    p_holm: float = NAN  # `p_exceeded`, corrected over the checkpoint's rules
    downgraded: str = ""  # why a pass that the numbers would give is none
    needed: int | None = None  # more prompts that would decide it; None where it is decided, or nobody can say


@dataclass(frozen=True)
class Decision:
    """One checkpoint decided."""

    place: Place
    seeds: tuple[int, ...]
    findings: tuple[Finding, ...]
    warnings: tuple[str, ...] = ()

    @property
    def outcome(self) -> Outcome:
        return worst([f.outcome for f in self.findings])


def worst(outcomes: list[Outcome]) -> Outcome:
    """Any fail is a fail; else anything inconclusive is inconclusive. Nothing at all is inconclusive."""
    if "fail" in outcomes:
        return "fail"
    return "pass" if outcomes and set(outcomes) == {"pass"} else "inconclusive"


def decide(evidence: list[Evidence], level: float) -> list[Finding]:
    """Decide the rules of one checkpoint together.

    The checkpoint passes only if every rule does: an intersection–union test, whose size is at most `level` with each
    rule tested at `level` (Berger 1982, Technometrics 24:295). It fails if any rule does, so that failing is corrected
    over its rules (Holm 1979): the chance of any false fail is at most `level` too.
    """
    exceeded = np.array([e.p_exceeded for e in evidence], dtype=float)
    corrected = np.full(len(exceeded), NAN)
    tested = np.isfinite(exceeded)
    corrected[tested] = holm(exceeded[tested])
    return [_one(e, float(p), level) for e, p in zip(evidence, corrected, strict=True)]


def _one(evidence: Evidence, p_holm: float, level: float) -> Finding:
    if evidence.withheld or math.isnan(evidence.p):
        return Finding(evidence, "inconclusive", p_holm)
    if p_holm <= level:
        return Finding(evidence, "fail", p_holm)
    return Finding(evidence, "pass" if evidence.p <= level else "inconclusive", p_holm)


def downgrade_if_incoherent(finding: Finding, reason: str) -> Finding:
    """A pass that rests on answers without meaning is none."""
    if not reason or finding.outcome != "pass":
        return finding
    return replace(finding, outcome="inconclusive", downgraded=reason)
