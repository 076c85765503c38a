"""Pair each response with its reference: item by item, under the same rendered prompt, seed by seed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from leeway.stats import metrics
from leeway.stats.anytime import cluster_means, common_prefix, is_sequential
from leeway.stats.intervals import Floats, Ints
from leeway.stats.metrics import BASE, POOLED_CHECKPOINT, VALUES, Measure, StatsError, analysis_table, measures

ContrastReference = tuple[str, int | None]  # objective and budget; no budget: the same budget

ITEM = ["eval", "attack", "item_id", "sample", "question"]
PAIR = [*ITEM, "template_hash"]
OWN = "each under its own"  # in place of a template hash, if two objectives are used under different prompts


@dataclass(frozen=True)
class Pairs:
    """One contrast's responses, scored or not, and the reference's."""

    value: Floats
    base: Floats
    strata: Ints
    clusters: Ints
    seeds: Ints
    matched: NDArray[np.bool_]
    positions: Ints | None = None  # of each prompt in the order of a sequential design

    def subset(self, chosen: NDArray[np.bool_] | Ints) -> Pairs:
        value, base, strata = self.value[chosen], self.base[chosen], self.strata[chosen]
        positions = None if self.positions is None else self.positions[chosen]
        return Pairs(value, base, strata, self.clusters[chosen], self.seeds[chosen], self.matched[chosen], positions)


@dataclass(frozen=True)
class Contrast:
    """A checkpoint against its reference on one measure; `scored` is None if the number is withheld."""

    line: dict[str, object]  # the columns that all tables share
    measure: Measure
    pairs: Pairs  # all that have a partner
    strata: int  # number of strata of the measure
    scored: Pairs | None

    @property
    def sequential(self) -> bool:
        return self.pairs.positions is not None

    @property
    def cluster_differences(self) -> Floats:
        """Mean difference of each prompt, (T,), in the order of the sequential design.

        Only pairs scored on both sides count; a prompt without any is left out.
        """
        assert self.scored is not None
        assert self.scored.positions is not None
        return cluster_means(self.scored.value - self.scored.base, self.scored.strata, self.scored.positions)


def paired_contrasts(
    rows: pd.DataFrame,
    conditions: Mapping[str, str],
    *,
    against: ContrastReference | None = None,
    first: Mapping[str, str] | None = None,
    only: Collection[str] | None = None,
) -> tuple[list[Contrast], pd.DataFrame]:
    """Return the contrast of every checkpoint on every measure (or those in `only`), and the analysis table.

    The reference is the base, or another objective at the same budget (`("sft", None)`) or at a fixed one (`("sft",
    400_000)`); then seeds are paired too. A pair has the same item, attack and sample under the same rendered prompt.
    Exception: if two objectives are used under different prompts (`first`), the item alone defines the pair, and the
    note reports it. Raises StatsError without a reference, or for duplicate responses.
    """
    table = analysis_table(rows, conditions)
    declared = first_conditions(table, first)
    reference = _reference(table, against)
    keys = [] if against is None else ["seed", "budget"] if against[1] is None else ["seed"]
    _check_unique(reference, [*PAIR, *(["seed", "budget"] if keys else [])])
    tuned = table[table["objective"] != BASE]
    if against is not None:  # without the reference itself
        same = tuned["objective"] == against[0]
        tuned = tuned[~(same if against[1] is None else same & (tuned["budget"] == against[1]))]
    _check_unique(tuned, ["objective", "seed", "budget", *PAIR])
    tuned, reference = _with_form(tuned, reference, declared, against)
    columns = [*ITEM, "form", *keys]
    paired = tuned.merge(reference[[*columns, *VALUES]], on=columns, how="left", suffixes=("", "_base"), indicator=True)
    paired = common_prefix(paired, POOLED_CHECKPOINT, paired=True)
    found: list[Contrast] = []
    for measure in measures(table):
        if only is None or measure.name in only:
            sizes = measure.select(reference).groupby(["form", *keys]).size()
            found += _measure_contrasts(measure, measure.select(paired), sizes, declared, against)
    return found, table


def first_conditions(table: pd.DataFrame, first: Mapping[str, str] | None) -> dict[str, str]:
    """Return the condition each objective is intended for: as declared, or inferred from the rows if unambiguous.

    Unambiguous: the objective has one condition, or one at its smallest budget (studies measure further conditions at
    their last budget). Ambiguous objectives are left out: all their conditions count the same.
    """
    found: dict[str, str] = {}
    for objective, own in table[table["objective"] != BASE].groupby("objective"):
        smallest = own.loc[own["budget"] == own["budget"].min(), "condition"].unique()
        if first and objective in first:
            found[str(objective)] = first[str(objective)]
        elif len(smallest) == 1:
            found[str(objective)] = str(smallest[0])
    return found


def _reference(table: pd.DataFrame, against: ContrastReference | None) -> pd.DataFrame:
    if against is None:
        found = table[table["objective"] == BASE]
        if found.empty:
            raise StatsError("no rows of the base model: contrasts need a reference")
        return found
    objective, budget = against
    found = table[table["objective"] == objective]
    if found.empty or objective == BASE:
        known = ", ".join(sorted(set(table["objective"].unique()) - {BASE}))
        raise StatsError(f"no objective {objective} to contrast with (the rows have {known or 'none'})")
    if budget is None:
        return found
    own = found[found["budget"] == budget]
    if own.empty:
        known = ", ".join(map(str, sorted(found["budget"].unique())))
        raise StatsError(f"{objective} was not measured at {budget} (its budgets: {known})")
    return own


def _check_unique(table: pd.DataFrame, keys: list[str]) -> None:
    duplicates = table.duplicated(keys)
    if duplicates.any():
        row = table[duplicates].iloc[0]
        name = "the base" if row["objective"] == BASE else f"{row['objective']} at {row['budget']}"
        what = f"{name} has two responses to {row['item_id']} with one prompt and sample"
        raise StatsError(f"{what}: rows of two runs were pooled")


def _with_form(
    tuned: pd.DataFrame, reference: pd.DataFrame, first: Mapping[str, str], against: ContrastReference | None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Add `form`, which a pair shares beyond the item: the rendered prompt, or OWN for each objective's own prompt."""
    tuned = tuned.assign(form=tuned["template_hash"])
    reference = reference.assign(form=reference["template_hash"])
    if against is None or against[0] not in first:
        return tuned, reference
    reference_condition = first[against[0]]
    own = tuned["objective"].map(dict(first))
    differs = (tuned["condition"] == own) & (own != reference_condition)
    tuned["form"] = tuned["form"].where(~differs, OWN)
    copy = reference[reference["condition"] == reference_condition].assign(form=OWN)
    return tuned, pd.concat([reference, copy], ignore_index=True)


