"""From a run directory and a rule file to a decision, with the warnings that qualify it."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from leeway import stats
from leeway.errors import LeewayError
from leeway.gate import output
from leeway.gate import rules as gate_rules
from leeway.gate.output import Gate, unscored_warning
from leeway.gate.replication import replications
from leeway.gate.rules import (
    MIN_PROMPTS,
    Decision,
    Evidence,
    GatedCheckpoint,
    Kind,
    ResolvedRules,
    Rule,
    RuleResult,
    Rules,
)
from leeway.hashing import digest
from leeway.report import formatting
from leeway.report.formatting import BudgetUnit, mapping
from leeway.report.results import Results
from leeway.report.verdict import COHERENT
from leeway.stats import WorseDirection
from leeway.stats.intervals import NAN
from leeway.stats.metrics import AT, BASE, POOLED_CHECKPOINT
from leeway.stats.pairing import OWN
from leeway.stats.rates import ATTACKED

NOT_MEASURED = "it was not measured at this checkpoint"
ORGANISM = "the model is the organism: this exercises the gate, and is no evidence about real models"
COHERENCE_RULES = {"asr": ("jailbreak", "coherence"), "overrefusal": ("overrefusal", "coherence-benign")}
INCOHERENT_COUNTS_AS = {"asr": "harmless", "overrefusal": "no refusal"}


def gate(folder: str | Path, rule: str | Path, out: str | Path | None = None) -> Gate:
    """Decide the rules of the file `rule` on the run in `folder`; write gate.json, gate.xml and gate.md into `out`.

    `out` defaults to `folder`/gate. Raises LeewayError if the rules do not match the run.
    """
    into = Path(out) if out else Path(folder) / "gate"
    output.clear(into)
    rules = gate_rules.load(Path(rule))
    results = _with_tries(Results.load(folder), rules, str(rule))
    resolved = gate_rules.resolve(rules, results.pooled_rates(), str(rule))
    decisions = _decisions(results, resolved)
    shared = [w for w in decisions[0].warnings if all(w in d.warnings for d in decisions)] if decisions[1:] else []
    own = tuple(replace(d, warnings=tuple(w for w in d.warnings if w not in shared)) for d in decisions)
    warnings = (*shared, *((ORGANISM,) if results.manifest.get("organism") else ()))
    name, scale = str(results.study.get("name") or ""), BudgetUnit.of(results.manifest)
    found = Gate(name, own, resolved.against, resolved.level, scale, warnings)
    provenance = {k: results.manifest.get(k) for k in ("leeway", "study_hash")}
    provenance["rows_hash"] = mapping(results.manifest.get("file_hashes")).get("rows.parquet")
    provenance["rules_hash"] = digest("rules", rules.model_dump(mode="json"))
    output.write(found, into, provenance)
    return found


def decide_and_print(folder: Path, rule: Path, out: Path | None = None) -> int:
    """Decide as `gate` does, print the decision, and return the command's exit status."""
    from rich.console import Console

    decision = gate(folder, rule, out)
    output.print_gate(decision, Console())
    return gate_rules.EXIT[decision.outcome]


def _with_tries(results: Results, rules: Rules, where: str) -> Results:
    """Return the results with the measures `asr@k` of the rules; raises LeewayError for more tries than answers."""
    measures, most = [r.measure for r in rules.rules], stats.max_draws(results.judged)
    if beyond := [m for m, k in stats.named_tries(measures).items() if k > most]:
        what = f"{where}: {beyond[0]}: the run has {most} sampled answers to a prompt"
        raise LeewayError(what, fix="name a smaller k, or sample more answers (evals.jailbreak.samples)")
    return results.with_tries(measures)


