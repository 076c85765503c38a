"""The rate of every measure at every checkpoint, with its interval and what could not be scored."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from leeway.stats.anytime import Anytime
from leeway.stats.intervals import LEVEL, Floats, Ints, estimate
from leeway.stats.measures import CHECKPOINT, Measure, codes, groups, measures, observations, why_not
from leeway.stats.turns import common, is_sequential, of_rates

COLUMNS = [*CHECKPOINT, "axis", "measure", "label", "primary", "rate", "low", "high"]
COLUMNS += ["n", "n_unscored", "n_clusters", "method", "reason", "rate_if_0", "rate_if_1", "better"]


def rates(rows: pd.DataFrame, conditions: Mapping[str, str], *, pool_seeds: bool = False) -> pd.DataFrame:
    """One line per checkpoint, test condition and measure.

    `n` counts scored rows; `rate` is NaN with a `reason` where too many are unscored. `pool_seeds` takes the
    answers of all training seeds together (`seed` is then −1), each prompt still being one cluster. `rate_if_0` and
    `rate_if_1` are the rates if all that is unscored had been 0, or 1: bounds, there where the rate is withheld too.
    `better` says which way is better (`higher`, `lower`, or nothing).
    """
    table = observations(rows, conditions)
    if pool_seeds:
        table = common(table, [c for c in CHECKPOINT if c != "seed"])
        table["seed"] = -1
    lines: list[dict[str, object]] = []
    for measure in measures(table):
        chosen = measure.select(table)
        names, strata = codes(chosen["stratum"])
        values, clusters = chosen["value"].to_numpy(float), chosen["cluster"].to_numpy(np.intp)
        sequential = is_sequential(chosen).to_numpy()
        for checkpoint, at in groups(chosen, CHECKPOINT):
            lines.append(checkpoint | _line(measure, values[at], strata[at], clusters[at], names))
            if sequential[at].any() and not lines[-1]["reason"]:
                scored = at[~np.isnan(values[at])]
                turns = chosen["turn"].to_numpy(np.intp)[scored]
                lines[-1] |= _at_any_time(of_rates(values[scored], strata[scored], turns))
    frame = pd.DataFrame(lines, columns=COLUMNS)
    base_first = (frame["objective"] != "base").astype(int)
    return frame.iloc[base_first.argsort(kind="stable")].reset_index(drop=True)


def _line(measure: Measure, values: Floats, strata: Ints, clusters: Ints, names: list[str]) -> dict[str, object]:
    absent = np.isnan(values)
    reason = why_not(absent, strata, names, measure)
    scored = ~absent
    within = np.unique(clusters[scored], return_inverse=True)[1].astype(np.intp)
    line: dict[str, object] = {
        "axis": measure.axis,
        "measure": measure.name,
        "label": measure.label,
        "primary": measure.primary,
        "n": int(scored.sum()),
        "n_unscored": int(absent.sum()),
        "n_clusters": int(within.max()) + 1 if len(within) else 0,
        "method": "",
        "reason": reason,
        "rate_if_0": _filled(values, strata, names, 0.0),
        "rate_if_1": _filled(values, strata, names, 1.0),
        "better": measure.better,
    }
    if reason:
        return line | {"rate": float("nan"), "low": float("nan"), "high": float("nan")}
    found = estimate(values[scored], strata[scored], within)
    return line | {"rate": found.mean, "low": found.low, "high": found.high, "method": found.method}


def _at_any_time(of: Anytime) -> dict[str, object]:
    """The interval of a rate whose prompts were asked until something was decided."""
    ends = sorted((of.low((1 - LEVEL) / 2), of.high((1 - LEVEL) / 2)))
    return {"low": round((ends[0] + 1) / 2, 10), "high": round((ends[1] + 1) / 2, 10), "method": "anytime"}


def _filled(values: Floats, strata: Ints, names: list[str], unscored: float) -> float:
    """The mean over strata with everything unscored set to one value, strata that were not asked as well."""
    counts = np.bincount(strata, minlength=len(names))
    sums = np.bincount(strata, weights=np.where(np.isnan(values), unscored, values), minlength=len(names))
    inside = np.where(counts > 0, sums / np.maximum(counts, 1), unscored)
    return round(float(inside.mean()), 10)
