"""A rule file held against a run: which checkpoints it means, and in which direction each measure gets worse."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from leeway.errors import LeewayError
from leeway.gate.rules import ALL, BASE, LARGEST, Rule, Rules, Worse
from leeway.part import nearest
from leeway.report import wording

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
        return f"{self.objective} at {wording.budget(self.budget)}, {self.condition}"


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
    return (wanted.objective, _budget(wanted.budget, budgets, f"against.budget: {wanted.objective}", faults))


def _budgets(objective: str, tuned: list[Place], where: str, faults: list[str]) -> list[int]:
    """The budgets at which an objective was measured; none and a fault where it was not."""
    found = sorted({p.budget for p in tuned if p.objective == objective})
    if not found:
        known = sorted({p.objective for p in tuned})
        faults.append(f"{where}: {_unknown(objective, known, 'objective')}")
    return found


def _budget(wanted: int | str, budgets: list[int], where: str, faults: list[str]) -> int:
    if wanted == LARGEST:
        return budgets[-1]
    if wanted not in budgets:
        told = ", ".join(map(wording.budget, budgets))
        closest = min(budgets, key=lambda b: (abs(b - int(wanted)), b))
        faults.append(f"{where} has {told}, not {wanted}; did you mean {wording.budget(closest)}?")
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
            at = [_budget(wanted.budget, budgets, f"checkpoint.budget: {objective}", faults)]
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
