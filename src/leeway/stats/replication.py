"""What tests at a bound would have found on other prompts, and what they find where there is no drift.

**Other prompts.** A second study of as many prompts varies around the truth, and the truth around this estimate, so its
estimate differs from this one with twice the variance. Prompts are therefore re-drawn twice, with replacement, within
the groups that a measure averages over. The share of re-drawn sets with another outcome is a replication probability
(Goodman 1992, Stat. Med. 11:875; Killeen 2005, Psychol. Sci. 16:345): it presumes no other knowledge of the truth. What
did not occur in the sample cannot be re-drawn: where no prompt changed, every set gives the same outcome.

**No drift.** As many prompts change and as much as observed, but each in a random direction.

Shapes: C prompts (clusters) of an axis.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import pandas as pd

from leeway.stats.cluster_tests import bound_draws
from leeway.stats.contrasts import ContrastMatrix, Shift
from leeway.stats.equivalence import DifferenceBound, WorseDirection, bounded_rate, directed_bound, rate_samples
from leeway.stats.intervals import Floats, Ints, dense_codes
from leeway.stats.metrics import POOLED_CHECKPOINT
from leeway.stats.pairing import Contrast, ContrastReference, Pairs, paired_contrasts

SETS = 200
BLOCK = 20  # sets that share their draws of the bounds
RESAMPLES = 499  # of each test; p-values are read to the nearest 0.002
COLUMNS = [*POOLED_CHECKPOINT, "measure", "set", "p", "p_worse", "p_no_drift", "p_worse_no_drift"]


def replicated_differences(
    rows: pd.DataFrame,
    conditions: Mapping[str, str],
    bounds: Mapping[str, DifferenceBound],
    against: ContrastReference | None = None,
    *,
    first: Mapping[str, str] | None = None,
    sets: int = SETS,
    seed: int = 0,
) -> pd.DataFrame:
    """Return the p-values of `one_sided` in re-drawn sets of prompts: one line per checkpoint, measure and set.

    `p` and `p_worse` are as there; `p_no_drift` and `p_worse_no_drift` are those without drift. All measures of an axis
    share the prompts of a set. Withheld numbers and sequential designs, which have no fixed set, have no lines.
    """
    found, _ = paired_contrasts(rows, conditions, against=against, first=first, only=bounds)
    rng, lines = np.random.default_rng(seed), list[dict[str, object]]()
    for axis in dict.fromkeys(c.measure.axis for c in found):
        own = [c for c in found if c.measure.axis == axis and c.scored is not None and not c.sequential]
        if not own:
            continue
        groups = _groups([c.scored for c in own if c.scored])
        for start in range(0, sets, BLOCK):
            block = range(start, min(start + BLOCK, sets))
            drawn: list[Contrast] = []
            for _ in block:
                drawn_C = _draw(groups, rng)
                sign_C = rng.choice(np.array([-1.0, 1.0]), len(drawn_C))
                drawn += [again for c in own for again in (_redrawn(c, drawn_C), _redrawn(c, drawn_C, sign_C))]
            p_values = iter(_p_values(drawn, bounds, len(drawn_C), seed + start))
            for n, contrast in itertools.product(block, own):
                (p, worse), (p_null, worse_null) = next(p_values), next(p_values)
                line = {k: contrast.line[k] for k in [*POOLED_CHECKPOINT, "measure"]} | {"set": n}
                line |= {"p": p, "p_worse": worse, "p_no_drift": p_null, "p_worse_no_drift": worse_null}
                lines.append(line)
    return pd.DataFrame(lines, columns=COLUMNS)


def replicated_rates(
    rows: pd.DataFrame,
    conditions: Mapping[str, str],
    bounds: Mapping[str, float],
    worse: WorseDirection,
    *,
    sets: int = SETS,
    seed: int = 0,
) -> pd.DataFrame:
    """Return the p-values of `rate_bounds` in re-drawn sets of prompts, with the columns of `replicated_differences`.

    A rate has no reference and so no value without drift: both columns are NaN.
    """
    lines: list[dict[str, object]] = []
    for sample in rate_samples(rows, conditions, bounds):
        if sample.reason or sample.positions is not None:
            continue
        rng, empty = np.random.default_rng(seed), np.zeros(len(sample.values))
        pairs = Pairs(sample.values, empty, sample.strata, sample.clusters, sample.clusters, empty == 0)
        groups = _groups([pairs])
        for n in range(sets):
            own = _resampled(pairs, _draw(groups, rng))
            bound = bounds[sample.measure]
            test = bounded_rate(own.value, own.strata, own.clusters, bound, worse, resamples=RESAMPLES, seed=n)
            line = sample.key | {"measure": sample.measure, "set": n, "p": test["p"], "p_worse": test["p_worse"]}
            lines.append(line)
    return pd.DataFrame(lines, columns=COLUMNS)


def _groups(samples: list[Pairs]) -> list[Ints]:
    """Return the prompts of an axis in groups that share their strata in every measure, such as a trait's half."""
    clusters = np.unique(np.concatenate([s.clusters for s in samples]))
    label_C = np.zeros(len(clusters), dtype=np.intp)
    for sample in samples:
        lowest_C = np.full(len(clusters), sample.strata.max() + 1)
        np.minimum.at(lowest_C, np.searchsorted(clusters, sample.clusters), sample.strata)
        label_C = dense_codes(label_C * (int(lowest_C.max()) + 1) + lowest_C)
    return [clusters[label_C == label] for label in range(int(label_C.max()) + 1)]


