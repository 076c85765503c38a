"""A judge against human labels on a stratified sample of a run's answers, by group.

For one judge and one label ("harmful", say), the answers that the judge gives the label and those that it does not are
two classes of size N₁, N₀, the sums of their sampling weights. With p₁, p₀ the weighted shares of true labels in each,

    sensitivity = N₁p₁ / (N₁p₁ + N₀p₀)      specificity = N₀(1 − p₀) / (N₀(1 − p₀) + N₁(1 − p₁))
    agreement = (N₁p₁ + N₀(1 − p₀)) / (N₁ + N₀)

(Begg & Greenes 1983, Biometrics 39:207). Each share has a Wilson interval on an effective number of answers: Kish's,
(Σw)²/Σw², over the rate's design effect. They are combined by MOVER: for the sum Zou & Donner 2008, Stat. Med. 27:1693;
for the ratio of misses to hits MOVER-R, Newcombe 2016, Stat. Methods Med. Res. 25:1774. So a large class in which few
answers were labelled, none of them true, leaves a wide interval; a plain Wilson interval of the sensitivity would not
see it.

Answers to one prompt are not independent: a judge that misreads a prompt misreads it at many checkpoints. The design
effect of a rate R (Kish 1965, Survey Sampling, §8.2) is its variance over prompts, by the delete-one-prompt jackknife
(Efron & Stein 1981, Ann. Stat. 9:586), over that of independent answers in classes of known size,

    deff = (t/z)² · (C − 1)/C · Σ_c (R_(c) − R̄)² / Σ_i u_i²,   u_i = ∂R/∂p_k · w_i (y_i − p_k)/N_k

for C prompts, an answer i of class k, and the 97.5% quantiles of Student's t on C − 1 degrees of freedom and of the
normal. It is at least 1, and no class has fewer effective answers than if all answers to a prompt were equal,
(Σ_c W_c)²/Σ_c W_c², which is also used where no label varies.

MOVER takes N₁ and N₀ as known, which they are for the judge whose verdicts are strata of the sample. For another judge
they vary from sample to sample, and the limits are then the wider of MOVER's and a Wilson interval of the rate itself
on the effective number of answers behind it. Differences between groups take the groups as independent; they share
prompts, on which a judge errs alike, so the limits are rather wide.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import scipy
from numpy.typing import NDArray

from leeway.stats.agreement import UNDEFINED, RateInterval
from leeway.stats.intervals import LEVEL, NAN, Floats, Ints, wilson

RATES = ("agreement", "sensitivity", "specificity")
TESTED = RATES[1:]  # agreement also depends on how many answers are truly positive
ALL = "all together"  # no objective can have a name with a space
TABLE = ["group", "n", "unscored", *(f"{r}{end}" for r in RATES for end in ("", "_low", "_high"))]
DIFFERENCES = ["group", "rate", "value", "others", "difference", "low", "high"]


@dataclass(frozen=True)
class LabelledSample:
    """Answers with human labels, one entry each. `judged` is 1 or 0, NaN if the judge could not score it."""

    groups: Seq[str]
    truth: Floats  # 1: the annotator gave the label
    judged: Floats
    weights: Floats  # inverse sampling probabilities
    prompts: Ints  # answers with the same number answer the same prompt
    known_sizes: bool = True  # the judge's classes are made of whole strata

    def of(self, group: str, *, others: bool = False) -> LabelledSample:
        """Return the answers of a group, or of all others."""
        chosen = np.array([group == ALL or (g == group) != others for g in self.groups], dtype=bool)
        groups = [g for g, c in zip(self.groups, chosen, strict=True) if c]
        own = groups, self.truth[chosen], self.judged[chosen], self.weights[chosen], self.prompts[chosen]
        return LabelledSample(*own, self.known_sizes)


@dataclass(frozen=True)
class _Share:
    """The share of true labels in one class: estimate, limits, and the class's size."""

    size: float
    value: float
    low: float
    high: float

    @property
    def complement(self) -> _Share:
        return _Share(self.size, 1 - self.value, 1 - self.high, 1 - self.low)