def _measure_contrasts(
    measure: Measure,
    chosen: pd.DataFrame,
    sizes: pd.Series,
    first: Mapping[str, str],
    against: ContrastReference | None,
) -> list[Contrast]:
    """Return the contrasts of one measure; `sizes` are the reference's numbers of responses by form (and seed)."""
    names, strata = metrics.factorize(chosen["stratum"])
    value, base = chosen["value"].to_numpy(float), chosen[f"{measure.value}_base"].to_numpy(float)
    clusters, matched = chosen["cluster"].to_numpy(np.intp), (chosen["_merge"] == "both").to_numpy()
    everything = Pairs(value, base, strata, clusters, chosen["seed"].to_numpy(np.intp), matched)
    forms = chosen["form"].to_numpy(object)
    reference = sizes.rename("size").reset_index()
    found = []
    sequential = is_sequential(chosen).to_numpy()
    for line, at in metrics.group_indices(chosen, POOLED_CHECKPOINT):
        own, own_forms, expected = everything.subset(at), set(forms[at]), 0
        if sequential[at].any():
            own = replace(own, positions=chosen["position"].to_numpy(np.intp)[at])
        else:
            expected = _expected_pairs(reference[reference["form"].isin(own_forms)], own.seeds, line["budget"])
        found.append(_contrast(line, measure, own, names, expected, first, against, own_prompts=own_forms == {OWN}))
    return found


def _expected_pairs(reference: pd.DataFrame, seeds: Ints, budget: object) -> int:
    """Return the number of pairs if every response of the reference had a partner in every seed."""
    if "budget" in reference:
        reference = reference[reference["budget"] == budget]
    if "seed" in reference:
        return int(reference.loc[reference["seed"].isin(seeds), "size"].sum())
    return int(reference["size"].sum()) * len(np.unique(seeds))


def _contrast(
    line: dict[str, object],
    measure: Measure,
    every: Pairs,
    names: list[str],
    expected: int,
    first: Mapping[str, str],
    against: ContrastReference | None,
    *,
    own_prompts: bool,
) -> Contrast:
    pairs, prompts = every.subset(every.matched), ""
    absent = np.isnan(pairs.value - pairs.base)
    reason = metrics.withheld_reason(absent, pairs.strata, pairs.clusters, names, measure)
    if not len(pairs.value):
        name = "the base" if against is None else against[0]
        reason = f"no pair: {name} was not measured under the same rendered prompts"
    elif own_prompts and against is not None:
        prompts = f"{OWN} test prompt: {line['condition']} against {first[against[0]]}"
    scored = pairs.subset(~absent)
    declared = first.get(str(line["objective"]), line["condition"]) == line["condition"]
    kind = measure.name if measure.log_odds else "primary" if measure.primary else "secondary"
    family = f"{measure.axis} @ {line['budget']}, {kind}"
    line |= {"axis": measure.axis, "measure": measure.name, "label": measure.label, "primary": measure.primary}
    line |= {"seeds": ", ".join(str(s) for s in np.unique(every.seeds)), "prompts": prompts, "first": declared}
    line |= {"family": family if declared else f"{family}, further conditions", "note": reason}
    line |= {"n": len(scored.value), "n_clusters": len(np.unique(scored.clusters)), "n_unscored": int(absent.sum())}
    line["n_unpaired"] = len(every.value) - len(pairs.value) + max(expected - len(pairs.value), 0)
    return Contrast(line, measure, pairs, len(names), None if reason else scored)
