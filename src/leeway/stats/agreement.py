"""Agreement of judges (confusion counts, Cohen's κ) and rates corrected for a judge's errors.

"Positive" is whatever the caller counts, a full refusal for example; the truth is human labels or the first of two
judges.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy

from leeway.stats.intervals import LEVEL, NAN, RESAMPLES, TAILS, Floats, Ints, estimate, wilson
from leeway.stats.metrics import StatsError

RateInterval = tuple[float, float, float]  # estimate, low, high; NaN without observations

UNDEFINED: RateInterval = (NAN, NAN, NAN)
RESPONSE = ["objective", "seed", "budget", "eval", "attack", "item_id", "sample", "template_hash", "adapter_hash"]
AGREEMENT_COLUMNS = ["judge_a", "judge_b", "n", "n_unscored", "agreement", "low", "high"]
AGREEMENT_COLUMNS += ["kappa", "kappa_low", "kappa_high"]


@dataclass(frozen=True)
class Confusion:
    """Confusion counts of a binary judge; `unscored` enter no rate."""

    true_positive: int
    false_positive: int
    false_negative: int
    true_negative: int
    unscored: int = 0

    @property
    def n(self) -> int:
        return self.true_positive + self.false_positive + self.false_negative + self.true_negative

    @property
    def agreement(self) -> RateInterval:
        return wilson_rate(self.true_positive + self.true_negative, self.n)

    @property
    def sensitivity(self) -> RateInterval:
        return wilson_rate(self.true_positive, self.true_positive + self.false_negative)

    @property
    def specificity(self) -> RateInterval:
        return wilson_rate(self.true_negative, self.true_negative + self.false_positive)


def confusion(truth: Seq[bool], predicted: Seq[bool | None]) -> Confusion:
    """Count predictions against the truth; a prediction of None is unscored."""
    pairs = [(t, p) for t, p in zip(truth, predicted, strict=True) if p is not None]
    tp, fp, fn, tn = (pairs.count(p) for p in ((True, True), (False, True), (True, False), (False, False)))
    return Confusion(tp, fp, fn, tn, len(truth) - len(pairs))


def wilson_rate(k: int, n: int) -> RateInterval:
    """Return k/n with its Wilson interval."""
    return (k / n, *wilson(k, n)) if n else UNDEFINED


def cohen_kappa(table_KK: Ints) -> float:
    """Return κ = (p_o − p_e) / (1 − p_e) of a square table of counts (Cohen 1960); NaN if p_e is 1."""
    return float(_kappas(table_KK[None])[0])


def _kappas(tables_BKK: Ints) -> Floats:
    """Return the κ of each table, (B,)."""
    total_B = tables_BKK.sum(axis=(1, 2))
    with np.errstate(divide="ignore", invalid="ignore"):
        observed_B = np.trace(tables_BKK, axis1=1, axis2=2) / total_B
        expected_B = (tables_BKK.sum(axis=2) * tables_BKK.sum(axis=1)).sum(axis=1) / total_B**2
        return np.where(expected_B < 1, (observed_B - expected_B) / (1 - expected_B), NAN)


def kappa(
    a: Seq[str], b: Seq[str], clusters: Seq[str] | None = None, *, resamples: int = 2_000, seed: int = 0
) -> RateInterval:
    """Return κ with a percentile bootstrap interval that draws whole clusters (default: each pair is its own cluster).

    Resamples with a single category have no κ and are left out. The interval is NaN with one cluster, or if no
    resample has a κ.
    """
    if len(a) != len(b) or not len(a):
        raise StatsError(f"κ needs two ratings of each response and at least one response, not {len(a)} and {len(b)}")
    _, coded = np.unique(np.array([*a, *b], dtype=object).astype(str), return_inverse=True)
    size = int(coded.max()) + 1
    cell = coded[: len(a)] * size + coded[len(a) :]
    names = np.arange(len(a)) if clusters is None else np.array(clusters, dtype=object).astype(str)
    _, cluster = np.unique(names, return_inverse=True)
    count = int(cluster.max()) + 1
    cells_CK = np.zeros((count, size * size), dtype=np.intp)
    np.add.at(cells_CK, (cluster, cell), 1)
    point = cohen_kappa(cells_CK.sum(axis=0).reshape(size, size))
    if count < 2:
        return point, NAN, NAN
    rng = np.random.default_rng(seed)
    draws_BC = rng.multinomial(count, np.full(count, 1 / count), size=min(resamples, RESAMPLES))
    drawn = _kappas((draws_BC @ cells_CK).reshape(-1, size, size))
    defined = drawn[~np.isnan(drawn)]
    if not len(defined):
        return point, NAN, NAN
    low, high = np.quantile(defined, TAILS)
    return point, float(low), float(high)


@dataclass(frozen=True)
class CorrectedRate:
    """A rate corrected for a judge's errors, in [0, 1].

    NaN if it is undefined; `note` gives the reason, or reports that the estimate was clipped to [0, 1].
    """

    rate: float
    low: float
    high: float
    note: str


def rogan_gladen(
    rate: float, n: int, sensitivity: float, specificity: float, n_pos: int, n_neg: int, level: float = LEVEL
) -> CorrectedRate:
    """Return the true rate behind an apparent one: (rate + Sp − 1) / (Se + Sp − 1).

    Estimate: Rogan & Gladen 1978, Am. J. Epidemiol. 107:71; interval: Lang & Reiczigel 2014, Prev. Vet. Med. 113:13.

    `rate` is the share of `n` responses that a judge called positive; its sensitivity was measured on `n_pos` positives
    and its specificity on `n_neg` negatives, none of them among the n. With q the apparent rate after adding z²/2
    positives and z²/2 negatives, Se and Sp after adding one of each, and p the corrected rate of these, the interval is

        p + 2z² (p·v_Se − (1 − p)·v_Sp) ± z/(Se + Sp − 1) · √(q(1 − q)/(n + z²) + p²·v_Se + (1 − p)²·v_Sp)

    with v_Se = Se(1 − Se)/(n_pos + 2) and v_Sp = Sp(1 − Sp)/(n_neg + 2), clipped to [0, 1].
    """
    for name, value in {"rate": rate, "sensitivity": sensitivity, "specificity": specificity}.items():
        if not 0 <= value <= 1:
            raise StatsError(f"{name} is {value}: it must be between 0 and 1")
    if min(n, n_pos, n_neg) < 1:
        raise StatsError(f"{n} responses, {n_pos} positives, {n_neg} negatives: at least one of each is needed")
    if sensitivity + specificity <= 1:
        note = "undefined: sensitivity + specificity ≤ 1, so the judge carries no information about the truth"
        return CorrectedRate(NAN, NAN, NAN, note)
    raw = (rate + specificity - 1) / (sensitivity + specificity - 1)
    low, high = _lang_reiczigel(rate, n, sensitivity, specificity, n_pos, n_neg, level)
    note = "" if 0 <= raw <= 1 else f"clipped to [0, 1] from {raw:.4f}"
    # rounding may put a clipped estimate just outside its interval
    clipped = min(max(raw, 0.0), 1.0)
    return CorrectedRate(clipped, min(max(low, 0.0), clipped), max(min(high, 1.0), clipped), note)


def _lang_reiczigel(
    rate: float, n: int, se: float, sp: float, n_pos: int, n_neg: int, level: float
) -> tuple[float, float]:
    z = float(scipy.stats.norm.ppf(0.5 + level / 2))
    n_, p_ = n + z * z, (n * rate + z * z / 2) / (n + z * z)
    se_, sp_ = (n_pos * se + 1) / (n_pos + 2), (n_neg * sp + 1) / (n_neg + 2)
    youden = se_ + sp_ - 1
    if youden <= 0:
        return 0.0, 1.0
    p = (p_ + sp_ - 1) / youden
    v_se, v_sp = se_ * (1 - se_) / (n_pos + 2), sp_ * (1 - sp_) / (n_neg + 2)
    half = z / youden * float(np.sqrt(p_ * (1 - p_) / n_ + p * p * v_se + (1 - p) ** 2 * v_sp))
    shift = 2 * z * z * (p * v_se - (1 - p) * v_sp)
    return p + shift - half, p + shift + half


def judge_agreement(rows: pd.DataFrame) -> tuple[pd.DataFrame, dict[tuple[str, str], pd.DataFrame]]:
    """Return the agreement of each pair of judges on the outcomes of the same responses, and their confusion tables.

    `rows` has one row per response and judge. Responses that either judge could not score count in `n_unscored` only.
    Intervals are clustered by prompt: Wilson for the agreement, bootstrap for κ.
    """
    responses = rows[rows["outcome"].notna() | rows["unscored_reason"].notna()]
    key = [k for k in RESPONSE if k in responses.columns]
    duplicates = responses.duplicated([*key, "judge"])
    if duplicates.any():
        first = responses[duplicates].iloc[0]
        raise StatsError(f"judge {first['judge']} has two rows for {first['item_id']} under {first['attack']!r}")
    lines, tables = [], {}
    for a, b in itertools.combinations(sorted(responses["judge"].unique()), 2):
        by_a, by_b = (responses[responses["judge"] == j].set_index(key) for j in (a, b))
        both = by_a[["cluster", "outcome"]].join(by_b["outcome"].rename("outcome_b"), how="inner")
        if both.empty:
            continue
        scored = both.dropna(subset=["outcome", "outcome_b"])
        line: dict[str, object] = {"judge_a": a, "judge_b": b, "n": len(scored), "n_unscored": len(both) - len(scored)}
        agreement = chance_corrected = UNDEFINED
        if len(scored):
            same = (scored["outcome"] == scored["outcome_b"]).to_numpy(float)
            clusters = np.unique(scored["cluster"].astype(str), return_inverse=True)[1]
            found = estimate(same, np.zeros(len(same), dtype=np.intp), clusters)
            agreement = found.mean, found.low, found.high
            chance_corrected = kappa(list(scored["outcome"]), list(scored["outcome_b"]), list(scored["cluster"]))
        lines.append(line | dict(zip(AGREEMENT_COLUMNS[4:], (*agreement, *chance_corrected), strict=True)))
        tables[a, b] = pd.crosstab(scored["outcome"], scored["outcome_b"]).rename_axis(index=a, columns=b)
    return pd.DataFrame(lines, columns=AGREEMENT_COLUMNS), tables