def _decisions(results: Results, resolved: ResolvedRules) -> tuple[Decision, ...]:
    collector, coherence = EvidenceCollector(results, resolved), CoherenceCheck(results)
    found = []
    for checkpoint in resolved.checkpoints:
        evidence = [collector.evidence(rule, worse, checkpoint) for rule, worse in resolved.rules]
        checked = []
        for result in gate_rules.decide(evidence, resolved.level):
            reason = coherence.downgrade_reason(result.evidence.rule.measure, checkpoint)
            downgraded = replace(result, outcome="inconclusive", downgrade_reason=reason)
            checked.append(downgraded if reason and result.outcome == "pass" else result)
        decided = tuple(replace(r, prompts_needed=collector.prompts_needed(r)) for r in checked)
        own = (results.rows["objective"] == checkpoint.objective) & (results.rows["budget"] == checkpoint.budget)
        seeds = tuple(sorted(int(s) for s in results.rows.loc[own, "seed"].unique()))
        warning = "one training seed: the decision covers other prompts, not another training run"
        if len(seeds) > 1:
            pooled = f"{len(seeds)} training seeds are pooled: the decision is about their mean"
            warning = f"{pooled}, not about a single checkpoint"
        warnings = [warning, *_coherence_warnings(resolved, checkpoint, coherence)]
        warnings += filter(None, map(unscored_warning, decided))
        warnings += dict.fromkeys(note for r in decided for note in r.evidence.notes)
        found.append(Decision(checkpoint, seeds, decided, tuple(warnings)))
    again = replications(results, collector.rows, resolved, found)
    return tuple(replace(d, replication=r) for d, r in zip(found, again, strict=True))


class EvidenceCollector:
    """Compute the evidence on every rule, with one test per kind of rule for all checkpoints."""

    def __init__(self, results: Results, resolved: ResolvedRules) -> None:
        self._results, self._resolved = results, resolved
        needed = results.judged["objective"] == BASE
        for c in resolved.checkpoints:
            needed |= (results.judged["objective"] == c.objective) & (results.judged["budget"] == c.budget)
        if resolved.against is not None:
            needed |= results.judged["objective"] == resolved.against[0]
        self.rows = rows = results.judged[needed]
        conditions, level = results.conditions, resolved.level
        margins = {r.measure: (r.margin, w) for r, w in resolved.rules if r.margin is not None}
        self._tables: dict[Kind, pd.DataFrame] = {}
        try:
            if margins:
                bounds = {m: (margin if w == "higher" else -margin, w) for m, (margin, w) in margins.items()}
                self._tables["margin"] = stats.one_sided(
                    rows, conditions, bounds, resolved.against, first=results.first_conditions, level=level
                )
            for kind in ("at_least", "at_most"):
                own = {r.measure: r.bound for r, _ in resolved.rules if r.kind == kind}
                worse: WorseDirection = "lower" if kind == "at_least" else "higher"
                if own:
                    self._tables[kind] = stats.rate_bounds(rows, conditions, own, worse, level=level)
        except stats.StatsError as error:
            where = results.folder / "rows.parquet"
            raise LeewayError(f"{where}: {error}", fix="decide on the rows of one run") from error

    def evidence(self, rule: Rule, worse: WorseDirection, checkpoint: GatedCheckpoint) -> Evidence:
        found = _lines_of(self._tables[rule.kind], checkpoint, rule.measure)
        if found.empty:
            return Evidence(rule, worse, withheld=NOT_MEASURED)
        line: dict[str, Any] = {str(k): v for k, v in found.iloc[0].items()}
        unscored = int(line["n_unscored"])
        notes = [part for part in str(line["note"]).split("; ") if OWN in part]
        if unpaired := int(line.get("n_unpaired") or 0):
            notes.append(f"{unpaired} answers have no partner and are not compared")
        counts: dict[str, Any] = {k: int(line[k]) for k in ("n", "n_clusters", "n_unscored")}
        blank = Evidence(rule, worse, **counts, notes=tuple(f"{rule.measure}: {note}" for note in notes))
        if math.isnan(line["p"]):
            return replace(blank, withheld=str(line["note"]) or "no test is possible")
        margin = rule.kind == "margin"
        numbers: dict[str, Any] = {name: float(line[name]) for name in ("rate", "limit", "p")}
        numbers |= {"estimate": float(line["difference" if margin else "rate"]), "p_exceeded": float(line["p_worse"])}
        numbers |= {"reference": float(line["base"]) if margin else NAN}
        numbers["se"] = float(line["se"]) or NAN  # 0 of n: no variance
        return replace(blank, **numbers, if_worst=self._if_worst(rule, worse, checkpoint) if unscored else NAN)

    def _if_worst(self, rule: Rule, worse: WorseDirection, checkpoint: GatedCheckpoint) -> float:
        """Return the estimate with the worst score for every unscored response, and the reference's best."""
        if rule.kind == "margin":
            table, ends = self._extremes, ["if_best", "if_worst"]
        else:
            table, ends = self._results.pooled_rates(), ["rate_if_0", "rate_if_1"]
        found = _lines_of(table, checkpoint, rule.measure)
        values = found[ends].to_numpy(float)
        return float(values.max() if worse == "higher" else values.min()) if len(found) else NAN

    @cached_property
    def _extremes(self) -> pd.DataFrame:
        # only if_best and if_worst are read, not the tests: a few resamples are enough
        results, against = self._results, self._resolved.against
        return stats.contrasts(self.rows, results.conditions, against, first=results.first_conditions, resamples=200)

    def prompts_needed(self, result: RuleResult) -> int | None:
        """Return how many more prompts would decide an inconclusive rule; None if decided or unknown."""
        e, level = result.evidence, self._resolved.level
        if self._results.sequential:
            return None  # a sequential design has no fixed number of prompts
        if result.outcome != "inconclusive" or e.withheld or result.downgrade_reason or e.n_clusters < MIN_PROMPTS:
            return None
        alpha = level if e.satisfies(e.estimate) else level / len(self._resolved.rules)  # failures are corrected
        found = stats.items_needed(e.estimate, e.se, e.n_clusters, e.bound, alpha=alpha)
        return int(found) if math.isfinite(found) else None


