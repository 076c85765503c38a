"""The joint cluster bootstrap behind every analysis of trajectories, and intervals from its draws.

The prompts of an eval are drawn with one set of multinomial weights for all its checkpoints and measures (Davison &
Hinkley 1997, §3.8), so anything computed from a draw is paired as the rows are: attacks and samples stay with their
prompt. Different evals have different items and are drawn independently. If an objective has S > 1 training seeds,
S − 1 of them are drawn as an outer level, crossed with the prompts (Owen 2007, Ann. Appl. Stat. 1:386); S − 1 of S
makes the variance of a mean over few seeds unbiased (Rao & Wu 1988, JASA 83:231).

Shapes: C clusters, K cells, R resamples, S training seeds, T strata, B budgets of a trajectory.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy
from numpy.typing import NDArray

from leeway.stats import metrics
from leeway.stats.intervals import CHUNK, LEVEL, NAN, RESAMPLES, TIE, Floats, Ints
from leeway.stats.metrics import AT, BASE, CHECKPOINT, PLAIN, POOLED_CHECKPOINT, Measure, StatsError

PRIMARY = ("accuracy", "asr", "endorsement")
RESPONSE = [*CHECKPOINT, "eval", "attack", "item_id", "sample", "question"]
CELLS = [*POOLED_CHECKPOINT, "measure", "axis", "better", "rate", "seeds", "n", "n_unscored", "n_clusters"]
CELLS += ["templates", "note"]
MIN_CLUSTERS = 10  # with fewer, a percentile interval misses the truth more than one time in ten
MIN_DISCORDANT = 6  # e⁻ᵏ of draws contain none of k discordant prompts: with k = 3 more than the tail itself
MAX_UNDEFINED = 0.05  # share of draws without a value; above it the interval is withheld

ObjectiveChoice = Sequence[str | tuple[str, str]]  # objectives, or (objective, condition)


@dataclass(frozen=True)
class Draws:
    """K cells (a measure at a checkpoint under a condition): point estimates and R draws.

    `cells` has one row per cell (columns `CELLS`; with `by_seed` also `seed`); `point_K` and `drawn_RK` are rates in
    [0, 1], NaN if a rate is withheld (`note` has the reason) or a draw has no scored response. `shares_CK` holds each
    prompt's contribution to each rate: a prompt is discordant between two cells if its contributions differ.
    """

    cells: pd.DataFrame
    point_K: Floats
    drawn_RK: Floats
    shares_CK: Floats

    @property
    def measures(self) -> list[str]:
        return [str(m) for m in self.cells["measure"].unique()]

    def n_discordant(self, columns: Iterable[int], weights: Iterable[float]) -> int:
        """Return the number of prompts with a nonzero contribution to a weighted sum of cells."""
        sums_C = self.shares_CK[:, list(columns)] @ np.array(list(weights), dtype=float)
        return int((np.abs(sums_C) > TIE).sum())

    def require(self, *names: str) -> None:
        """Raise StatsError if a measure was not drawn."""
        for name in names:
            if name not in self.measures:
                known = ", ".join(self.measures) or "none of those requested"
                raise StatsError(f"no rows of the measure {name!r} (there is {known})")


def draws(
    rows: pd.DataFrame,
    conditions: Mapping[str, str],
    measures: Sequence[str | Measure] = PRIMARY,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    by_seed: bool = False,
) -> Draws:
    """Return the rates of `measures` (names, or measures) with rows at every checkpoint, and in joint draws.

    Training seeds are pooled and drawn as an outer level; `by_seed` keeps the checkpoints of each seed separate
    instead. Raises StatsError if a checkpoint has two responses to one question under one condition.
    """
    table = metrics.analysis_table(rows, conditions)
    table["template_hash"] = rows["template_hash"].fillna("").astype(object)
    table = table[table["eval"] != metrics.CHECK]  # other forms of the same questions: no measure
    duplicates = table.duplicated(RESPONSE)
    if duplicates.any():
        row = table[duplicates].iloc[0]
        what = f"{row['objective']} at {row['budget']} has two responses to {row['item_id']} under {row['condition']}"
        raise StatsError(f"{what}: two runs, or two versions of a template, were pooled")
    keys = [*POOLED_CHECKPOINT, "seed"] if by_seed else POOLED_CHECKPOINT
    wanted = [m for m in metrics.measures(table) if m.name in {n for n in measures if isinstance(n, str)}]
    wanted += [m for m in measures if isinstance(m, Measure) and not m.select(table).empty]
    metrics.require_fixed_design(table, {m.axis for m in wanted})
    parts = [
        _draw_axis(table, [m for m in wanted if m.axis.partition(AT)[0] == axis], keys, axis, resamples, seed)
        for axis in dict.fromkeys(m.axis.partition(AT)[0] for m in wanted)
    ]
    if not parts:
        empty = pd.DataFrame(columns=[*CELLS, *(["seed"] if by_seed else [])])
        return Draws(empty, np.empty(0), np.empty((resamples, 0)), np.empty((0, 0)))
    cells = pd.concat([p[0] for p in parts], ignore_index=True)
    shares_CK = scipy.linalg.block_diag(*(p[2] for p in parts))  # axes share no cluster
    return Draws(cells, cells["rate"].to_numpy(float), np.concatenate([p[1] for p in parts], axis=1), shares_CK)


def _draw_axis(
    table: pd.DataFrame, wanted: list[Measure], keys: list[str], axis: str, resamples: int, seed: int
) -> tuple[pd.DataFrame, Floats, Floats]:
    """Return cells, draws and shares of the measures that share one eval's items."""
    own_rows = table["eval"].isin({m.axis for m in wanted})
    clusters = np.unique(table.loc[own_rows, "cluster"].to_numpy(np.intp))
    blocks = [MeasureCounts.of(measure, measure.select(table), keys, clusters) for measure in wanted]
    return draw_blocks(blocks, len(clusters), axis, resamples, seed)


