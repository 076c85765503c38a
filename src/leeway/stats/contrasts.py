"""Contrasts of each checkpoint with the base or another one: paired by item, clustered by prompt, Holm in families."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy

from leeway.stats import intervals
from leeway.stats.anytime import FIXED, SEQUENTIAL, Anytime
from leeway.stats.cluster_tests import MIN_DISCORDANT, wild_cluster
from leeway.stats.intervals import LEVEL, NAN, RESAMPLES, TIE, Floats, Ints, stratum_shares
from leeway.stats.metrics import POOLED_CHECKPOINT
from leeway.stats.pairing import Contrast, ContrastReference, Pairs, paired_contrasts

POWER = 0.80
SEED_VARIANCE_FLOOR = {2: 0.5}  # smallest share of the variance between seeds that is kept, by number of seeds
SEED_VARIANCE_FLOOR_MORE = 0.1  # for other numbers of seeds; both found by simulation

COLUMNS = [*POOLED_CHECKPOINT, "seeds", "axis", "measure", "label", "primary", "first", "base", "rate", "difference"]
COLUMNS += ["low", "high", "se", "mde", "p", "p_holm", "p_mcnemar", "family", "family_size", "if_best", "if_worst"]
COLUMNS += ["seed_ci_low", "seed_ci_high", "n", "n_clusters", "n_discordant", "n_unpaired", "n_unscored"]
COLUMNS += ["design", "note"]


def contrasts(
    rows: pd.DataFrame,
    conditions: Mapping[str, str],
    against: ContrastReference | None = None,
    *,
    first: Mapping[str, str] | None = None,
    only: Collection[str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """Return one line per checkpoint, condition and measure: checkpoint − reference, 95% interval, p, Holm's p.

    `only` names the measures to compare (default: all). The reference is the base under the same rendered prompt;
    `against=("sft", None)` takes another objective at the same budget, `("sft", 400_000)` at that one (its rates are
    then in `base`). Training seeds are pooled, and a prompt is one cluster over all of them: `low` to `high` covers
    prompt sampling, `seed_ci_low` to `seed_ci_high` training seeds too (NaN with one seed). Families: primary and other
    measures of an axis at a budget, under the condition each objective is intended for (`first`: objective →
    condition); further conditions are separate families. Sequential contrasts (`design`) have an anytime-valid interval
    and p (`stats.anytime`), and no `se`, `mde` or seed interval.
    Formulas and sources: docs/statistics.md.
    """
    found, table = paired_contrasts(rows, conditions, against=against, first=first, only=only)
    for contrast in found:
        log_odds = contrast.measure.log_odds
        best, worst = unscored_extremes(contrast.pairs, contrast.strata, contrast.measure.better)
        best, worst = (NAN, NAN) if log_odds else (best, worst)
        design = SEQUENTIAL if contrast.sequential else FIXED
        contrast.line.update(n_discordant=0, design=design, if_best=best, if_worst=worst)
        contrast.line.update(pair_rates(contrast.scored) if contrast.scored is not None else {})
        if log_odds and contrast.scored is not None:
            _test_log_odds(contrast.line, contrast.scored)
    for sequential, matrix in by_axis(found, table):
        for contrast in sequential:
            _test_anytime(contrast)
        matrix.test(resamples, seed)
    uncorrected = [c for c in COLUMNS if c not in ("p_holm", "family_size")]
    return holm_by_family(pd.DataFrame([c.line for c in found], columns=uncorrected))[COLUMNS]


def _test_anytime(contrast: Contrast) -> None:
    """Fill in difference, interval and p of a sequential contrast."""
    line, differences = contrast.line, contrast.cluster_differences
    test = Anytime(differences)
    low, high = test.interval()
    line |= {"difference": round(float(differences.mean()), 10), "low": round(low, 10), "high": round(high, 10)}
    line |= {"p": test.p, "n_discordant": int((np.abs(differences) > TIE).sum())}
    design = f"sequential design: {len(differences)} prompts"
    line["note"] = "; ".join(filter(None, [design, _one_seed(line), str(line["prompts"])]))


def _test_log_odds(line: dict[str, object], scored: Pairs) -> None:
    """Fill in a shift in log-odds by Student's t on the clustered error; its values have no bounds."""
    shift = Shift.of(scored)
    low, high = seed_interval(shift.difference, shift.se, scored, limit=math.inf, df=shift.df)
    discordant = len(np.unique(scored.clusters[np.abs(scored.value - scored.base) > TIE]))
    mde = float(scipy.stats.t.ppf(0.5 + LEVEL / 2, shift.df) + scipy.stats.t.ppf(POWER, shift.df)) * shift.se
    tail, found = (1 - LEVEL) / 2, {"difference": shift.difference, "se": shift.se, "mde": mde}
    found |= {"low": shift.low(tail), "high": shift.high(tail), "seed_ci_low": low, "seed_ci_high": high}
    found["p"] = min(1.0, 2 * min(shift.p_below(0.0), shift.p_above(0.0)))
    line |= {name: round(value, 10) for name, value in found.items()} | {"n_discordant": discordant}
    line["note"] = contrast_note(line, len(np.unique(scored.clusters)), discordant, shift.se)


