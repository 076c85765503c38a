"""Each checkpoint against the base: paired by item, clustered by prompt, corrected inside a family."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from leeway.stats.intervals import RESAMPLES, Floats, Ints, stratum_shares
from leeway.stats.measures import (
    BASE,
    VALUES,
    Measure,
    StatsError,
    codes,
    groups,
    measures,
    observations,
    why_not,
)
from leeway.stats.multiplicity import correct
from leeway.stats.wild import MIN_MOVED, wild_cluster

PAIR = ["eval", "attack", "item_id", "sample", "template_hash"]
KEY = ["objective", "budget", "condition"]
COLUMNS = [*KEY, "seeds", "axis", "measure", "label", "primary", "base", "rate", "difference", "low", "high"]
COLUMNS += ["p", "p_holm", "family", "family_size", "n", "n_clusters", "n_moved", "n_unpaired", "n_unscored"]
COLUMNS += ["note"]


def contrasts(
    rows: pd.DataFrame, conditions: Mapping[str, str], *, resamples: int = RESAMPLES, seed: int = 0
) -> pd.DataFrame:
    """One line per checkpoint, test condition and measure: checkpoint − base, 95% interval, p, Holm's p.

    A checkpoint is paired with the base's answers to the same item under the same rendered prompt. Training
    seeds are pooled (a prompt is one cluster over all of them): with one seed, or a few, the interval speaks
    of new prompts, not of a new training run. Families: an axis at a budget, primary measures and the others
    apart.
    """
    table = observations(rows, conditions)
    paired = _paired(table)
    base = table[table["objective"] == BASE]
    found = measures(table)
    lines: list[dict[str, object]] = []
    for axis in dict.fromkeys(measure.axis for measure in found):
        columns = _Columns(np.unique(table.loc[table["eval"] == axis, "cluster"].to_numpy(np.intp)))
        for measure in (m for m in found if m.axis == axis):
            asked = measure.select(base)["template_hash"].value_counts().to_dict()
            lines += _of_measure(measure, measure.select(paired), asked, columns)
        columns.test(resamples, seed)
    uncorrected = [c for c in COLUMNS if c not in ("p_holm", "family_size")]
    return correct(pd.DataFrame(lines, columns=uncorrected))[COLUMNS]


def _paired(table: pd.DataFrame) -> pd.DataFrame:
    """The checkpoints' observations, each beside the base's value where the base has the same question."""
    base = table[table["objective"] == BASE]
    if base.empty:
        raise StatsError("no rows of the base model: there is nothing to contrast with")
    twice = base.duplicated(PAIR)
    if twice.any():
        item = base.loc[twice, "item_id"].iloc[0]
        raise StatsError(f"the base answered {item} twice under one prompt and sample: rows of two runs were pooled")
    tuned = table[table["objective"] != BASE]
    again = tuned.duplicated(["objective", "seed", "budget", *PAIR])
    if again.any():
        row = tuned[again].iloc[0]
        raise StatsError(f"{row['objective']} at {row['budget']} answered {row['item_id']} twice: rows were pooled")
    return tuned.merge(base[[*PAIR, *VALUES]], on=PAIR, how="left", suffixes=("", "_base"), indicator="found")


@dataclass(frozen=True)
class _Pairs:
    """One contrast's answers, scored or not, beside the base's."""

    value: Floats
    base: Floats
    strata: Ints
    clusters: Ints
    matched: NDArray[np.bool_]

    def at(self, chosen: NDArray[np.bool_] | Ints) -> _Pairs:
        value, base, strata = self.value[chosen], self.base[chosen], self.strata[chosen]
        return _Pairs(value, base, strata, self.clusters[chosen], self.matched[chosen])


def _of_measure(
    measure: Measure, chosen: pd.DataFrame, asked: dict[Hashable, int], columns: _Columns
) -> list[dict[str, object]]:
    """The lines of one measure; what its test finds is filled in by `columns.test`."""
    names, strata = codes(chosen["stratum"])
    value, base = chosen["value"].to_numpy(float), chosen[f"{measure.value}_base"].to_numpy(float)
    clusters, matched = chosen["cluster"].to_numpy(np.intp), (chosen["found"] == "both").to_numpy()
    everything = _Pairs(value, base, strata, clusters, matched)
    seeds, templates = chosen["seed"].to_numpy(), chosen["template_hash"].to_numpy(object)
    lines = []
    for line, at in groups(chosen, KEY):
        of_seeds = [int(s) for s in np.unique(seeds[at])]
        expected = len(of_seeds) * sum(asked.get(h, 0) for h in np.unique(templates[at]))
        line["seeds"] = ", ".join(map(str, of_seeds))
        lines.append(line)
        _describe(line, measure, everything.at(at), columns, names=names, expected=expected)
    return lines


def _describe(
    line: dict[str, object],
    measure: Measure,
    asked: _Pairs,
    columns: _Columns,
    *,
    names: list[str],
    expected: int,
) -> None:
    pairs = asked.at(asked.matched)
    absent = np.isnan(pairs.value - pairs.base)
    reason = why_not(absent, pairs.strata, names, measure)
    if not len(pairs.value):
        reason = "no pair: the base was not measured under the same rendered prompts"
    scored = pairs.at(~absent)
    line |= {
        "axis": measure.axis,
        "measure": measure.name,
        "label": measure.label,
        "primary": measure.primary,
    }
    line |= dict.fromkeys(("base", "rate", "difference", "low", "high", "p"), float("nan"))
    line |= {
        "family": f"{measure.axis} @ {line['budget']}, {'primary' if measure.primary else 'secondary'}",
        "n": len(scored.value),
        "n_clusters": len(np.unique(scored.clusters)),
        "n_moved": 0,
        "n_unpaired": len(asked.value) - len(pairs.value) + max(expected - len(pairs.value), 0),
        "n_unscored": int(absent.sum()),
        "note": reason,
    }
    if not reason:
        columns.add(line, scored)


class _Columns:
    """The contrasts of one axis as columns over its clusters, tested with one set of flips."""

    def __init__(self, clusters: Ints) -> None:
        self._clusters = clusters
        self._lines: list[dict[str, object]] = []
        self._pulls: list[Floats] = []
        self._weights: list[Floats] = []

    def add(self, line: dict[str, object], scored: _Pairs) -> None:
        share = stratum_shares(scored.strata)
        line["base"] = round(float(share @ scored.base), 10)
        line["rate"] = round(float(share @ scored.value), 10)
        where, size = np.searchsorted(self._clusters, scored.clusters), len(self._clusters)
        difference = share * (scored.value - scored.base)
        self._pulls.append(np.bincount(where, weights=difference, minlength=size).astype(np.float64))
        self._weights.append(np.bincount(where, weights=share, minlength=size).astype(np.float64))
        self._lines.append(line)

    def test(self, resamples: int, seed: int) -> None:
        """Fill difference, interval, p and the notes of every line."""
        if not self._lines:
            return
        pulls_CM, weights_CM = np.column_stack(self._pulls), np.column_stack(self._weights)
        tested = wild_cluster(pulls_CM, weights_CM, resamples=resamples, seed=seed)
        for m, line in enumerate(self._lines):
            for name in ("difference", "low", "high", "p"):
                line[name] = float(getattr(tested, name)[m])
            line["n_moved"] = int(tested.moved[m])
            line["note"] = _note(str(line["seeds"]), int(tested.moved[m]))


def _note(seeds: str, moved: int) -> str:
    notes = [] if "," in seeds else ["one training seed"]
    if moved < MIN_MOVED:
        notes.append(f"only {moved} prompts moved: Clopper–Pearson bound, no test can reject")
    return "; ".join(notes)
