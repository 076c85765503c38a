"""Which answer is compared with which: item by item, under the same rendered prompt, seed by seed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from leeway.stats.anytime import by_turn, common, is_sequential
from leeway.stats.intervals import Floats, Ints
from leeway.stats.metrics import BASE, VALUES, Measure, StatsError, codes, groups, measures, observations, why_not

Against = tuple[str, int | None]

ITEM = ["eval", "attack", "item_id", "sample", "question"]
PAIR = [*ITEM, "template_hash"]
KEY = ["objective", "budget", "condition"]
OWN = "each under its own"  # in place of a template hash, where two objectives are used under different prompts


@dataclass(frozen=True)
class Pairs:
    """One contrast's answers, scored or not, beside the reference's."""

    value: Floats
    base: Floats
    strata: Ints
    clusters: Ints
    seeds: Ints
    matched: NDArray[np.bool_]
    turns: Ints | None = None  # of a sequential design: when each prompt was asked

    def at(self, chosen: NDArray[np.bool_] | Ints) -> Pairs:
        value, base, strata = self.value[chosen], self.base[chosen], self.strata[chosen]
        turns = None if self.turns is None else self.turns[chosen]
        return Pairs(value, base, strata, self.clusters[chosen], self.seeds[chosen], self.matched[chosen], turns)


@dataclass(frozen=True)
class Contrast:
    """A checkpoint beside its reference on one measure; `scored` is none where no number may be printed."""

    line: dict[str, object]  # what every table says of it
    measure: Measure
    pairs: Pairs  # all that have a partner
    strata: int  # how many the measure has
    scored: Pairs | None

    @property
    def sequential(self) -> bool:
        return self.pairs.turns is not None

    @property
    def moves(self) -> Floats:
        """How far each prompt moved, in the order of asking, by its answers that are scored on both sides.

        Unscored ones are left out and counted, as in every table; a prompt with no other is no observation.
        """
        assert self.scored is not None
        assert self.scored.turns is not None
        return by_turn(self.scored.value - self.scored.base, self.scored.strata, self.scored.turns)


def contrasted(
    rows: pd.DataFrame,
    conditions: Mapping[str, str],
    *,
    against: Against | None = None,
    first: Mapping[str, str] | None = None,
    only: Collection[str] | None = None,
) -> tuple[list[Contrast], pd.DataFrame]:
    """Every checkpoint beside its reference on every measure (or those named), and the observations they came from.

    The reference is the base, or another objective at the same budget (`("sft", None)`) or at one (`("sft",
    400_000)`); then seeds are paired too. A pair has the same item, attack and sample under the same rendered
    prompt; only where two objectives are each used under a prompt of their own (`first`) is the item alone the
    pair, and the note says so. Raises StatsError where there is no reference, or one answered twice.
    """
    table = observations(rows, conditions)
    declared = first_conditions(table, first)
    reference = _reference(table, against)
    keys = [] if against is None else ["seed", "budget"] if against[1] is None else ["seed"]
    _once(reference, [*PAIR, *(["seed", "budget"] if keys else [])])
    tuned = _tuned(table, against)
    _once(tuned, ["objective", "seed", "budget", *PAIR])
    tuned, reference = _forms(tuned, reference, declared, against)
    columns = [*ITEM, "form", *keys]
    paired = tuned.merge(
        reference[[*columns, *VALUES]], on=columns, how="left", suffixes=("", "_base"), indicator="found"
    )
    paired = common(paired, KEY, paired=True)
    found: list[Contrast] = []
    for measure in measures(table):
        if only is None or measure.name in only:
            asked = measure.select(reference).groupby(["form", *keys]).size()
            found += _of_measure(measure, measure.select(paired), asked, declared, against)
    return found, table


def first_conditions(table: pd.DataFrame, first: Mapping[str, str] | None) -> dict[str, str]:
    """The condition each objective is meant to be used under: as declared, else where the rows leave no doubt.

    No doubt: an objective measured under one condition, or under one at its smallest budget (studies measure further
    conditions at their last budget). An objective that is in doubt is left out: all its conditions count alike.
    """
    found: dict[str, str] = {}
    for objective, own in table[table["objective"] != BASE].groupby("objective"):
        smallest = own.loc[own["budget"] == own["budget"].min(), "condition"].unique()
        if first and objective in first:
            found[str(objective)] = first[str(objective)]
        elif len(smallest) == 1:
            found[str(objective)] = str(smallest[0])
    return found


def _reference(table: pd.DataFrame, against: Against | None) -> pd.DataFrame:
    if against is None:
        found = table[table["objective"] == BASE]
        if found.empty:
            raise StatsError("no rows of the base model: there is nothing to contrast with")
        return found
    objective, budget = against
    found = table[table["objective"] == objective]
    if found.empty or objective == BASE:
        known = ", ".join(sorted(set(table["objective"].unique()) - {BASE}))
        raise StatsError(f"no objective {objective} to contrast with: there are {known or 'none'}")
    if budget is None:
        return found
    at = found[found["budget"] == budget]
    if at.empty:
        known = ", ".join(map(str, sorted(found["budget"].unique())))
        raise StatsError(f"{objective} was not measured at {budget}: its budgets are {known}")
    return at


def _tuned(table: pd.DataFrame, against: Against | None) -> pd.DataFrame:
    """The checkpoints to contrast: all but the base and the reference itself."""
    tuned = table[table["objective"] != BASE]
    if against is None:
        return tuned
    same = tuned["objective"] == against[0]
    return tuned[~(same if against[1] is None else same & (tuned["budget"] == against[1]))]


def _once(table: pd.DataFrame, keys: list[str]) -> None:
    twice = table.duplicated(keys)
    if twice.any():
        row = table[twice].iloc[0]
        who = "the base" if row["objective"] == BASE else f"{row['objective']} at {row['budget']}"
        raise StatsError(
            f"{who} answered {row['item_id']} twice under one prompt and sample: rows of two runs were pooled"
        )


def _forms(
    tuned: pd.DataFrame, reference: pd.DataFrame, first: Mapping[str, str], against: Against | None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Add `form`: what else than the item a pair must share, the rendered prompt or being each one's own first."""
    tuned = tuned.assign(form=tuned["template_hash"])
    reference = reference.assign(form=reference["template_hash"])
    if against is None or against[0] not in first:
        return tuned, reference
    of_reference = first[against[0]]
    own = tuned["objective"].map(dict(first))
    differs = (tuned["condition"] == own) & (own != of_reference)
    tuned["form"] = tuned["form"].where(~differs, OWN)
    again = reference[reference["condition"] == of_reference].assign(form=OWN)
    return tuned, pd.concat([reference, again], ignore_index=True)