def draw_blocks(
    blocks: Sequence[MeasureCounts], clusters: int, axis: str, resamples: int, seed: int
) -> tuple[pd.DataFrame, Floats, Floats]:
    """Return cells, draws (R, K) and shares (C, K) of measures over one set of clusters, drawn jointly."""
    rng = np.random.default_rng([seed, zlib.crc32(axis.encode())])
    drawn: list[list[Floats]] = [[] for _ in blocks]
    outer = {s: _seed_weights(s, resamples, seed) for block in blocks for s in block.seed_sets}
    for start in range(0, resamples, CHUNK):
        size = min(CHUNK, resamples - start)
        weights_RC = multinomial_weights(clusters, size, rng)
        for block, found in zip(blocks, drawn, strict=True):
            found.append(block.rates(weights_RC, {s: w[start : start + size] for s, w in outer.items()}))
    drawn_RK = np.concatenate([np.concatenate(found) for found in drawn], axis=1)
    cells = pd.concat([b.cells for b in blocks], ignore_index=True)
    return cells, drawn_RK, np.concatenate([b.shares() for b in blocks], axis=1)


def multinomial_weights(count: int, size: int, rng: np.random.Generator) -> Floats:
    """Return how often each of `count` is drawn in `count` draws with replacement, (size, count)."""
    picked = rng.integers(0, count, size=(size, count)) + np.arange(size)[:, None] * count
    return np.bincount(picked.ravel(), minlength=size * count).reshape(size, count).astype(np.float64)


def _seed_weights(seeds: tuple[int, ...], resamples: int, seed: int) -> Floats:
    """Return the weights of S training seeds, S − 1 of them drawn, (R, S); equal seed sets share draws."""
    count = len(seeds)
    if count == 1:
        return np.ones((resamples, 1))
    rng = np.random.default_rng([seed, count, *(abs(s) for s in seeds)])
    return rng.multinomial(count - 1, np.full(count, 1 / count), size=resamples).astype(np.float64)


