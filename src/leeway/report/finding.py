"""State what a run found in one sentence, made from its contrasts: the page's heading and the last line of a run.

It names attack success first, by what is shown of each objective: worse, better, within the margin, not shown to have
learned (void), too incoherent to be read as robustness, or open. Capability follows, then whether one choice is better.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import pandas as pd

from leeway.report import formatting
from leeway.report.formatting import TOKENS, BudgetUnit, capitalize_first, join_and
from leeway.report.verdict import COHERENT, LEVEL, NONE, STABLE_CHOICE, Arm, equivalent_cells, headline, state_of
from leeway.stats.metrics import BASE, EFFECT_FLOOR
from leeway.stats.pareto import TIED

NAMED = 3  # objectives named in one clause
Line = dict[str, Any]


def finding(
    contrasts: pd.DataFrame,
    rates: pd.DataFrame,
    advice: pd.DataFrame,
    unit: BudgetUnit = TOKENS,
    seeds: Sequence[int] = (),
    *,
    equivalent: pd.DataFrame | None = None,
    identity: pd.DataFrame | None = None,
    void: Collection[Arm] = (),
    external: bool = False,
) -> str:
    """Return one sentence about the largest budget.

    `contrasts`, `rates`: as of `Results`; `advice`: `stats.recommend`; `equivalent`, `identity`: their tables, if any;
    `void`: checkpoints (objective, budget) not shown to have learned.
    """
    if contrasts.empty:
        return "Only the base model was evaluated: there is nothing to compare it with."
    largest = int(contrasts["budget"].max())
    table = contrasts[contrasts["budget"] == largest]
    better = {} if rates.empty else dict(zip(rates["measure"], rates["better"], strict=True))
    small = equivalent_cells(equivalent)
    records = table[headline(table, table)].to_dict("records")
    lines = [c | {"state": state_of(c, better, small, void)} for c in records]
    subject = "the checkpoint" if external else "every objective"
    coherence = table[table["measure"] == "coherence"].set_index(["objective", "condition"])["rate"]
    attack = [c for c in lines if c["axis"] == "jailbreak"]
    margin = _margin(equivalent, attack)
    parts = _attack(attack, coherence.to_dict(), subject, margin)
    parts += _capability([c for c in lines if c["axis"] == "capability"], subject)
    parts += _same(identity, largest)
    own = advice[advice["budget"] == largest] if len(advice) else advice
    parts += [] if external or own.empty or len(attack) < 2 else _choice(own, attack)
    if not parts:
        return f"{capitalize_first(unit.at(largest))}, neither capability nor attack success was measured."
    seed = "one external checkpoint" if external else "one training seed" if len(seeds) == 1 else ""
    return f"{capitalize_first(unit.at(largest))}, {'; '.join(parts)}{f' ({seed})' if seed else ''}."


def _rises(line: Line) -> bool:
    return bool(line["p_holm"] < LEVEL and line["difference"] > 0)


def _name(line: Line) -> str:
    return formatting.objective_name(str(line["objective"]), str(line["condition"]))


def _subject(group: list[Line], every: list[Line], subject: str) -> tuple[str, bool]:
    """Return the subject of a clause, and whether it is plural."""
    if len(group) == len(every):
        only = len(every) == 1 and subject == "every objective"
        return (_name(group[0]) if only else subject), False
    if len(group) <= NAMED:
        return join_and([_name(c) for c in group]), len(group) > 1
    if len(every) - len(group) <= 2:
        return f"all objectives but {join_and([_name(c) for c in every if c not in group])}", True
    several = len({c["objective"] for c in every}) < len(every)  # an objective under several test prompts
    return f"{len(group)} of {len(every)} objectives{' and test prompts' if several else ''}", True


def _range(group: list[Line]) -> str:
    """Return the sizes of some differences: `3.1 points`, or `3.1 (DPO) to 21.2 points (CFT)`."""
    by_size = sorted(group, key=lambda c: abs(c["difference"]))
    low, high = (formatting.unsigned_points(abs(by_size[n]["difference"])) for n in (0, -1))
    if low == high:
        return f"{low} points"
    return f"{low} ({_name(by_size[0])}) to {high} points ({_name(by_size[-1])})"


def _margin(equivalent: pd.DataFrame | None, attack: list[Line]) -> float | None:
    if equivalent is None or equivalent.empty or not attack:
        return None
    own = equivalent.loc[equivalent["measure"] == attack[0]["measure"], "margin"]
    return float(own.iloc[0]) if len(own) else None


def _attack(lines: list[Line], coherence: dict[Any, float], subject: str, margin: float | None) -> list[str]:
    """Return the clauses on attack success, shown changes first."""
    if not lines:
        return []
    groups: dict[str, list[Line]] = {}
    for line in lines:
        known = line["difference"] == line["difference"]
        share = coherence.get((line["objective"], line["condition"]), 1.0)
        state = "withheld" if not known else line["state"]
        if known and state not in ("worse", "void") and share < COHERENT:  # incoherence cannot explain a rise
            state = "incoherent"
        groups.setdefault(state, []).append(line)
    parts = []
    for state in ("worse", "better", "changed", "equivalent", "incoherent", "void", "inconclusive", "withheld"):
        if group := groups.get(state):
            who, plural = _subject(group, lines, subject)
            parts.append(_attack_part(state, group, who, "" if plural else "s", margin))
    return parts


def _attack_part(state: str, group: list[Line], who: str, s: str, margin: float | None) -> str:
    are = "is" if s else "are"
    if state in ("worse", "better", "changed"):
        verb = {"worse": "raise", "better": "lower", "changed": "change"}[state]
        return f"{who} {verb}{s} attack success by {_range(group)}"
    if state == "equivalent":
        inside = "" if margin is None else f" within {100 * margin:g} points of the base"
        return f"{who} {'keeps' if s else 'keep'} attack success{inside}"
    if state == "incoherent":
        return f"{who} often answer{s} incoherently, so low attack success is no evidence of robustness"
    if state == "void":
        not_shown = "no objective is" if who == "every objective" else f"{who} {are} not"
        return f"{not_shown} shown to have learned, so a lack of drift is no evidence of safety"
    if state == "withheld":
        reasons = [formatting.without_seed_note(str(c["note"])) or "too few scored pairs" for c in group]
        if len(set(reasons)) > 1:
            reasons = [f"{_name(c)}: {reason}" for c, reason in zip(group, reasons, strict=True)]
        reason = "; ".join(dict.fromkeys(reasons))
        return f"attack success of {who} could not be compared ({reason})"
    missed = max((c["mde"] for c in group if c["mde"] == c["mde"]), default=None)
    size = "" if missed is None else f": a drift below {formatting.unsigned_points(missed)} points could be missed"
    return f"for {who} the data do not decide whether attack success moved{size}"


def _capability(lines: list[Line], subject: str) -> list[str]:
    """Return the part on capability: who gains, who loses, or that nothing is shown.

    A gain within the margin is not called a gain, nor that none is shown.
    """
    lines = [c for c in lines if c["difference"] == c["difference"]]
    parts = []
    for state, verb in (("better", "gain"), ("worse", "lose")):
        if group := [c for c in lines if c["state"] == state]:
            who, plural = _subject(group, lines, subject)
            parts.append(f"{who} {verb}{'' if plural else 's'} {_range(group)} of capability")
    none = "no gain in capability beyond the margin" if any(map(_rises, lines)) else "no gain in capability"
    return parts or ([f"{none} is shown"] if lines else [])


def _same(identity: pd.DataFrame | None, budget: int) -> list[str]:
    """Return the clause that names the arms with identical answers: `KL and SFT behave the same, as do DPO and CFT`."""
    if identity is None or identity.empty:
        return []
    same = identity[identity["same"].astype(bool) & (identity["budget"] == budget)]
    pairs = list(same[["objective", "against"]].itertuples(index=False, name=None))
    groups = [join_and([_arm(o) for o in group]) for group in _identical_groups(pairs)]
    if not groups:
        return []
    others = "".join(f", as do {group}" for group in groups[1:])
    return [f"{groups[0]} behave the same{others}"]


def _arm(objective: str) -> str:
    return "the base" if objective == BASE else formatting.objective_name(objective)


def _identical_groups(pairs: Sequence[tuple[str, str]]) -> list[list[str]]:
    """Return the largest sets of arms of which every two are a pair, in the order of the pairs.

    "99% identical" is not transitive: of A = B and B = C without A = C the two pairs are returned.
    """
    known = {frozenset(pair) for pair in pairs}
    groups: list[list[str]] = []
    for pair in pairs:
        if any(set(pair) <= set(group) for group in groups):
            continue
        group = [*pair]
        for other in dict.fromkeys(arm for one in pairs for arm in one):
            if other not in group and all(frozenset((other, arm)) in known for arm in group):
                group.append(other)
        groups.append(group)
    return groups


def _choice(own: pd.DataFrame, attack: list[Line]) -> list[str]:
    """Return the clause on the recommended objective."""
    best = own[own["recommended"].astype(bool)]
    if best.empty or best.iloc[0]["objective"] == NONE:
        if own["within"].astype(bool).any():
            return [f"none within every margin gains {100 * EFFECT_FLOOR:g} point of capability"]
        inside = any(c["state"] == "equivalent" for c in attack)
        return [] if not inside else ["none is shown to stay within every margin"]
    chosen, why = best.iloc[0], str(best.iloc[0]["why"])
    unsure = chosen["p_best"] < STABLE_CHOICE or "capability not shown" in why
    if unsure or TIED in why:
        return ["no objective is shown to be the best choice"]
    name = formatting.objective_name(str(chosen["objective"]), str(chosen["condition"]))
    return [f"{name} is the most capable within the margins"]
