"""Each checkpoint against the base, or another one: paired by item, clustered by prompt, corrected inside a family."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from leeway.stats.anytime import Anytime
from leeway.stats.bounds import MIN_MOVED, TIE
from leeway.stats.clustered import detectable, extremes, mcnemar, over_runs, standard_error
from leeway.stats.intervals import LEVEL, RESAMPLES, Floats, Ints, stratum_shares
from leeway.stats.multiplicity import correct
from leeway.stats.pairing import KEY, Against, Contrast, Pairs, contrasted
from leeway.stats.turns import FIXED, SEQUENTIAL
from leeway.stats.wild import wild_cluster

COLUMNS = [*KEY, "seeds", "axis", "measure", "label", "primary", "first", "base", "rate", "difference", "low", "high"]
COLUMNS += ["se", "mde", "p", "p_holm", "p_mcnemar", "family", "family_size", "if_best", "if_worst", "low_runs"]
COLUMNS += ["high_runs", "n", "n_clusters", "n_moved", "n_unpaired", "n_unscored", "design", "note"]
NUMBERS = ("base", "rate", "difference", "low", "high", "se", "mde", "p", "p_mcnemar", "low_runs", "high_runs")


def contrasts(
    rows: pd.DataFrame,
    conditions: Mapping[str, str],
    against: Against | None = None,
    *,
    first: Mapping[str, str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """One line per checkpoint, test condition and measure: checkpoint − reference, 95% interval, p, Holm's p.

    The reference is the base under the same rendered prompt; `against=("sft", None)` takes another objective at the
    same budget, `("sft", 400_000)` at that one (its numbers then stand under `base`). Training seeds are pooled, a
    prompt being one cluster over all of them: `low` to `high` speaks of new prompts, `low_runs` to `high_runs` of new
    training runs too, and is NaN with one seed. Families: an axis at a budget, primary measures and the others apart,
    under the condition each objective is meant to be used under (`first`: objective → condition); further conditions
    are families of their own. What was asked until decided (`design` "sequential") has an interval and a p that hold
    wherever one stops (`stats.anytime`), and no `se`, `mde` or interval over runs. Formulas and sources:
    docs/statistics.md.
    """
    found, table = contrasted(rows, conditions, against=against, first=first)
    for axis in dict.fromkeys(c.measure.axis for c in found):
        columns = Columns(np.unique(table.loc[table["eval"] == axis, "cluster"].to_numpy(np.intp)))
        for contrast in (c for c in found if c.measure.axis == axis):
            _describe(contrast, columns)
            if contrast.sequential:
                _at_any_time(contrast)
        columns.test(resamples, seed)
    uncorrected = [c for c in COLUMNS if c not in ("p_holm", "family_size")]
    return correct(pd.DataFrame([c.line for c in found], columns=uncorrected))[COLUMNS]


def _describe(contrast: Contrast, columns: Columns) -> None:
    line = contrast.line
    line |= dict.fromkeys(NUMBERS, float("nan")) | {"n_moved": 0, "design": FIXED}
    best, worst = extremes(contrast.pairs, contrast.strata, contrast.measure.better)
    line |= {"if_best": best, "if_worst": worst}
    if contrast.scored is not None:
        line |= rates_of(contrast.scored)
        if not contrast.sequential:
            columns.add(contrast)


def _at_any_time(contrast: Contrast) -> None:
    """Difference, interval and p of a contrast whose prompts were asked until it was decided, or ran out."""
    line, seeds = contrast.line, str(contrast.line["seeds"])
    line["design"] = SEQUENTIAL
    if contrast.scored is None:
        return
    moved = contrast.moves
    of = Anytime(moved)
    ends = sorted((of.low((1 - LEVEL) / 2), of.high((1 - LEVEL) / 2)))  # in order even where they exclude everything
    line |= {"difference": round(float(moved.mean()), 10), "low": round(ends[0], 10), "high": round(ends[1], 10)}
    line |= {"p": of.p, "n_moved": int((np.abs(moved) > TIE).sum())}
    notes = [f"sequential design: {len(moved)} prompts asked", *([] if "," in seeds else ["one training seed"])]
    line["note"] = "; ".join([*notes, *filter(None, [str(line["prompts"])])])


def rates_of(scored: Pairs) -> dict[str, float]:
    """The two rates of a contrast."""
    share = stratum_shares(scored.strata)
    return {"base": round(float(share @ scored.base), 10), "rate": round(float(share @ scored.value), 10)}


class Columns:
    """The contrasts of one axis as columns over its clusters: what each cluster pulls, and weighs."""

    def __init__(self, clusters: Ints) -> None:
        self._clusters = clusters
        self.contrasts: list[Contrast] = []
        self._pulls: list[Floats] = []
        self._weights: list[Floats] = []

    def add(self, contrast: Contrast) -> None:
        scored = contrast.scored
        assert scored is not None
        share = stratum_shares(scored.strata)
        where, size = np.searchsorted(self._clusters, scored.clusters), len(self._clusters)
        difference = share * (scored.value - scored.base)
        self._pulls.append(np.bincount(where, weights=difference, minlength=size).astype(np.float64))
        self._weights.append(np.bincount(where, weights=share, minlength=size).astype(np.float64))
        self.contrasts.append(contrast)

    def matrices(self) -> tuple[Floats, Floats]:
        """Pulls and weights, (clusters, contrasts)."""
        return np.column_stack(self._pulls), np.column_stack(self._weights)

    def test(self, resamples: int, seed: int) -> None:
        """Fill difference, intervals, errors, p and the notes of every line, all with one set of flips."""
        if not self.contrasts:
            return
        tested = wild_cluster(*self.matrices(), resamples=resamples, seed=seed)
        for m, contrast in enumerate(self.contrasts):
            scored, line = contrast.scored, contrast.line
            assert scored is not None
            for name in ("difference", "low", "high", "p"):
                line[name] = float(getattr(tested, name)[m])
            moved, se = int(tested.moved[m]), standard_error(scored)
            clusters = len(np.unique(scored.clusters))
            runs = over_runs(float(tested.difference[m]), se, scored)
            line |= {"n_moved": moved, "se": round(se, 10), "mde": round(detectable(se, clusters, moved), 10)}
            line |= {"low_runs": round(runs[0], 10), "high_runs": round(runs[1], 10)}
            line |= {"p_mcnemar": round(mcnemar(scored), 10)}
            line["note"] = note(line, clusters, moved, se)


def note(line: Mapping[str, object], clusters: int, moved: int, se: float, *, at_a_margin: bool = False) -> str:
    """What weakens a contrast; tests at a margin can tell where those of no difference cannot."""
    notes = [] if "," in str(line["seeds"]) else ["one training seed"]
    if line["prompts"]:
        notes.append(str(line["prompts"]))
    if at_a_margin and moved < MIN_MOVED:
        notes.append(f"only {_prompts(moved)} of {clusters} moved: interval and p are from a bound")
    elif clusters < MIN_MOVED:
        notes.append(f"only {_prompts(clusters)}: no test can reject, whatever they say")
    elif moved < MIN_MOVED:
        few = f"only {_prompts(moved)}" if moved else "no prompt"
        notes.append(f"{few} moved: no test can reject, the interval is a bound")
    elif np.isnan(se):
        notes.append("every prompt moved alike: no standard error, the interval is a bound")
    return "; ".join(notes)


def _prompts(n: int) -> str:
    return "1 prompt" if n == 1 else f"{n} prompts"