@dataclass(frozen=True)
class MeasureCounts:
    """One measure's sums and counts over clusters, cells, training seeds and strata."""

    cells: pd.DataFrame
    sums_CKST: Floats
    counts_CKST: Floats
    seed_sets: list[tuple[int, ...]]  # per cell
    known_K: Floats  # 1, or NaN if the rate is withheld

    @classmethod
    def of(cls, measure: Measure, chosen: pd.DataFrame, keys: list[str], clusters: Ints) -> MeasureCounts:
        names, strata = metrics.factorize(chosen["stratum"])
        grouped = chosen.groupby(keys, sort=True)
        cell = grouped.ngroup().to_numpy(np.intp)
        seeds, where = np.unique(chosen["seed"].to_numpy(), return_inverse=True)
        value = chosen["value"].to_numpy(float)
        scored = ~np.isnan(value)
        cluster = np.searchsorted(clusters, chosen["cluster"].to_numpy(np.intp))
        shape = (len(clusters), grouped.ngroups, len(seeds), len(names))
        flat = np.ravel_multi_index((cluster, cell, where, strata), shape)[scored]
        counts = np.bincount(flat, minlength=int(np.prod(shape))).astype(np.float64).reshape(shape)
        sums = np.bincount(flat, weights=value[scored], minlength=int(np.prod(shape))).astype(np.float64).reshape(shape)
        lines, sets = [], []
        for k, (key, at) in enumerate(metrics.group_indices(chosen, keys)):
            sets.append(tuple(int(s) for s in np.unique(seeds[where[at]])))
            line = key | {"measure": measure.name, "axis": measure.axis, "better": measure.better, "rate": NAN}
            line |= {"seeds": len(sets[-1]), "n": int(scored[at].sum()), "n_unscored": int((~scored[at]).sum())}
            line["n_clusters"] = int((counts[:, k].sum(axis=(1, 2)) > 0).sum())
            line["templates"] = " ".join(sorted(chosen["template_hash"].iloc[at].unique()))
            note = metrics.withheld_reason(~scored[at], strata[at], cluster[at], names, measure)
            lines.append(line | {"note": note})
        cells = pd.DataFrame(lines)
        known = np.where(cells["note"].to_numpy(object) == "", 1.0, np.nan)
        block = cls(cells, sums, counts, sets, known)
        cells["rate"] = block.point()
        return block

    def point(self) -> Floats:
        totals, counts = self.sums_CKST.sum(axis=(0, 2)), self.counts_CKST.sum(axis=(0, 2))
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray((totals / counts).mean(axis=1) * self.known_K)

    def rates(self, weights_RC: Floats, outer: dict[tuple[int, ...], Floats]) -> Floats:
        """Return the rates under drawn prompts and drawn seeds, (R, K)."""
        size = len(weights_RC)
        _, cells, seeds, strata = self.sums_CKST.shape
        totals = (weights_RC @ self.sums_CKST.reshape(weights_RC.shape[1], -1)).reshape(size, cells, seeds, strata)
        counts = (weights_RC @ self.counts_CKST.reshape(weights_RC.shape[1], -1)).reshape(size, cells, seeds, strata)
        if seeds > 1:
            every = sorted({s for own in self.seed_sets for s in own})
            weights_RKS = np.zeros((size, cells, seeds))
            for k, own in enumerate(self.seed_sets):
                weights_RKS[:, k, [every.index(s) for s in own]] = outer[own]
            totals, counts = totals * weights_RKS[..., None], counts * weights_RKS[..., None]
        with np.errstate(invalid="ignore", divide="ignore"):
            mean_RKT = totals.sum(axis=2) / counts.sum(axis=2)
        return np.asarray(mean_RKT.mean(axis=2) * self.known_K)

    def shares(self) -> Floats:
        """Return each cluster's contribution to each rate, (C, K)."""
        with np.errstate(invalid="ignore", divide="ignore"):
            share_CKT = self.sums_CKST.sum(axis=2) / self.counts_CKST.sum(axis=(0, 2))
        return np.asarray(np.nan_to_num(share_CKT.mean(axis=2)))