@dataclass(frozen=True)
class Shift:
    """A mean difference over keyed halves, without bounds; tests are Welch's (1947, Biometrika 34:28).

    The clustered variance is that within each half, with n_h/(n_h − 1) for its n_h statements; the degrees of freedom
    are Welch & Satterthwaite's. Without variance (`se` NaN) nothing is rejected and the interval is unbounded.
    """

    difference: float
    se: float
    df: float

    @classmethod
    def of(cls, scored: Pairs) -> Shift:
        difference = float(stratum_shares(scored.strata) @ (scored.value - scored.base))
        clusters = intervals.dense_codes(scored.clusters)
        count = int(clusters.max(initial=0)) + 1
        residual_CH = intervals.half_residuals(scored.value - scored.base, scored.strata, clusters, count)
        variance = float((residual_CH.sum(axis=1) ** 2).sum())
        se = math.sqrt(variance) if count > 1 and variance > intervals.NO_VARIANCE else NAN
        return cls(difference, se, intervals.welch_df(residual_CH, intervals.stratum_sizes(scored.strata, clusters)))

    def p_below(self, bound: float) -> float:
        """Return the p-value of H0: difference ≥ bound."""
        return 1.0 if math.isnan(self.se) else float(scipy.stats.t.cdf((self.difference - bound) / self.se, self.df))

    def p_above(self, bound: float) -> float:
        """Return the p-value of H0: difference ≤ bound."""
        return 1.0 if math.isnan(self.se) else float(scipy.stats.t.sf((self.difference - bound) / self.se, self.df))

    def high(self, alpha: float) -> float:
        """Return the upper one-sided bound of level 1 − alpha."""
        if math.isnan(self.se):
            return math.inf
        return self.difference + float(scipy.stats.t.ppf(1 - alpha, self.df)) * self.se

    def low(self, alpha: float) -> float:
        """Return the lower one-sided bound."""
        if math.isnan(self.se):
            return -math.inf
        return self.difference - float(scipy.stats.t.ppf(1 - alpha, self.df)) * self.se


def pair_rates(scored: Pairs) -> dict[str, float]:
    """Return the rates of the reference and of the checkpoint."""
    share = stratum_shares(scored.strata)
    return {"base": round(float(share @ scored.base), 10), "rate": round(float(share @ scored.value), 10)}


class ContrastMatrix:
    """Scored contrasts of one axis as columns over its clusters: weighted sums of differences, and weights."""

    def __init__(self, clusters: Ints, contrasts: list[Contrast]) -> None:
        self.contrasts = contrasts
        self.sums_CM, self.weights_CM = np.empty((2, len(clusters), len(contrasts)))
        for m, scored in enumerate(c.scored for c in contrasts):
            assert scored is not None
            share, where = stratum_shares(scored.strata), np.searchsorted(clusters, scored.clusters)
            difference = share * (scored.value - scored.base)
            self.sums_CM[:, m] = np.bincount(where, weights=difference, minlength=len(clusters))
            self.weights_CM[:, m] = np.bincount(where, weights=share, minlength=len(clusters))

    def test(self, resamples: int, seed: int) -> None:
        """Fill in difference, intervals, errors, p and note of every line, all with one set of flips."""
        if not self.contrasts:
            return
        tested = wild_cluster(self.sums_CM, self.weights_CM, resamples=resamples, seed=seed)
        for m, contrast in enumerate(self.contrasts):
            scored, line = contrast.scored, contrast.line
            assert scored is not None
            for name in ("difference", "low", "high", "p"):
                line[name] = float(getattr(tested, name)[m])
            discordant, se = int(tested.n_discordant[m]), standard_error(scored)
            clusters = len(np.unique(scored.clusters))
            low, high = seed_interval(float(tested.difference[m]), se, scored)
            mde = minimal_detectable_effect(se, clusters, discordant)
            found = {"se": se, "mde": mde, "seed_ci_low": low, "seed_ci_high": high, "p_mcnemar": mcnemar(scored)}
            line |= {name: round(value, 10) for name, value in found.items()} | {"n_discordant": discordant}
            line["note"] = contrast_note(line, clusters, discordant, se)


