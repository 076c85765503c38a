"""Tests at a stated margin: equivalence, non-inferiority, and a checkpoint's own rate against a bound."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import scipy

from leeway.stats import intervals, metrics
from leeway.stats.anytime import Anytime, common_prefix, is_sequential, rate_test
from leeway.stats.cluster_tests import ALPHA, BoundDraws, bound_draws
from leeway.stats.contrasts import (
    Shift,
    by_axis,
    contrast_note,
    holm_by_family,
    items_needed,
    pair_rates,
    standard_error,
)
from leeway.stats.intervals import RESAMPLES, TIE, Floats, Ints, dense_codes, stratum_shares
from leeway.stats.metrics import POOLED_CHECKPOINT, Measure, StatsError, analysis_table, measures
from leeway.stats.pairing import Contrast, ContrastReference, paired_contrasts

WorseDirection = Literal["higher", "lower"]
DifferenceBound = float | tuple[float, WorseDirection]
Tested = dict[str, float]  # rate, limit, se, p, p_worse

SHARED = [*POOLED_CHECKPOINT, "seeds", "axis", "measure", "label", "first", "base", "rate", "difference"]
COUNTS = ["n", "n_clusters", "n_discordant", "n_unpaired", "n_unscored", "note"]
EQUIVALENCE = [*SHARED, "low90", "high90", "margin", "se", "p_lower", "p_upper", "p", "p_holm", "equivalent"]
EQUIVALENCE += ["family", "family_size", *COUNTS]
ONE_SIDED = [*SHARED, "bound", "worse", "limit", "se", "p", "p_worse", "items_needed", *COUNTS]
RATE_BOUNDS = [*POOLED_CHECKPOINT, "measure", "bound", "worse", "rate", "limit", "se", "p", "p_worse"]
RATE_BOUNDS += ["n", "n_clusters", "n_unscored", "note"]


def equivalence(
    rows: pd.DataFrame,
    conditions: Mapping[str, str],
    margins: Mapping[str, float],
    against: ContrastReference | None = None,
    *,
    first: Mapping[str, str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """Return two one-sided tests (TOST, Schuirmann 1987) of |difference| < margin per checkpoint and measure.

    `p_lower` is the p of H0: difference ≤ −margin, `p_upper` of H0: difference ≥ margin, `p` the larger; p ≤ 0.05
    exactly if the 90% interval is inside the margins. `equivalent` is Holm's p ≤ 0.05, in families like those of
    `contrasts`. Valid with few prompts and few discordant ones (`stats.cluster_tests`). A margin is a difference in
    (0, 1): 0.05 is five points. Raises StatsError for a margin outside, or a measure that the rows do not have.
    """
    wrong = [m for m, margin in margins.items() if not 0 < margin < 1]
    if wrong:
        raise StatsError(f"the margin of {wrong[0]} is {margins[wrong[0]]}: give a difference between 0 and 1, as 0.05")
    lines: list[dict[str, object]] = []
    for tested, bounds in _bounded_contrasts(rows, conditions, margins, against, first, resamples, seed):
        margin_M = np.array([margins[c.measure.name] for c in tested])
        own = [c.line | {"margin": margin} for c, margin in zip(tested, margin_M.tolist(), strict=True)]
        if bounds is not None:
            p_lower, p_upper = bounds.p_above(-margin_M), bounds.p_below(margin_M)
            found = {"low90": bounds.low(), "high90": bounds.high(), "p_lower": p_lower, "p_upper": p_upper}
            found |= {"p": np.maximum(p_lower, p_upper)}
            for m, line in enumerate(own):
                line.update({k: round(float(v[m]), 10) for k, v in found.items()} | {"se": line["error"]})
        lines += own
    for line in lines:
        line["family"] = f"{line['family']}, equivalence"
    uncorrected = [c for c in EQUIVALENCE if c not in ("p_holm", "family_size", "equivalent")]
    table = holm_by_family(pd.DataFrame(lines, columns=uncorrected))
    return table.assign(equivalent=table["p_holm"] <= ALPHA)[EQUIVALENCE]


def one_sided(
    rows: pd.DataFrame,
    conditions: Mapping[str, str],
    bounds: Mapping[str, DifferenceBound],
    against: ContrastReference | None = None,
    *,
    first: Mapping[str, str] | None = None,
    level: float = ALPHA,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """Return non-inferiority tests both ways: is each difference on the good side of a bound, or on the bad one?

    `bounds` gives a measure's bound on checkpoint − reference, with its sign, and the worse direction: `{"asr": (0.05,
    "higher"), "accuracy": (-0.03, "lower")}`; a number is enough if the measure itself has a better direction.
    Worse "higher": H0 of `p` is difference ≥ bound, `limit` the upper bound of confidence 1 − `level`; worse "lower":
    difference ≤ bound, and the lower one. `p` ≤ `level` exactly if `limit` is on the good side. `p_worse` tests the
    opposite: small if the bound is exceeded. `items_needed`: how many more prompts would decide at 80% power if the
    estimate is true (0 if decided, infinite on the bound, NaN in a sequential design). Uncorrected: all rules of a gate
    must hold.
    """
    lines: list[dict[str, object]] = []
    for tested, drawn in _bounded_contrasts(rows, conditions, bounds, against, first, resamples, seed):
        directed = [directed_bound(bounds[c.measure.name], c.measure) for c in tested]
        own = [c.line | {"bound": b, "worse": w} for c, (b, w) in zip(tested, directed, strict=True)]
        if drawn is not None:
            bound_M, higher_M = np.array([b for b, _ in directed]), np.array([w == "higher" for _, w in directed])
            below, above = drawn.p_below(bound_M), drawn.p_above(bound_M)
            limit = np.where(higher_M, drawn.high(level), drawn.low(level))
            p, p_worse = np.where(higher_M, below, above), np.where(higher_M, above, below)
            for m, line in enumerate(own):
                line.update(limit=round(float(limit[m]), 10), se=line["error"])
                line.update(p=round(float(p[m]), 10), p_worse=round(float(p_worse[m]), 10))
                if not tested[m].sequential:  # a sequential design has no fixed number of prompts
                    decided = min(round(float(p[m]), 10), round(float(p_worse[m]), 10)) <= level
                    difference, se, bound = (float(str(line[k])) for k in ("difference", "error", "bound"))
                    needed = items_needed(difference, se, int(str(line["n_clusters"])), bound, alpha=level)
                    line["items_needed"] = 0.0 if decided else max(needed, 1.0)
        lines += own
    return pd.DataFrame(lines, columns=ONE_SIDED)


def _bounded_contrasts(
    rows: pd.DataFrame,
    conditions: Mapping[str, str],
    wanted: Collection[str],
    against: ContrastReference | None,
    first: Mapping[str, str] | None,
    resamples: int,
    seed: int,
) -> Iterator[tuple[list[Contrast], BoundDraws | EachBounds | None]]:
    """Yield the testable contrasts of each axis with their bounds, then the withheld ones with None."""
    found, table = paired_contrasts(rows, conditions, against=against, first=first, only=wanted)
    known = [m.name for m in measures(table)]
    if unknown := [name for name in wanted if name not in known]:
        raise StatsError(f"no measure {unknown[0]}: these rows have {', '.join(known)}")
    for contrast in found:
        contrast.line["n_discordant"] = 0
    for sequential, matrix in by_axis(found, table):
        for contrast in sequential:
            differences = contrast.cluster_differences
            _fill(contrast, float(differences.mean()), int((np.abs(differences) > TIE).sum()))
        if sequential:
            yield sequential, EachBounds([Anytime(c.cluster_differences) for c in sequential])
        for contrast, sums_C in zip(matrix.contrasts, matrix.sums_CM.T, strict=True):
            _fill(contrast, float(sums_C.sum()), int((np.abs(sums_C) > 0).sum()))
        if matrix.contrasts:
            yield matrix.contrasts, bound_draws(matrix.sums_CM, matrix.weights_CM, resamples=resamples, seed=seed)
    shifts = [c for c in found if c.scored is not None and c.measure.log_odds]
    tests: list[Anytime | Shift] = []
    for contrast in shifts:
        assert contrast.scored is not None
        tests.append(shift := Shift.of(contrast.scored))
        moved = np.abs(contrast.scored.value - contrast.scored.base) > TIE
        _fill(contrast, shift.difference, len(np.unique(contrast.scored.clusters[moved])), shift.se)
    if shifts:
        yield shifts, EachBounds(tests)
    yield [c for c in found if c.scored is None], None


@dataclass(frozen=True)
class EachBounds:
    """The interface of `BoundDraws` for contrasts with a test each: of a sequential design, or in log-odds."""

    tests: Seq[Anytime | Shift]

    def p_below(self, bound_M: Floats) -> Floats:
        return np.array([a.p_below(b) for a, b in zip(self.tests, bound_M.tolist(), strict=True)])

    def p_above(self, bound_M: Floats) -> Floats:
        return np.array([a.p_above(b) for a, b in zip(self.tests, bound_M.tolist(), strict=True)])

    def high(self, alpha: float = ALPHA) -> Floats:
        return np.array([a.high(alpha) for a in self.tests])

    def low(self, alpha: float = ALPHA) -> Floats:
        return np.array([a.low(alpha) for a in self.tests])


def _fill(contrast: Contrast, difference: float, discordant: int, se: float | None = None) -> None:
    scored, line = contrast.scored, contrast.line
    assert scored is not None
    se = standard_error(scored) if se is None else se
    line |= pair_rates(scored) | {"difference": round(difference, 10), "n_discordant": discordant}
    line["error"] = round(se, 10)
    if contrast.sequential:
        line["note"] = f"sequential design: {len(contrast.cluster_differences)} prompts"
    else:
        line["note"] = contrast_note(line, len(np.unique(scored.clusters)), discordant, se, at_a_margin=True)


def directed_bound(bound: DifferenceBound, measure: Measure) -> tuple[float, WorseDirection]:
    if isinstance(bound, tuple):
        value, worse = bound
    elif measure.better:
        value, worse = bound, "lower" if measure.better == "higher" else "higher"
    else:
        raise StatsError(f"{measure.name} has no better direction: give its bound as (bound, 'higher' or 'lower')")
    if worse not in ("higher", "lower") or not -1 < value < 1:
        what = f"the bound of {measure.name} is {bound!r}"
        raise StatsError(f"{what}: give a difference in (−1, 1), and 'higher' or 'lower'")
    return float(value), worse


def rate_bounds(
    rows: pd.DataFrame,
    conditions: Mapping[str, str],
    bounds: Mapping[str, float],
    worse: WorseDirection,
    *,
    level: float = ALPHA,
) -> pd.DataFrame:
    """Return one-sided tests of each checkpoint's rate against its measure's bound; training seeds are pooled.

    `p` is small if the rate is shown to be on the good side of its bound, `p_worse` if it is shown to be on the bad
    one; `limit` is the one-sided limit that inverts the first test. One binary answer per prompt in one stratum: the
    exact binomial test and Clopper & Pearson's limit. Otherwise the bound of `stats.cluster_tests` on the means of
    prompts, with 0 and 1 as the worst possible ones, valid for few prompts too. Withheld with too many unscored
    responses, or one prompt.
    """
    lines: list[dict[str, object]] = []
    for sample in rate_samples(rows, conditions, bounds):
        bound = bounds[sample.measure]
        line = sample.key | {"measure": sample.measure, "bound": bound, "worse": worse, "note": sample.reason}
        line |= {"n": len(sample.values), "n_clusters": sample.n_clusters, "n_unscored": sample.n_unscored}
        test: Tested = {}
        if not sample.reason and sample.positions is not None:
            test = _test_anytime(rate_test(sample.values, sample.strata, sample.positions), bound, worse, level)
        elif not sample.reason:
            test = bounded_rate(sample.values, sample.strata, sample.clusters, bound, worse, level)
        lines.append(line | {name: round(value, 10) for name, value in test.items()})
    return pd.DataFrame(lines, columns=RATE_BOUNDS)


@dataclass(frozen=True)
class RateSample:
    """The scored responses behind one checkpoint's rate; `reason` says why the rate is withheld."""

    key: dict[str, object]  # the columns of POOLED_CHECKPOINT
    measure: str
    values: Floats
    strata: Ints
    clusters: Ints  # dense codes
    positions: Ints | None  # in a sequential design
    n_clusters: int
    n_unscored: int
    reason: str


def rate_samples(rows: pd.DataFrame, conditions: Mapping[str, str], wanted: Collection[str]) -> Iterator[RateSample]:
    """Yield the sample of every checkpoint and wanted measure; training seeds are pooled."""
    table = common_prefix(analysis_table(rows, conditions), POOLED_CHECKPOINT)
    for measure in (m for m in measures(table) if m.name in wanted):
        if measure.log_odds:
            raise StatsError(f"{measure.name} is in log-odds and has no rate to bound: give it a margin")
        chosen = measure.select(table)
        names, strata = metrics.factorize(chosen["stratum"])
        values, clusters = chosen["value"].to_numpy(float), chosen["cluster"].to_numpy(np.intp)
        sequential = is_sequential(chosen).to_numpy()
        for key, at in metrics.group_indices(chosen, POOLED_CHECKPOINT):
            absent = np.isnan(values[at])
            scored = at[~absent]
            own_clusters = dense_codes(clusters[scored])
            count = int(own_clusters.max(initial=-1)) + 1
            reason = metrics.withheld_reason(absent, strata[at], clusters[at], names, measure)
            if not reason and count < 2:
                reason = "a single prompt: its error cannot be estimated"
            positions = chosen["position"].to_numpy(np.intp)[scored] if sequential[at].any() else None
            sample = (values[scored], strata[scored], own_clusters, positions)
            yield RateSample(key, measure.name, *sample, count, int(absent.sum()), reason)


def bounded_rate(
    x: Floats,
    strata: Ints,
    clusters: Ints,
    bound: float,
    worse: WorseDirection,
    level: float = ALPHA,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Tested:
    """Return rate, limit, se and both p-values of one sample against a bound."""
    share, count = stratum_shares(strata), int(clusters.max()) + 1
    rate, se = float(share @ x), float(np.sqrt(intervals.cluster_variance(x, strata, clusters)))
    if intervals.is_binary(x) and len(x) == count and strata.min() == strata.max():
        k = round(rate * count)
        p = float(scipy.stats.binom.cdf(k, count, bound)), float(scipy.stats.binom.sf(k - 1, count, bound))
        low = float(scipy.stats.beta.ppf(level, k, count - k + 1)) if k else 0.0
        high = float(scipy.stats.beta.ppf(1 - level, k + 1, count - k)) if k < count else 1.0
        return _directed_test(rate, se, p, (low, high), worse)
    sums_C1, weights_C1 = (np.bincount(clusters, weights=w)[:, None].astype(np.float64) for w in (share * x, share))
    drawn = bound_draws(sums_C1, weights_C1, resamples=resamples, seed=seed, support=(0.0, 1.0))
    at = np.array([bound])
    p = float(drawn.p_below(at)[0]), float(drawn.p_above(at)[0])
    return _directed_test(rate, se, p, (float(drawn.low(level)[0]), float(drawn.high(level)[0])), worse)


def _test_anytime(test: Anytime, bound: float, worse: WorseDirection, level: float) -> Tested:
    at, values_T = 2 * bound - 1, test.values_T
    rate = (float(values_T.mean()) + 1) / 2
    se = float(values_T.std(ddof=1)) / 2 / float(np.sqrt(len(values_T)))
    limits = ((test.low(level) + 1) / 2, (test.high(level) + 1) / 2)
    return _directed_test(rate, se, (test.p_below(at), test.p_above(at)), limits, worse)


def _directed_test(
    rate: float, se: float, p: tuple[float, float], limits: tuple[float, float], worse: WorseDirection
) -> Tested:
    """Assign p-values (below, above the bound) and limits (low, high) to the good and the bad side."""
    good, bad = p if worse == "higher" else (p[1], p[0])
    return {"rate": rate, "limit": limits[worse == "higher"], "se": se, "p": good, "p_worse": bad}