@dataclass(frozen=True)
class Trajectory:
    """An objective under one condition: its budgets in order, and their columns among the cells."""

    objective: str
    condition: str
    budgets_B: Floats
    columns_B: Ints
    base: int  # column of the base under the same condition; −1 if there is none
    n_clusters: int
    withheld: str  # why no number is reported; empty if one is
    note: str  # limitations of every number

    @property
    def key(self) -> dict[str, object]:
        return {"objective": self.objective, "condition": self.condition}

    @property
    def label(self) -> str:
        return self.objective if self.condition == PLAIN else f"{self.objective} {self.condition}"

    @property
    def columns_with_base(self) -> list[int]:
        return [self.base, *(int(k) for k in self.columns_B)]

    @property
    def missing_base(self) -> str:
        """Reason to withhold a number that needs the base; empty if the base was measured."""
        return "" if self.base >= 0 else f"no base under {self.condition}"


def trajectories(drawn: Draws, measure: str, objectives: ObjectiveChoice | None = None) -> list[Trajectory]:
    """Return one trajectory per objective, in the order of `objectives`.

    Its condition is the given one, or the one with the most budgets (`plain` if tied). Raises StatsError for a measure
    or an objective that the rows do not have.
    """
    drawn.require(measure)
    cells = drawn.cells[drawn.cells["measure"] == measure]
    tuned = cells[cells["objective"] != BASE]
    if tuned.empty:
        raise StatsError(f"no trained checkpoint has {measure}, so there is no trajectory")
    wanted = list(objectives) if objectives is not None else sorted(str(o) for o in tuned["objective"].unique())
    return [_trajectory(cells, tuned, one) for one in wanted]


def _trajectory(cells: pd.DataFrame, tuned: pd.DataFrame, wanted: str | tuple[str, str]) -> Trajectory:
    objective, condition = (wanted, None) if isinstance(wanted, str) else wanted
    own = tuned[tuned["objective"] == objective]
    if own.empty:
        known = ", ".join(sorted(tuned["objective"].unique()))
        raise StatsError(f"no checkpoints of {objective!r} (the rows have {known})")
    budgets = own.groupby("condition")["budget"].nunique()
    if condition is None:
        condition = min(budgets.index, key=lambda c: (-budgets[c], c != PLAIN, c))
    elif condition not in budgets.index:
        raise StatsError(f"{objective} was not measured under {condition!r}, only under {', '.join(budgets.index)}")
    own = own[own["condition"] == condition].sort_values("budget")
    base = cells[(cells["objective"] == BASE) & (cells["condition"] == condition)]
    both = pd.concat([own, base])
    withheld = "; ".join(f"{r['objective']} at {r['budget']}: {r['note']}" for _, r in both.iterrows() if r["note"])
    if not withheld and both["templates"].nunique() > 1:
        withheld = "the checkpoints have different templates, so their questions differ"
    limitations = []
    seeds = sorted(own["seeds"].unique())
    if seeds[0] == 1:
        limitations.append("one training seed: training-seed variance is not covered")
    elif seeds[0] < 5:
        limitations.append(f"{seeds[0]} training seeds: training-seed variance is a rough estimate")
    if (both["n"] + both["n_unscored"]).div(both["seeds"]).nunique() > 1:
        limitations.append("the checkpoints have different numbers of questions")
    budgets_B, columns_B = own["budget"].to_numpy(float), own.index.to_numpy(np.intp)
    base_column, clusters = int(base.index[0]) if len(base) else -1, int(both["n_clusters"].min())
    note = "; ".join(limitations)
    return Trajectory(objective, condition, budgets_B, columns_B, base_column, clusters, withheld, note)