def _of_measure(
    measure: Measure, chosen: pd.DataFrame, asked: pd.Series, first: Mapping[str, str], against: Against | None
) -> list[Contrast]:
    names, strata = codes(chosen["stratum"])
    value, base = chosen["value"].to_numpy(float), chosen[f"{measure.value}_base"].to_numpy(float)
    clusters, matched = chosen["cluster"].to_numpy(np.intp), (chosen["found"] == "both").to_numpy()
    everything = Pairs(value, base, strata, clusters, chosen["seed"].to_numpy(np.intp), matched)
    forms = chosen["form"].to_numpy(object)
    expected = asked.rename("asked").reset_index()
    found = []
    sequential = is_sequential(chosen).to_numpy()
    for line, at in groups(chosen, KEY):
        own = everything.at(at)
        if sequential[at].any():
            own = replace(own, turns=chosen["turn"].to_numpy(np.intp)[at])
            found.append(_contrast(_apart(line, forms[at]), measure, own, names, 0, first, against))
            continue
        told = set(forms[at])
        hoped = expected[expected["form"].isin(told)]
        if "budget" in hoped:
            hoped = hoped[hoped["budget"] == line["budget"]]
        if "seed" in hoped:
            hoped = hoped[hoped["seed"].isin(own.seeds)]
        times = 1 if "seed" in hoped else len(np.unique(own.seeds))
        found.append(
            _contrast(_apart(line, forms[at]), measure, own, names, int(hoped["asked"].sum()) * times, first, against)
        )
    return found


def _apart(line: dict[str, object], forms: NDArray[np.object_]) -> dict[str, object]:
    """With whether its pairs share the item alone."""
    return line | {"unpaired": OWN if set(forms) == {OWN} else ""}


def _contrast(
    line: dict[str, object],
    measure: Measure,
    asked: Pairs,
    names: list[str],
    expected: int,
    first: Mapping[str, str],
    against: Against | None,
) -> Contrast:
    apart, line["prompts"] = line.pop("unpaired"), ""
    pairs = asked.at(asked.matched)
    absent = np.isnan(pairs.value - pairs.base)
    reason = why_not(absent, pairs.strata, names, measure)
    if not len(pairs.value):
        who = "the base" if against is None else against[0]
        reason = f"no pair: {who} was not measured under the same rendered prompts"
    elif apart and against is not None:
        line["prompts"] = f"{apart} test prompt: {line['condition']} against {first[against[0]]}"
    scored = pairs.at(~absent)
    own = first.get(str(line["objective"]), line["condition"])
    declared = own == line["condition"]
    family = f"{measure.axis} @ {line['budget']}, {'primary' if measure.primary else 'secondary'}"
    line |= {
        "seeds": ", ".join(str(s) for s in np.unique(asked.seeds)),
        "axis": measure.axis,
        "measure": measure.name,
        "label": measure.label,
        "primary": measure.primary,
        "first": declared,
        "family": family if declared else f"{family}, further conditions",
        "n": len(scored.value),
        "n_clusters": len(np.unique(scored.clusters)),
        "n_unpaired": len(asked.value) - len(pairs.value) + max(expected - len(pairs.value), 0),
        "n_unscored": int(absent.sum()),
        "note": reason,
    }
    return Contrast(line, measure, pairs, len(names), None if reason else scored)