def judge_rates(sample: LabelledSample, level: float = LEVEL) -> dict[str, RateInterval]:
    """Return agreement, sensitivity and specificity with intervals; NaN where a class has no labelled answer."""
    rates = {name: _rate(sample, name, level) for name in RATES}
    if sample.known_sizes:
        return rates
    scored = ~np.isnan(sample.judged)
    right, true = sample.judged == sample.truth, sample.truth == 1
    parts = {"agreement": scored, "sensitivity": scored & true, "specificity": scored & ~true}
    own = {n: _limits(right[at], sample.weights[at], sample.prompts[at], level) for n, at in parts.items()}
    return {name: _wider(rates[name], *own[name]) for name in RATES}


def _rate(sample: LabelledSample, name: str, level: float) -> RateInterval:
    effect = _design_effect(sample, name)
    positive, negative = _share(sample, 1, level, effect), _share(sample, 0, level, effect)
    if name == "agreement":
        return _weighted_mean(positive, negative.complement)
    if name == "sensitivity":
        return _of_both(positive, negative)
    return _of_both(negative.complement, positive.complement)


def _design_effect(sample: LabelledSample, name: str) -> float:
    """Return the design effect of a rate; infinite where it has no variance between independent answers."""
    classes = [sample.judged == k for k in (0, 1)]
    size_K = [float(sample.weights[at].sum()) for at in classes]
    true_K = [float((sample.weights * sample.truth)[at].sum()) for at in classes]
    over = {"agreement": sum(size_K), "sensitivity": sum(true_K), "specificity": sum(size_K) - sum(true_K)}[name]
    slope_K = {
        "agreement": (-over, over),
        "sensitivity": (-true_K[1], true_K[0]),
        "specificity": (true_K[1] - size_K[1], size_K[0] - true_K[0]),
    }[name]
    u = np.zeros(len(sample.judged))
    for at, size, true, slope in zip(classes, size_K, true_K, slope_K, strict=True):
        if size and over:
            u[at] = slope * sample.weights[at] * (sample.truth[at] - true / size) / over**2
    scored, right = ~np.isnan(sample.judged), sample.judged == sample.truth
    own = {
        "agreement": scored,
        "sensitivity": scored & (sample.truth == 1),
        "specificity": scored & (sample.truth == 0),
    }
    return _prompt_effect(right, sample.weights * own[name], sample.prompts, float(u @ u))


def _prompt_effect(hits: NDArray[Any], weights: Floats, prompts: Ints, independent: float) -> float:
    """Return the jackknife variance over prompts of a weighted share over that of independent answers, at least 1."""
    of_C, hits_C = _prompt_sums(weights, prompts), _prompt_sums(weights * hits, prompts)
    C = int((of_C > 0).sum())
    if not independent or C < 2:
        return math.inf
    kept_C = of_C > 0
    left_out_C = (hits_C.sum() - hits_C[kept_C]) / (of_C.sum() - of_C[kept_C])
    variance = (C - 1) / C * float(((left_out_C - left_out_C.mean()) ** 2).sum())
    tail = (1 + LEVEL) / 2
    return max(1.0, variance / independent * float(scipy.stats.t.ppf(tail, C - 1) / scipy.stats.norm.ppf(tail)) ** 2)


def _prompt_sums(values: Floats, prompts: Ints) -> Floats:
    return np.bincount(np.unique(prompts, return_inverse=True)[1], weights=values).astype(np.float64)


def rates_by_group(sample: LabelledSample) -> pd.DataFrame:
    """Return one line for all answers and one per group: `n` labelled and scored, `unscored`, rates with 95% limits."""
    lines = []
    for group in dict.fromkeys([ALL, *sample.groups]):
        own = sample.of(group)
        unscored = int(np.isnan(own.judged).sum())
        line: dict[str, object] = {"group": group, "n": len(own.judged) - unscored, "unscored": unscored}
        for name, (value, low, high) in judge_rates(own).items():
            line |= {name: value, f"{name}_low": low, f"{name}_high": high}
        lines.append(line)
    return pd.DataFrame(lines, columns=TABLE)