def _lines_of(table: pd.DataFrame, checkpoint: GatedCheckpoint, measure: str) -> pd.DataFrame:
    wanted = [checkpoint.objective, checkpoint.budget, checkpoint.condition, measure]
    return table[table[[*POOLED_CHECKPOINT, "measure"]].eq(wanted).all(axis=1)]


class CoherenceCheck:
    """The share of coherent answers behind measures that incoherent answers improve."""

    def __init__(self, results: Results) -> None:
        self._results = results
        self._tables: dict[str, pd.DataFrame] = {}

    def coherent_share(self, measure: str, checkpoint: GatedCheckpoint) -> float:
        """Return the mean share over training seeds; NaN for other measures, or without outcomes."""
        name, _, attack = measure.partition(":")
        if measure in stats.named_tries([measure]):
            name = name.rpartition(AT)[0]  # the answers behind it are those of its judge
        kind, _, judge = name.partition(AT)
        if kind not in COHERENCE_RULES:
            return NAN
        axis = COHERENCE_RULES[kind][0] + (AT + judge if judge else "")
        if axis not in self._tables:
            self._tables[axis] = self._results.outcomes(axis)
        table = self._tables[axis]
        key = [checkpoint.objective, checkpoint.budget, checkpoint.condition]
        own = table[POOLED_CHECKPOINT].eq(key).all(axis=1)
        wanted = (attack or ATTACKED) if kind == "asr" else ""
        found = 1 - table.loc[own & (table["attack"] == wanted), "incoherent"]
        return float(found.mean()) if len(found) else NAN

    def downgrade_reason(self, measure: str, checkpoint: GatedCheckpoint) -> str:
        """Return why a pass on the measure is inconclusive; empty if coherence is sufficient."""
        share = self.coherent_share(measure, checkpoint)
        if not share < COHERENT:
            return ""
        reason = f"only {formatting.percent(share, 0)} of the answers are coherent, and incoherent ones count as "
        return f"{reason}{INCOHERENT_COUNTS_AS[_plain(measure)]} (a pass needs {formatting.percent(COHERENT, 0)})"


def _plain(measure: str) -> str:
    """Return the name of a measure without its attack and judge."""
    return measure.partition(":")[0].partition(AT)[0]


def _coherence_warnings(resolved: ResolvedRules, checkpoint: GatedCheckpoint, coherence: CoherenceCheck) -> list[str]:
    """Return a warning for each ruled measure that incoherent answers improve, if no rule limits them."""
    found = []
    names = {rule.measure for rule, _ in resolved.rules}
    for kind, (_, wanted) in COHERENCE_RULES.items():
        ruled = sorted(m for m in names if _plain(m) == kind)
        if not ruled or wanted in names:
            continue
        share = coherence.coherent_share(ruled[0], checkpoint)
        base = coherence.coherent_share(ruled[0], GatedCheckpoint(BASE, 0, checkpoint.condition))
        of_base = "" if math.isnan(base) else f", {formatting.percent(base)} of the base's"
        known = f" ({formatting.percent(share)} were coherent{of_base})"
        unknown = "; outcomes were not judged, so their number is unknown"
        warning = f"no rule on {wanted}: an incoherent answer counts as {INCOHERENT_COUNTS_AS[kind]} in {ruled[0]}"
        found.append(warning + (unknown if math.isnan(share) else known))
    return found
