"""How often a gate would decide otherwise on other prompts, and what it decides where there is no drift."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd

from leeway import stats
from leeway.gate.rules import Decision, Evidence, Kind, Outcome, Replication, ResolvedRules, RuleResult, decide, worst
from leeway.report.results import Results
from leeway.stats.metrics import POOLED_CHECKPOINT
from leeway.stats.replication import SETS, replicated_differences, replicated_rates

P_VALUES = ["p", "p_worse", "p_no_drift", "p_worse_no_drift"]


def replications(
    results: Results, rows: pd.DataFrame, resolved: ResolvedRules, decisions: list[Decision]
) -> list[Replication | None]:
    """Return each decision's outcomes on re-drawn prompts; None if no number of a checkpoint can be re-drawn.

    A withheld number stays inconclusive, and a pass that incoherent answers forbid stays forbidden.
    """
    tables = _tables(results, rows, resolved)
    return [_replication(d, tables, resolved.level) for d in decisions]


def _tables(results: Results, rows: pd.DataFrame, resolved: ResolvedRules) -> dict[Kind, pd.DataFrame]:
    conditions, found = results.conditions, dict[Kind, pd.DataFrame]()
    margins: dict[str, stats.DifferenceBound] = {
        r.measure: (r.margin if worse == "higher" else -r.margin, worse)
        for r, worse in resolved.rules
        if r.margin is not None
    }
    if margins:
        first = results.first_conditions
        found["margin"] = replicated_differences(rows, conditions, margins, resolved.against, first=first)
    if at_least := {r.measure: r.bound for r, _ in resolved.rules if r.kind == "at_least"}:
        found["at_least"] = replicated_rates(rows, conditions, at_least, "lower")
    if at_most := {r.measure: r.bound for r, _ in resolved.rules if r.kind == "at_most"}:
        found["at_most"] = replicated_rates(rows, conditions, at_most, "higher")
    return found


def _replication(decision: Decision, tables: dict[Kind, pd.DataFrame], level: float) -> Replication | None:
    drawn = [_p_values(decision, r, tables) for r in decision.results]
    if not any(len(p) for p in drawn):
        return None
    again = [
        _outcome(decision.results, [tuple(p[n, :2]) if len(p) else None for p in drawn], level) for n in range(SETS)
    ]
    own = [(r, p) for r, p in zip(decision.results, drawn, strict=True) if r.evidence.rule.kind == "margin"]
    null: list[Outcome] = []
    if any(len(p) for _, p in own):
        results = [r for r, _ in own]
        null = [_outcome(results, [tuple(p[n, 2:]) if len(p) else None for _, p in own], level) for n in range(SETS)]
    return Replication(SETS, _shares(again), _shares(null), all_margins=len(own) == len(drawn))


def _p_values(decision: Decision, result: RuleResult, tables: dict[Kind, pd.DataFrame]) -> np.ndarray:
    """Return the p-values of one rule in every set, (SETS, 4), or (0, 4) without any."""
    rule, checkpoint = result.evidence.rule, decision.checkpoint
    table = tables[rule.kind]
    wanted = [checkpoint.objective, checkpoint.budget, checkpoint.condition, rule.measure]
    own = table[table[[*POOLED_CHECKPOINT, "measure"]].eq(wanted).all(axis=1)]
    return np.asarray(own.sort_values("set")[P_VALUES].to_numpy(float))


def _outcome(
    results: tuple[RuleResult, ...] | list[RuleResult], drawn: list[tuple[float, ...] | None], level: float
) -> Outcome:
    evidence: list[Evidence] = []
    for result, p in zip(results, drawn, strict=True):
        e = result.evidence
        evidence.append(replace(e, p=p[0], p_exceeded=p[1]) if p else replace(e, withheld=e.withheld or "not re-drawn"))
    decided = decide(evidence, level)
    forbidden = [bool(r.downgrade_reason) for r in results]
    return worst(
        ["inconclusive" if no and r.outcome == "pass" else r.outcome for r, no in zip(decided, forbidden, strict=True)]
    )


def _shares(outcomes: list[Outcome]) -> dict[Outcome, float]:
    counts = Counter(outcomes)
    return {o: counts[o] / len(outcomes) for o in ("pass", "inconclusive", "fail")} if outcomes else {}