def _draw(groups: list[Ints], rng: np.random.Generator) -> Ints:
    """Re-draw the prompts of each group twice, (C,)."""
    return np.concatenate([rng.choice(rng.choice(own, len(own)), len(own)) for own in groups])


def _resampled(pairs: Pairs, drawn_C: Ints) -> Pairs:
    """Return the responses to the drawn prompts; a prompt that was drawn twice counts as two."""
    order = np.argsort(pairs.clusters, kind="stable")
    starts = np.searchsorted(pairs.clusters, drawn_C, side="left", sorter=order)
    counts_C = np.searchsorted(pairs.clusters, drawn_C, side="right", sorter=order) - starts
    offsets = np.arange(int(counts_C.sum())) - np.repeat(np.cumsum(counts_C) - counts_C, counts_C)
    own = pairs.subset(order[np.repeat(starts, counts_C) + offsets])
    return replace(own, clusters=np.repeat(np.arange(len(drawn_C)), counts_C))


def _redrawn(contrast: Contrast, drawn_C: Ints, sign_C: Floats | None = None) -> Contrast:
    assert contrast.scored is not None
    own = _resampled(contrast.scored, drawn_C)
    if sign_C is not None:
        own = replace(own, value=own.base + sign_C[own.clusters] * (own.value - own.base))
    return replace(contrast, scored=own)


def _p_values(
    contrasts: list[Contrast], bounds: Mapping[str, DifferenceBound], prompts: int, seed: int
) -> Iterator[tuple[float, float]]:
    """Yield `p` and `p_worse` of each contrast at its bound."""
    bounded = [c for c in contrasts if not c.measure.log_odds]
    directed = {id(c): directed_bound(bounds[c.measure.name], c.measure) for c in contrasts}
    found: dict[int, tuple[float, float]] = {}
    if bounded:
        matrix = ContrastMatrix(np.arange(prompts), bounded)
        drawn = bound_draws(matrix.sums_CM, matrix.weights_CM, resamples=RESAMPLES, seed=seed)
        bound_M = np.array([directed[id(c)][0] for c in bounded])
        both = zip(drawn.p_below(bound_M).tolist(), drawn.p_above(bound_M).tolist(), strict=True)
        found = {id(c): p for c, p in zip(bounded, both, strict=True)}
    for c in contrasts:
        bound, worse = directed[id(c)]
        if c.measure.log_odds:
            assert c.scored is not None
            shift = Shift.of(c.scored)
            found[id(c)] = (shift.p_below(bound), shift.p_above(bound))
        below, above = found[id(c)]
        yield (below, above) if worse == "higher" else (above, below)
