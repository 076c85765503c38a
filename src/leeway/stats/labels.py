"""A judge against human labels on a stratified sample of a run's answers, by group.

For one judge and one label ("harmful", say), the answers that the judge gives the label and those that it does not are
two classes of size N₁, N₀, the sums of their sampling weights. With p₁, p₀ the weighted shares of true labels in each,

    sensitivity = N₁p₁ / (N₁p₁ + N₀p₀)      specificity = N₀(1 − p₀) / (N₀(1 − p₀) + N₁(1 − p₁))
    agreement = (N₁p₁ + N₀(1 − p₀)) / (N₁ + N₀)

(Begg & Greenes 1983, Biometrics 39:207). Each share has a Wilson interval on Kish's effective number of answers,
(Σw)²/Σw². They are combined by MOVER: for the sum Zou & Donner 2008, Stat. Med. 27:1693; for the ratio of misses to
hits MOVER-R, Newcombe 2016, Stat. Methods Med. Res. 25:1774. So a large class in which few answers were labelled, none
of them true, leaves a wide interval; a plain Wilson interval of the sensitivity would not see it. MOVER takes N₁ and N₀
as known, which they are for the judge whose verdicts are strata of the sample. For another judge they vary from sample
to sample, and the limits are then the wider of MOVER's and a Wilson interval of the rate itself on the effective number
of answers behind it. Answers count as independent, although some answer the same prompt.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from leeway.stats.agreement import UNDEFINED, RateInterval
from leeway.stats.intervals import LEVEL, NAN, Floats, wilson

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
    known_sizes: bool = True  # the judge's classes are made of whole strata

    def of(self, group: str, *, others: bool = False) -> LabelledSample:
        """Return the answers of a group, or of all others."""
        chosen = np.array([group == ALL or (g == group) != others for g in self.groups], dtype=bool)
        groups = [g for g, c in zip(self.groups, chosen, strict=True) if c]
        own = groups, self.truth[chosen], self.judged[chosen], self.weights[chosen]
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
    positive, negative = _share(sample, 1, level), _share(sample, 0, level)
    rates = {
        "agreement": _weighted_mean(positive, negative.complement),
        "sensitivity": _of_both(positive, negative),
        "specificity": _of_both(negative.complement, positive.complement),
    }
    if sample.known_sizes:
        return rates
    scored = ~np.isnan(sample.judged)
    right, true = sample.judged == sample.truth, sample.truth == 1
    parts = {"agreement": scored, "sensitivity": scored & true, "specificity": scored & ~true}
    return {name: _wider(rates[name], *_limits(right[at], sample.weights[at], level)) for name, at in parts.items()}


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


def _share(sample: LabelledSample, judged: int, level: float) -> _Share:
    chosen = sample.judged == judged
    weights, truth = sample.weights[chosen], sample.truth[chosen]
    size = float(weights.sum())
    if not size:
        return _Share(0, NAN, NAN, NAN)
    return _Share(size, float((weights * truth).sum()) / size, *_limits(truth, weights, level))


def _limits(hits: NDArray[Any], weights: Floats, level: float) -> tuple[float, float]:
    """Return the Wilson limits of a weighted share on Kish's effective number of answers; NaN without any."""
    if not len(hits):
        return NAN, NAN
    size = float(weights.sum())
    effective = size**2 / float((weights**2).sum())
    return wilson(float((weights * hits).sum()) / size * effective, effective, level)


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