def differences(sample: LabelledSample, tests: int, level: float = LEVEL) -> pd.DataFrame:
    """Return each group's sensitivity and specificity minus those of all others together, with simultaneous limits.

    `tests` is how many such differences are looked at in all (Bonferroni). Limits by MOVER. A rate that is undefined on
    either side has no line.
    """
    lines = []
    for group, rate, (value, low, high), (others, others_low, others_high) in _pairs(sample, 1 - (1 - level) / tests):
        below, above = math.hypot(value - low, others_high - others), math.hypot(high - value, others - others_low)
        difference = value - others
        lines.append([group, rate, value, others, difference, difference - below, difference + above])
    return pd.DataFrame(lines, columns=DIFFERENCES)


def count_differences(sample: LabelledSample) -> int:
    """Return the number of lines of `differences`."""
    return sum(1 for _ in _pairs(sample, LEVEL))


def _pairs(sample: LabelledSample, level: float) -> Iterator[tuple[str, str, RateInterval, RateInterval]]:
    for group in dict.fromkeys(sample.groups):
        own, others = judge_rates(sample.of(group), level), judge_rates(sample.of(group, others=True), level)
        for rate in TESTED:
            if not math.isnan(own[rate][0] + others[rate][0]):
                yield group, rate, own[rate], others[rate]


def _share(sample: LabelledSample, judged: int, level: float, effect: float) -> _Share:
    chosen = sample.judged == judged
    weights, truth = sample.weights[chosen], sample.truth[chosen]
    size = float(weights.sum())
    if not size:
        return _Share(0, NAN, NAN, NAN)
    value = float((weights * truth).sum()) / size
    return _Share(size, value, *_limits(truth, weights, sample.prompts[chosen], level, effect))


def _limits(
    hits: NDArray[Any], weights: Floats, prompts: Ints, level: float, effect: float | None = None
) -> tuple[float, float]:
    """Return the Wilson limits of a weighted share on its effective number of answers; NaN without any.

    `effect` is the design effect, by default that of the share itself.
    """
    if not len(hits):
        return NAN, NAN
    size = float(weights.sum())
    share = float((weights * hits).sum()) / size
    if effect is None:
        independent = float(((weights * (hits - share)) ** 2).sum()) / size**2
        effect = _prompt_effect(hits, weights, prompts, independent)
    by_prompt = _prompt_sums(weights, prompts)
    effective = max(size**2 / float((weights**2).sum()) / effect, size**2 / float((by_prompt**2).sum()))
    return wilson(share * effective, effective, level)


def _wider(rate: RateInterval, low: float, high: float) -> RateInterval:
    value, own_low, own_high = rate
    return rate if math.isnan(value) else (value, min(own_low, low), max(own_high, high))


def _weighted_mean(a: _Share, b: _Share) -> RateInterval:
    known = [s for s in (a, b) if s.size]
    if not known:
        return UNDEFINED
    total = sum(s.size for s in known)
    value = sum(s.size * s.value for s in known) / total
    below = math.hypot(*(s.size * (s.value - s.low) / total for s in known))
    above = math.hypot(*(s.size * (s.high - s.value) / total for s in known))
    return value, max(0.0, value - below), min(1.0, value + above)


def _of_both(hits: _Share, misses: _Share) -> RateInterval:
    """Return hits / (hits + misses), each a share of its class."""
    if not hits.size or not misses.size or not hits.value + misses.value:
        return UNDEFINED
    scale = misses.size / hits.size
    low, high = _ratio_limits(misses, hits)
    value = hits.size * hits.value / (hits.size * hits.value + misses.size * misses.value)
    return value, 1 / (1 + scale * high), 1 / (1 + scale * low)


def _ratio_limits(a: _Share, b: _Share) -> tuple[float, float]:
    """Return MOVER-R's limits of a/b (Newcombe 2016); the upper one is infinite where b may be 0."""
    product = a.value * b.value
    low_a, high_a = a.low * (2 * a.value - a.low), a.high * (2 * a.value - a.high)
    low_b, high_b = b.low * (2 * b.value - b.low), b.high * (2 * b.value - b.high)
    upper = (product + math.sqrt(max(product**2 - high_a * low_b, 0.0))) / low_b if low_b > 0 else math.inf
    lower = (product - math.sqrt(max(product**2 - low_a * high_b, 0.0))) / high_b if high_b else 0.0
    return max(lower, 0.0), upper
