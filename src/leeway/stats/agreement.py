"""How far two raters agree, and what a judge's errors do to a rate. No model, no torch: counts and tables only.

Positive means "full refusal" or whatever the caller counts; truth is what people said, or the first of two judges.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import norm

from leeway.stats.intervals import LEVEL, RESAMPLES, Ints, wilson
from leeway.stats.metrics import StatsError

Share = tuple[float, float, float]  # estimate, low, high; NaN where nothing was counted

UNDEFINED = (float("nan"),) * 3


@dataclass(frozen=True)
class Confusion:
    """Counts of a binary judge against the truth; `unscored` stand in no rate."""

    true_positive: int
    false_positive: int
    false_negative: int
    true_negative: int
    unscored: int = 0

    @property
    def n(self) -> int:
        return self.true_positive + self.false_positive + self.false_negative + self.true_negative

    @property
    def agreement(self) -> Share:
        return share(self.true_positive + self.true_negative, self.n)

    @property
    def sensitivity(self) -> Share:
        """Of what is positive in truth, the share called so."""
        return share(self.true_positive, self.true_positive + self.false_negative)

    @property
    def specificity(self) -> Share:
        """Of what is negative in truth, the share called so."""
        return share(self.true_negative, self.true_negative + self.false_positive)


def confusion(truth: Seq[bool], said: Seq[bool | None]) -> Confusion:
    """Count; None in `said` is unscored."""
    pairs = [(t, s) for t, s in zip(truth, said, strict=True) if s is not None]
    tp, fp, fn, tn = (pairs.count(p) for p in ((True, True), (False, True), (True, False), (False, False)))
    return Confusion(tp, fp, fn, tn, len(truth) - len(pairs))


def share(k: int, n: int) -> Share:
    """k of n with Wilson's interval."""
    return (k / n, *wilson(k, n)) if n else UNDEFINED


def kappa_of(table_KK: Ints) -> float:
    """Cohen's κ = (p_o − p_e) / (1 − p_e) of a square table of counts (Cohen 1960); NaN where p_e is 1."""
    total = table_KK.sum()
    if total == 0:
        return float("nan")
    observed = float(np.trace(table_KK)) / total
    expected = float((table_KK.sum(axis=1) * table_KK.sum(axis=0)).sum()) / total**2
    return float("nan") if expected >= 1 else float((observed - expected) / (1 - expected))


def kappa(
    a: Seq[str], b: Seq[str], clusters: Seq[str] | None = None, *, resamples: int = 2_000, seed: int = 0
) -> Share:
    """κ with a percentile bootstrap interval that draws whole clusters (prompts); each pair its own where None.

    Resamples without two categories have no κ and are left out. With one cluster, or none defined, the interval is
    NaN: it cannot be known.
    """
    if len(a) != len(b) or not len(a):
        raise StatsError(f"κ of {len(a)} against {len(b)} ratings: give as many of each, and at least one")
    _, coded = np.unique(np.array([*a, *b], dtype=object).astype(str), return_inverse=True)
    size = int(coded.max()) + 1
    cell = coded[: len(a)] * size + coded[len(a) :]
    drawn_by = np.arange(len(a)) if clusters is None else np.array(clusters, dtype=object).astype(str)
    _, cluster = np.unique(drawn_by, return_inverse=True)
    count = int(cluster.max()) + 1
    cells_CK = np.zeros((count, size * size), dtype=np.intp)
    np.add.at(cells_CK, (cluster, cell), 1)
    point = kappa_of(cells_CK.sum(axis=0).reshape(size, size))
    if count < 2:
        return point, float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    draws_BC = rng.multinomial(count, np.full(count, 1 / count), size=min(resamples, RESAMPLES))
    drawn = [kappa_of(t.reshape(size, size)) for t in draws_BC @ cells_CK]
    known = np.array([k for k in drawn if not np.isnan(k)])
    if not len(known):
        return point, float("nan"), float("nan")
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return point, float(low), float(high)


@dataclass(frozen=True)
class Corrected:
    """A rate corrected for a judge's errors, in [0, 1]; NaN with a `note` where it is undefined.

    `note` also tells where the estimate had left [0, 1] and was clipped.
    """

    rate: float
    low: float
    high: float
    note: str