def by_axis(contrasts: list[Contrast], table: pd.DataFrame) -> Iterator[tuple[list[Contrast], ContrastMatrix]]:
    """Yield the scored contrasts of each axis, except log-odds: those of a sequential design, and the others."""
    for axis in dict.fromkeys(c.measure.axis for c in contrasts):
        clusters = np.unique(table.loc[table["eval"] == axis, "cluster"].to_numpy(np.intp))
        scored = [c for c in contrasts if c.measure.axis == axis and c.scored is not None and not c.measure.log_odds]
        fixed = ContrastMatrix(clusters, [c for c in scored if not c.sequential])
        yield [c for c in scored if c.sequential], fixed


def contrast_note(
    line: Mapping[str, object], clusters: int, discordant: int, se: float, *, at_a_margin: bool = False
) -> str:
    """Return the limitations of a contrast; tests at a margin have power where tests of 0 have none."""
    notes, reason = [_one_seed(line), str(line["prompts"])], ""
    if at_a_margin and discordant < MIN_DISCORDANT:
        reason = f"only {discordant} of {clusters} prompts are discordant: interval and p come from a bound"
    elif clusters < MIN_DISCORDANT:
        reason = f"only {clusters} prompt{'s' * (clusters != 1)}: no test can reject"
    elif discordant < MIN_DISCORDANT:
        few = f"only {discordant} discordant prompt{'s' * (discordant != 1)}" if discordant else "no discordant prompts"
        reason = f"{few}: no test can reject, the interval is a bound"
    elif np.isnan(se):
        reason = "all prompts changed equally: no standard error, the interval is a bound"
    return "; ".join(filter(None, [*notes, reason]))


def _one_seed(line: Mapping[str, object]) -> str:
    return "" if "," in str(line["seeds"]) else "one training seed"


def standard_error(pairs: Pairs) -> float:
    """Return the paired, clustered standard error of the difference; NaN with one prompt or without variance.

    The square root of `intervals.cluster_variance` of the differences (Miller 2024, arXiv 2411.00640, §2.2 and 4.2).
    """
    clusters = intervals.dense_codes(pairs.clusters)
    variance = intervals.cluster_variance(pairs.value - pairs.base, pairs.strata, clusters)
    return math.sqrt(variance) if clusters.max(initial=0) > 0 and variance > intervals.NO_VARIANCE else NAN


def minimal_detectable_effect(se: float, clusters: int, discordant: int) -> float:
    """Return the smallest true difference detected with 80% power at two-sided 5%.

    (t_{0.975} + t_{0.80}) · se with C − 1 degrees of freedom (Bloom 1995, Eval. Rev. 19:547). With fewer than
    MIN_DISCORDANT discordant prompts the error is unknown, and the result is at least the share δ of prompts that must
    be discordant for MIN_DISCORDANT of C to be so in 80% of samples, P(Bin(C, δ) ≥ MIN_DISCORDANT) = 0.80: fewer cannot
    reject. NaN below MIN_DISCORDANT prompts.
    """
    if clusters < MIN_DISCORDANT:
        return NAN
    df = clusters - 1
    known = 0.0 if math.isnan(se) else float(scipy.stats.t.ppf(0.5 + LEVEL / 2, df) + scipy.stats.t.ppf(POWER, df)) * se
    if discordant >= MIN_DISCORDANT and known:
        return min(known, 1.0)
    return min(max(known, float(scipy.stats.beta.ppf(POWER, MIN_DISCORDANT, clusters - MIN_DISCORDANT + 1))), 1.0)


def items_needed(
    difference: float, se: float, clusters: int, bound: float, *, power: float = POWER, alpha: float = 0.05
) -> float:
    """Return how many more prompts would separate the difference from a bound, one-sided, if the estimate is true.

    C' = C ((z_{1−α} + z_power) · se / |difference − bound|)²; the result is C' − C, at least 0, and infinite for a
    difference on the bound. Without variance (se is NaN) C' is what Clopper–Pearson needs:
    (1 − |difference − bound|)^C' ≤ α.
    """
    gap = abs(difference - bound)
    if math.isnan(gap):
        return NAN
    if gap < 1e-12:
        return math.inf
    if math.isnan(se):
        needed = math.log(alpha) / math.log1p(-min(gap, 1 - 1e-12))
    else:
        needed = clusters * (float(scipy.stats.norm.ppf(1 - alpha) + scipy.stats.norm.ppf(power)) * se / gap) ** 2
    return float(max(math.ceil(needed - 1e-9) - clusters, 0))


def mcnemar(pairs: Pairs) -> float:
    """Return the exact p of McNemar's test (1947); NaN unless every prompt has one pair of binary scores."""
    binary = intervals.is_binary(pairs.value) and intervals.is_binary(pairs.base)
    if not binary or len(np.unique(pairs.clusters)) != len(pairs.clusters):
        return NAN
    up, down = int((pairs.value > pairs.base).sum()), int((pairs.value < pairs.base).sum())
    return float(scipy.stats.binomtest(up, up + down).pvalue) if up + down else 1.0