@dataclass(frozen=True)
class Interval:
    """A percentile interval and the two-sided p-value of 0; NaN with a `note` if withheld."""

    low: float
    high: float
    p: float
    note: str = ""


def interval(drawn_R: Floats, clusters: int, discordant: int | None = None, level: float = LEVEL) -> Interval:
    """Return the expanded percentile interval of the draws, and the p-value that agrees with it.

    Percentiles correspond to a normal with a variance too small by C/(C − 1): too narrow with few prompts. The tail α/2
    is therefore taken at Φ(−√(C/(C − 1)) · t_{C−1, α/2}) (Hesterberg 2015, Am. Stat. 69:371), and
    2·min(P(draw ≤ 0), P(draw ≥ 0)), counting the observed value itself, is converted to p the same way.

    Withheld below 10 prompts, with fewer than 6 discordant prompts, and if the value is undefined in more than 5% of
    draws; otherwise undefined draws are left out, and noted.
    """
    defined = drawn_R[np.isfinite(drawn_R)]
    undefined = 1 - len(defined) / max(len(drawn_R), 1)
    if clusters < MIN_CLUSTERS:
        return Interval(NAN, NAN, NAN, f"{clusters} prompts: too few for an interval")
    if discordant is not None and discordant < MIN_DISCORDANT:
        return Interval(NAN, NAN, NAN, f"only {discordant} discordant prompts: too few for an interval")
    if undefined > MAX_UNDEFINED:
        return Interval(NAN, NAN, NAN, f"undefined in {undefined:.0%} of draws")
    if np.ptp(defined) <= TIE:
        return Interval(NAN, NAN, NAN, "all draws are equal: no interval")
    shrink = float(np.sqrt((clusters - 1) / clusters))
    tail = float(scipy.stats.norm.cdf(scipy.stats.t.ppf((1 - level) / 2, clusters - 1) / shrink))
    low, high = np.quantile(defined, [tail, 1 - tail])
    note = f"the interval leaves out {undefined:.1%} of draws, in which the value is undefined" if undefined else ""
    return Interval(round(float(low), 10), round(float(high), 10), p_zero(defined, clusters), note)


def p_zero(defined_R: Floats, clusters: int) -> float:
    """Return the two-sided p-value of 0, on C − 1 degrees of freedom."""
    below, above = int((defined_R <= 0).sum()), int((defined_R >= 0).sum())
    tail = min(0.5, (min(below, above) + 1) / (len(defined_R) + 1))
    shrink = float(np.sqrt((clusters - 1) / clusters))
    return float(f"{2 * scipy.stats.t.cdf(scipy.stats.norm.ppf(tail) * shrink, clusters - 1):.10g}")


def join_notes(*notes: str) -> str:
    """Join notes with "; ", each part once."""
    return "; ".join(dict.fromkeys(part for one in notes if one for part in one.split("; ")))


def simultaneous_lower(point_B: Floats, drawn_RB: Floats, level: float = LEVEL) -> Floats:
    """Return one-sided lower bounds that hold for all B values simultaneously; NaN without variance.

    point − c·se, with c the `level` quantile over draws of max_b (drawn_b − point_b)/se_b (max-t; Romano & Wolf 2005,
    Econometrica 73:1237).
    """
    se_B = drawn_RB.std(axis=0, ddof=1)
    varies: NDArray[np.bool_] = se_B > 1e-12
    bound_B = np.full(len(point_B), NAN)
    if varies.any():
        t_R = ((drawn_RB - point_B)[:, varies] / se_B[varies]).max(axis=1)
        bound_B[varies] = point_B[varies] - np.quantile(t_R, level) * se_B[varies]
    return bound_B