def rogan_gladen(
    rate: float, n: int, sensitivity: float, specificity: float, n_pos: int, n_neg: int, level: float = LEVEL
) -> Corrected:
    """The rate in truth behind an apparent one: (rate + Sp − 1) / (Se + Sp − 1) (Rogan & Gladen 1978, Am. J. Epidemiol.
    107:71), with the interval of Lang & Reiczigel (2014, Prev. Vet. Med. 113:13).

    `rate` of `n` answers was called positive by a judge whose sensitivity was measured on `n_pos` positives and
    specificity on `n_neg` negatives, apart from these n. The interval, with q the apparent rate after z²/2 positives
    and z²/2 negatives were added, Se and Sp after one of each was, and p the corrected rate of these:

        p + 2z² (p·v_Se − (1 − p)·v_Sp) ± z/(Se + Sp − 1) · √(q(1 − q)/(n + z²) + p²·v_Se + (1 − p)²·v_Sp)

    where v_Se = Se(1 − Se)/(n_pos + 2) and v_Sp = Sp(1 − Sp)/(n_neg + 2); cut off at 0 and 1.
    """
    shares = {"rate": rate, "sensitivity": sensitivity, "specificity": specificity}
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise StatsError(f"{name} {value} is no share")
    if min(n, n_pos, n_neg) < 1:
        raise StatsError(f"{n} answers, {n_pos} positives, {n_neg} negatives: at least one of each is needed")
    if sensitivity + specificity <= 1:
        note = "undefined: sensitivity + specificity ≤ 1, the judge tells nothing about the truth"
        return Corrected(float("nan"), float("nan"), float("nan"), note)
    raw = (rate + specificity - 1) / (sensitivity + specificity - 1)
    low, high = _lang_reiczigel(rate, n, sensitivity, specificity, n_pos, n_neg, level)
    note = "" if 0 <= raw <= 1 else f"clipped to [0, 1] from {raw:.4f}"
    # a clipped estimate may lie beyond its interval's end by a hair: the interval holds it
    clipped = min(max(raw, 0.0), 1.0)
    return Corrected(clipped, min(max(low, 0.0), clipped), max(min(high, 1.0), clipped), note)


def _lang_reiczigel(
    rate: float, n: int, se: float, sp: float, n_pos: int, n_neg: int, level: float
) -> tuple[float, float]:
    z = float(norm.ppf(0.5 + level / 2))
    n_, p_ = n + z * z, (n * rate + z * z / 2) / (n + z * z)
    se_, sp_ = (n_pos * se + 1) / (n_pos + 2), (n_neg * sp + 1) / (n_neg + 2)
    gain = se_ + sp_ - 1
    if gain <= 0:
        return 0.0, 1.0
    p = (p_ + sp_ - 1) / gain
    of_se, of_sp = se_ * (1 - se_) / (n_pos + 2), sp_ * (1 - sp_) / (n_neg + 2)
    half = z / gain * float(np.sqrt(p_ * (1 - p_) / n_ + p * p * of_se + (1 - p) ** 2 * of_sp))
    shift = 2 * z * z * (p * of_se - (1 - p) * of_sp)
    return p + shift - half, p + shift + half


KEY = ["objective", "seed", "budget", "eval", "attack", "item_id", "sample", "template_hash", "adapter_hash"]
PAIR = ["judge_a", "judge_b", "n", "n_unscored", "agreement", "low", "high", "kappa", "kappa_low", "kappa_high"]


def judge_agreement(rows: pd.DataFrame) -> tuple[pd.DataFrame, dict[tuple[str, str], pd.DataFrame]]:
    """How far each pair of judges agrees on the outcomes of the same answers: one line a pair, and its confusion.

    `rows` is a rows table in which an answer has a row for each judge. Answers that either could not score are in
    `n_unscored`, and in nothing else. Intervals: Wilson for the agreement, prompts drawn as clusters for κ.
    """
    answers = rows[rows["outcome"].notna() | rows["unscored_reason"].notna()]
    key = [k for k in KEY if k in answers.columns]
    judges = sorted(answers["judge"].unique())
    twice = answers.duplicated([*key, "judge"])
    if twice.any():
        first = answers[twice].iloc[0]
        raise StatsError(f"judge {first['judge']} has two rows for {first['item_id']} under {first['attack']!r}")
    lines, tables = [], {}
    for a, b in itertools.combinations(judges, 2):
        of_a, of_b = (answers[answers["judge"] == j].set_index(key) for j in (a, b))
        both = of_a[["cluster", "outcome"]].join(of_b["outcome"].rename("outcome_b"), how="inner")
        if both.empty:
            continue
        scored = both.dropna(subset=["outcome", "outcome_b"])
        line: dict[str, object] = {"judge_a": a, "judge_b": b, "n": len(scored), "n_unscored": len(both) - len(scored)}
        if len(scored):
            alike = share(int((scored["outcome"] == scored["outcome_b"]).sum()), len(scored))
            found = kappa(list(scored["outcome"]), list(scored["outcome_b"]), list(scored["cluster"]))
        else:
            alike = found = UNDEFINED
        lines.append(line | dict(zip(PAIR[4:], (*alike, *found), strict=True)))
        tables[a, b] = pd.crosstab(scored["outcome"], scored["outcome_b"]).rename_axis(index=a, columns=b)
    return pd.DataFrame(lines, columns=PAIR), tables
