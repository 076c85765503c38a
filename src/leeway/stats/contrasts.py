"""Each checkpoint against the base, or another one: paired by item, clustered by prompt, corrected inside a family.

Standard errors by prompt, what they could have detected, and intervals that cover new training runs.

Families of tests, and Holm's correction inside each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd
from scipy.stats import beta, binomtest, norm, t

from leeway.stats.anytime import FIXED, SEQUENTIAL, Anytime
from leeway.stats.cluster_tests import MIN_MOVED, TIE, wild_cluster
from leeway.stats.intervals import LEVEL, RESAMPLES, Floats, Ints, stratum_shares
from leeway.stats.pairing import KEY, Against, Contrast, Pairs, contrasted

POWER = 0.80
NOTHING = 1e-15
FLOOR = {2: 0.5}  # the share of the variance between runs that is kept however much noise explains it: by simulation
FLOOR_MORE = 0.1


def standard_error(pairs: Pairs) -> float:
    """Paired, clustered standard error of the difference; NaN where nothing varies, or one prompt is all there is.

    √( C/(C − 1) · Σ_c (Σ_{i∈c} s_i (d_i − d̄_{a(i)}))² ), s_i the share of pair i in the mean over strata (Miller
    2024, arXiv 2411.00640, §2.2 and 4.2, with the small-sample factor of Liang & Zeger as statsmodels has it).
    """
    residual = _residuals(pairs)
    where, count = _codes(pairs.clusters)
    pulls = np.bincount(where, weights=residual)
    variance = float(pulls @ pulls) * count / max(count - 1, 1)
    return math.sqrt(variance) if count > 1 and variance > NOTHING else float("nan")


def detectable(se: float, clusters: int, moved: int) -> float:
    """The smallest true difference seen with 80% power at two-sided 5% (the minimal detectable effect).

    (t_{0.975} + t_{0.80}) · se with C − 1 degrees of freedom (Bloom 1995, Eval. Rev. 19:547). Where fewer than
    MIN_MOVED prompts moved the error is not known, and it is never less than the share δ of prompts that must move
    for MIN_MOVED of C to do so in 80% of samples, P(Bin(C, δ) ≥ MIN_MOVED) = 0.80: fewer cannot reject. NaN below
    MIN_MOVED prompts.
    """
    if clusters < MIN_MOVED:
        return float("nan")
    df = clusters - 1
    known = 0.0 if math.isnan(se) else float(t.ppf(0.5 + LEVEL / 2, df) + t.ppf(POWER, df)) * se
    if moved >= MIN_MOVED and known:
        return min(known, 1.0)
    return min(max(known, float(beta.ppf(POWER, MIN_MOVED, clusters - MIN_MOVED + 1))), 1.0)


def items_needed(
    difference: float, se: float, clusters: int, bound: float, *, power: float = POWER, alpha: float = 0.05
) -> float:
    """How many prompts more would tell the difference from a bound, one-sided, if it is what was seen.

    C' = C ((z_{1−α} + z_power) · se / |difference − bound|)²; the answer is C' − C, not below 0, and infinity where the
    difference lies on the bound. Where nothing varied (se is NaN) C' is what Clopper–Pearson needs: (1 − |difference −
    bound|)^C' ≤ α.
    """
    gap = abs(difference - bound)
    if math.isnan(gap):
        return float("nan")
    if gap < 1e-12:
        return math.inf
    if math.isnan(se):
        needed = math.log(alpha) / math.log1p(-min(gap, 1 - 1e-12))
    else:
        needed = clusters * (float(norm.ppf(1 - alpha) + norm.ppf(power)) * se / gap) ** 2
    return float(max(math.ceil(needed - 1e-9) - clusters, 0))


def mcnemar(pairs: Pairs) -> float:
    """Exact p of McNemar's test (1947); NaN unless every prompt has one pair, and both answers are 0 or 1."""
    binary = np.isin(pairs.value, (0.0, 1.0)).all() and np.isin(pairs.base, (0.0, 1.0)).all()
    if not binary or len(np.unique(pairs.clusters)) != len(pairs.clusters):
        return float("nan")
    up, down = int((pairs.value > pairs.base).sum()), int((pairs.value < pairs.base).sum())
    return float(binomtest(up, up + down).pvalue) if up + down else 1.0