def seed_interval(
    difference: float, se: float, pairs: Pairs, limit: float = 1.0, df: float = NAN
) -> tuple[float, float]:
    """Return the 95% interval that covers new prompts and new training seeds; NaN with one seed, or without variance.

    Prompts and S seeds are crossed, so with D_s the difference of one seed

        half² = t²_{0.975, C−1} V_prompt + t²_{0.975, S−1} max(V_seed − V_both, f V_seed)

    V_prompt is the clustered variance, V_seed = Var(D_s)/S, V_both the variance of prompt × seed, which both contain
    (Cameron, Gelbach & Miller 2011, JBES 29:238: V_prompt + V_seed − V_both). Each term has the degrees of freedom it
    was estimated with, as in Howe (1974, JASA 69:789); one t for the sum covers too little or far too much with 2 to
    5 seeds. `df` replaces C − 1 in the first term. f is ½ for two seeds and ⅒ for more, found by simulation
    (benchmarks/statistics).
    """
    seeds = np.unique(pairs.seeds)
    S = len(seeds)
    if S < 2 or math.isnan(se):
        return NAN, NAN
    where = intervals.dense_codes(pairs.clusters)
    C = int(where.max()) + 1
    difference_S, residual_CS = np.empty(S), np.empty((C, S))
    for s, seed in enumerate(seeds):
        at = pairs.seeds == seed
        own = pairs.subset(at)
        difference_S[s] = stratum_shares(own.strata) @ (own.value - own.base)
        residuals = intervals.residuals(own.value - own.base, own.strata)
        residual_CS[:, s] = np.bincount(where[at], weights=residuals, minlength=C)
    variance = float(difference_S.var(ddof=1)) / S
    crossed = residual_CS - residual_CS.mean(axis=1, keepdims=True)
    both = float((crossed**2).sum()) * C / ((C - 1) * (S - 1) * S)
    variance = max(variance - both, SEED_VARIANCE_FLOOR.get(S, SEED_VARIANCE_FLOOR_MORE) * variance)
    high = 0.5 + LEVEL / 2
    prompt_df = C - 1 if math.isnan(df) else df
    half = math.sqrt(
        (float(scipy.stats.t.ppf(high, prompt_df)) * se) ** 2 + float(scipy.stats.t.ppf(high, S - 1)) ** 2 * variance
    )
    return max(difference - half, -limit), min(difference + half, limit)


def unscored_extremes(pairs: Pairs, strata: int, better: str) -> tuple[float, float]:
    """Return the (best, worst) difference over all possible scores of the unscored responses.

    Best: the checkpoint's are all good and the reference's all bad. Without a better direction: the largest and the
    smallest difference. NaN without pairs.
    """
    if not len(pairs.value):
        return NAN, NAN
    counts = np.bincount(pairs.strata, minlength=strata)
    found = []
    for own, other in ((1.0, 0.0), (0.0, 1.0)):
        value = np.where(np.isnan(pairs.value), own, pairs.value)
        difference = value - np.where(np.isnan(pairs.base), other, pairs.base)
        mean_S = np.bincount(pairs.strata, weights=difference, minlength=strata) / np.maximum(counts, 1)
        found.append(round(float(np.where(counts > 0, mean_S, own - other).mean()), 10))
    return (found[1], found[0]) if better == "lower" else (found[0], found[1])


def holm(p: Floats) -> Floats:
    """Return Holm's adjusted p-values (1979, Scand. J. Stat. 6:65): max over j ≤ i of min(1, (m − j + 1)·p₍ⱼ₎).

    They control the family-wise error rate under any dependence. NaN is not a test: it stays NaN and does not count.
    """
    # statsmodels' multipletests gives the same (tested) but collects garbage at each call: 60 ms a family
    tests = np.argsort(p, kind="stable")[: int(np.isfinite(p).sum())]  # NaN sorts last
    adjusted = np.full(len(p), NAN)
    adjusted[tests] = np.minimum(np.maximum.accumulate(p[tests] * np.arange(len(tests), 0, -1)), 1.0)
    return adjusted


def holm_by_family(contrasts: pd.DataFrame) -> pd.DataFrame:
    """Add `p_holm` and `family_size` inside each `family`; a contrast without a p-value is not a test."""
    adjusted = contrasts.assign(p_holm=NAN, family_size=0)
    for _, p in contrasts.groupby("family", sort=True)["p"]:
        adjusted.loc[p.index, "p_holm"] = holm(p.to_numpy(float)).round(10)
        adjusted.loc[p.index, "family_size"] = int(p.count())
    return adjusted


def add_holm(lines: list[dict[str, object]]) -> None:
    """Fill in `p_holm` of lines that are one family; lines without a p-value are not tests."""
    p_values = np.array([float(str(line.get("p", NAN))) for line in lines])
    for line, p in zip(lines, holm(p_values), strict=True):
        line["p_holm"] = round(float(p), 10)