def over_runs(difference: float, se: float, pairs: Pairs) -> tuple[float, float]:
    """95% interval that covers new prompts and new training runs; NaN with one seed, or where nothing varies.

    Prompts and S seeds are crossed, so that with D_s the difference of one seed

        half² = t²_{0.975, C−1} V_prompt + t²_{0.975, S−1} max(V_run − V_both, f V_run)

    V_prompt is the clustered variance, V_run = Var(D_s)/S, V_both the variance of prompt × seed, which both contain
    (Cameron, Gelbach & Miller 2011, JBES 29:238: V_prompt + V_run − V_both). Each part has the degrees of freedom it
    was estimated with, as in Howe (1974, JASA 69:789); one t for the sum covers too little or far too much with 2 to
    5 seeds. f is ½ for two seeds and ⅒ for more, found by simulation (benchmarks/statistics).
    """
    seeds = np.unique(pairs.seeds)
    S = len(seeds)
    where, C = _codes(pairs.clusters)
    if S < 2 or math.isnan(se):
        return float("nan"), float("nan")
    of_seed, residual_CS = np.empty(S), np.empty((C, S))
    for s, seed in enumerate(seeds):
        at = pairs.seeds == seed
        own = pairs.at(at)
        of_seed[s] = stratum_shares(own.strata) @ (own.value - own.base)
        residual_CS[:, s] = np.bincount(where[at], weights=_residuals(own), minlength=C)
    runs = float(of_seed.var(ddof=1)) / S
    crossed = residual_CS - residual_CS.mean(axis=1, keepdims=True)
    both = float((crossed**2).sum()) * C / ((C - 1) * (S - 1) * S)
    runs = max(runs - both, FLOOR.get(S, FLOOR_MORE) * runs)
    high = 0.5 + LEVEL / 2
    half = math.sqrt((float(t.ppf(high, C - 1)) * se) ** 2 + float(t.ppf(high, S - 1)) ** 2 * runs)
    return max(difference - half, -1.0), min(difference + half, 1.0)


def extremes(pairs: Pairs, strata: int, better: str) -> tuple[float, float]:
    """The difference if all unscored answers had gone its best way and the reference's worst, and the reverse.

    Where no direction is better: the largest and the smallest difference. NaN without pairs.
    """
    if not len(pairs.value):
        return float("nan"), float("nan")
    counts = np.bincount(pairs.strata, minlength=strata)
    found = []
    for own, other in ((1.0, 0.0), (0.0, 1.0)):
        value = np.where(np.isnan(pairs.value), own, pairs.value)
        difference = value - np.where(np.isnan(pairs.base), other, pairs.base)
        inside = np.bincount(pairs.strata, weights=difference, minlength=strata) / np.maximum(counts, 1)
        found.append(round(float(np.where(counts > 0, inside, own - other).mean()), 10))
    return (found[1], found[0]) if better == "lower" else (found[0], found[1])


def _residuals(pairs: Pairs) -> Floats:
    """What each pair adds to the difference beyond its stratum's mean."""
    difference, share = pairs.value - pairs.base, stratum_shares(pairs.strata)
    total = np.bincount(pairs.strata, weights=share)
    inside = np.bincount(pairs.strata, weights=share * difference) / np.where(total > 0, total, 1.0)
    return np.asarray(share * (difference - inside[pairs.strata]), dtype=np.float64)


def _codes(clusters: Ints) -> tuple[Ints, int]:
    names, where = np.unique(clusters, return_inverse=True)
    return where.astype(np.intp), len(names)


def holm(p: Floats) -> Floats:
    """Adjusted p-values (Holm 1979, Scand. J. Stat. 6:65): max over j ≤ i of min(1, (m − j + 1)·p₍ⱼ₎).

    The chance of any false rejection in the family stays below the level, however the tests depend on
    another.
    """
    # statsmodels' multipletests gives the same (tested) but collects garbage at each call: 60 ms a family
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def correct(contrasts: pd.DataFrame) -> pd.DataFrame:
    """Add `p_holm` and `family_size` inside each `family`; a contrast without a p-value is not a test."""
    adjusted = contrasts.assign(p_holm=float("nan"), family_size=0)
    for _, family in contrasts.groupby("family", sort=True):
        tested = family.index[family["p"].notna()]
        adjusted.loc[family.index, "family_size"] = len(tested)
        adjusted.loc[tested, "p_holm"] = holm(contrasts.loc[tested, "p"].to_numpy(float)).round(10)
    return adjusted


COLUMNS = [*KEY, "seeds", "axis", "measure", "label", "primary", "first", "base", "rate", "difference", "low", "high"]
COLUMNS += ["se", "mde", "p", "p_holm", "p_mcnemar", "family", "family_size", "if_best", "if_worst", "seed_ci_low"]
COLUMNS += ["seed_ci_high", "n", "n_clusters", "n_discordant", "n_unpaired", "n_unscored", "design", "note"]
NUMBERS = ("base", "rate", "difference", "low", "high", "se", "mde", "p", "p_mcnemar", "seed_ci_low", "seed_ci_high")


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
    prompt being one cluster over all of them: `low` to `high` covers prompt sampling, `seed_ci_low` to `seed_ci_high`
    training seeds too (NaN with one seed). Families: an axis at a budget, primary measures and the others apart,
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
    line |= dict.fromkeys(NUMBERS, float("nan")) | {"n_discordant": 0, "design": FIXED}
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
    line |= {"p": of.p, "n_discordant": int((np.abs(moved) > TIE).sum())}
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
            line |= {"n_discordant": moved, "se": round(se, 10), "mde": round(detectable(se, clusters, moved), 10)}
            line |= {"seed_ci_low": round(runs[0], 10), "seed_ci_high": round(runs[1], 10)}
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
