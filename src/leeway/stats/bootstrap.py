"""One joint cluster bootstrap behind every analysis of trajectories.

The prompts of an eval are drawn with one set of multinomial weights for all checkpoints and measures of that eval
(Davison & Hinkley 1997, §3.8), so that whatever is computed from a draw is paired as the rows are: attacks and samples
ride along with their prompt. Different evals ask different items, and are drawn apart. Where an objective has S > 1
training seeds, S − 1 of them are drawn as an outer level, crossed with the prompts (Owen 2007, Ann. Appl. Stat. 1:386);
S − 1 of S makes the variance of a mean over few seeds unbiased (Rao & Wu 1988, JASA 83:231).

A trajectory's cells in a set of draws, and the interval of anything computed from them.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import norm
from scipy.stats import t as student

from leeway.stats.intervals import CHUNK, LEVEL, RESAMPLES, Floats, Ints
from leeway.stats.metrics import (
    AT,
    BASE,
    CHECK,
    CHECKPOINT,
    PLAIN,
    Measure,
    StatsError,
    codes,
    groups,
    measures,
    observations,
    refuse,
    why_not,
)

KEY = ["objective", "budget", "condition"]
TIE = 1e-9  # two sums of the same shares in another order differ by rounding
PRIMARY = ("accuracy", "asr", "endorsement")
ANSWER = [*CHECKPOINT, "eval", "attack", "item_id", "sample", "question"]
CELLS = [*KEY, "measure", "axis", "better", "rate", "seeds", "n", "n_unscored", "n_clusters", "templates", "note"]


@dataclass(frozen=True)
class Draws:
    """K cells (a measure at a checkpoint under a condition) at the point and in R draws.

    `cells` has one row per cell (columns `CELLS`; with `by_seed` also `seed`); `point_K` and `drawn_RK` are rates in
    [0, 1], NaN where a rate is withheld (`note` says why) or where a draw left nothing to count. `shares_CK` holds what
    each prompt adds to each rate: a prompt has moved between two cells where its shares differ.
    """

    cells: pd.DataFrame
    point_K: Floats
    drawn_RK: Floats
    shares_CK: Floats

    @property
    def measures(self) -> list[str]:
        return [str(m) for m in self.cells["measure"].unique()]

    def moved(self, columns: Iterable[int], weights: Iterable[float]) -> int:
        """How many prompts pull on a weighted sum of cells at all."""
        pulls_C = self.shares_CK[:, list(columns)] @ np.array(list(weights), dtype=float)
        return int((np.abs(pulls_C) > TIE).sum())

    def need(self, *names: str) -> None:
        """Raise StatsError where a measure was not drawn."""
        for name in names:
            if name not in self.measures:
                there = ", ".join(self.measures) or "none that was asked for"
                raise StatsError(f"no rows of the measure {name!r}: there is {there}")


def draws(
    rows: pd.DataFrame,
    conditions: Mapping[str, str],
    measures: Sequence[str] = PRIMARY,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    by_seed: bool = False,
) -> Draws:
    """The rates of `measures` at every checkpoint, and in `resamples` joint draws; a measure without rows is left out.

    Training seeds are pooled and drawn as an outer level; `by_seed` keeps each seed's checkpoints apart instead.
    Raises StatsError where a checkpoint answered one question twice under one condition.
    """
    table = observations(rows, conditions)
    table["template_hash"] = rows["template_hash"].fillna("").astype(object)
    table = table[table["eval"] != CHECK]  # other forms of the same questions, and no measure
    twice = table.duplicated(ANSWER)
    if twice.any():
        row = table[twice].iloc[0]
        what = f"{row['objective']} at {row['budget']} answered {row['item_id']} twice under {row['condition']}"
        raise StatsError(f"{what}: rows of two runs, or of two versions of a template, were pooled")
    keys = [*KEY, "seed"] if by_seed else KEY
    wanted = [m for m in _measures(table) if m.name in set(measures)]
    refuse(table, {m.axis for m in wanted})
    parts = [
        _axis(table, [m for m in wanted if m.axis.partition(AT)[0] == axis], keys, axis, resamples, seed)
        for axis in dict.fromkeys(m.axis.partition(AT)[0] for m in wanted)
    ]
    if not parts:
        empty = pd.DataFrame(columns=[*CELLS, *(["seed"] if by_seed else [])])
        return Draws(empty, np.empty(0), np.empty((resamples, 0)), np.empty((0, 0)))
    cells = pd.concat([p[0] for p in parts], ignore_index=True)
    shares_CK = np.zeros((sum(len(p[2]) for p in parts), len(cells)))
    top = left = 0
    for _, _, shares in parts:
        down, along = shares.shape
        shares_CK[top : top + down, left : left + along] = shares
        top, left = top + down, left + along
    return Draws(cells, cells["rate"].to_numpy(float), np.concatenate([p[1] for p in parts], axis=1), shares_CK)


_measures = measures  # the argument of `draws` has the same name


def _axis(
    table: pd.DataFrame, wanted: list[Measure], keys: list[str], axis: str, resamples: int, seed: int
) -> tuple[pd.DataFrame, Floats, Floats]:
    """Cells, draws and shares of the measures that ask one eval's items."""
    of_axis = table["eval"].isin({m.axis for m in wanted})
    clusters = np.unique(table.loc[of_axis, "cluster"].to_numpy(np.intp))
    blocks = [_Block.of(measure, measure.select(table), keys, clusters) for measure in wanted]
    rng = np.random.default_rng([seed, zlib.crc32(axis.encode())])
    drawn: list[list[Floats]] = [[] for _ in blocks]
    outer = {s: _seed_draws(s, resamples, seed) for block in blocks for s in block.seed_sets}
    for start in range(0, resamples, CHUNK):
        size = min(CHUNK, resamples - start)
        weights_RC = multinomial(len(clusters), size, rng)
        for block, found in zip(blocks, drawn, strict=True):
            found.append(block.rates(weights_RC, {s: w[start : start + size] for s, w in outer.items()}))
    drawn_RK = np.concatenate([np.concatenate(found) for found in drawn], axis=1)
    cells = pd.concat([b.cells for b in blocks], ignore_index=True)
    return cells, drawn_RK, np.concatenate([b.shares() for b in blocks], axis=1)


def multinomial(count: int, size: int, rng: np.random.Generator) -> Floats:
    """(size, count): how often each of `count` is drawn in `count` draws with replacement."""
    picked = rng.integers(0, count, size=(size, count)) + np.arange(size)[:, None] * count
    return np.bincount(picked.ravel(), minlength=size * count).reshape(size, count).astype(np.float64)


def _seed_draws(seeds: tuple[int, ...], resamples: int, seed: int) -> Floats:
    """(resamples, S): weights of S training seeds, S − 1 of them drawn; objectives with the same seeds share draws."""
    count = len(seeds)
    if count == 1:
        return np.ones((resamples, 1))
    rng = np.random.default_rng([seed, count, *(abs(s) for s in seeds)])
    return rng.multinomial(count - 1, np.full(count, 1 / count), size=resamples).astype(np.float64)


@dataclass(frozen=True)
class _Block:
    """One measure's sums and counts over clusters, cells, training seeds and strata."""

    cells: pd.DataFrame
    sums_CKST: Floats
    counts_CKST: Floats
    seed_sets: list[tuple[int, ...]]  # per cell
    known_K: Floats  # 1, or NaN where the rate is withheld

    @classmethod
    def of(cls, measure: Measure, chosen: pd.DataFrame, keys: list[str], clusters: Ints) -> _Block:
        names, strata = codes(chosen["stratum"])
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
        for k, (key, at) in enumerate(groups(chosen, keys)):
            own = tuple(int(s) for s in np.unique(seeds[where[at]]))
            sets.append(own)
            lines.append(key | _describe(measure, chosen, at, strata[at], names, own))
            lines[-1]["n_clusters"] = int((counts[:, k].sum(axis=(1, 2)) > 0).sum())
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
        """(R, K): the rates under drawn prompts and drawn seeds."""
        size = len(weights_RC)
        _, cells, seeds, strata = self.sums_CKST.shape
        totals = (weights_RC @ self.sums_CKST.reshape(weights_RC.shape[1], -1)).reshape(size, cells, seeds, strata)
        counts = (weights_RC @ self.counts_CKST.reshape(weights_RC.shape[1], -1)).reshape(size, cells, seeds, strata)
        if seeds > 1:
            every = sorted({s for own in self.seed_sets for s in own})
            chosen_RKS = np.zeros((size, cells, seeds))
            for k, own in enumerate(self.seed_sets):
                chosen_RKS[:, k, [every.index(s) for s in own]] = outer[own]
            totals, counts = totals * chosen_RKS[..., None], counts * chosen_RKS[..., None]
        with np.errstate(invalid="ignore", divide="ignore"):
            inside = totals.sum(axis=2) / counts.sum(axis=2)
        return np.asarray(inside.mean(axis=2) * self.known_K)

    def shares(self) -> Floats:
        """(C, K): what each cluster adds to each rate."""
        with np.errstate(invalid="ignore", divide="ignore"):
            inside = self.sums_CKST.sum(axis=2) / self.counts_CKST.sum(axis=(0, 2))
        return np.asarray(np.nan_to_num(inside.mean(axis=2)))


def _describe(
    measure: Measure, chosen: pd.DataFrame, at: Ints, strata: Ints, names: list[str], seeds: tuple[int, ...]
) -> dict[str, object]:
    own = chosen.iloc[at]
    absent = own["value"].isna().to_numpy()
    return {
        "measure": measure.name,
        "axis": measure.axis,
        "better": measure.better,
        "rate": float("nan"),
        "seeds": len(seeds),
        "n": int((~absent).sum()),
        "n_unscored": int(absent.sum()),
        "n_clusters": 0,
        "templates": " ".join(sorted(own["template_hash"].unique())),
        "note": why_not(absent, strata, names, measure),
    }


Asked = Sequence[str | tuple[str, str]]  # objectives, or (objective, condition)

MIN_CLUSTERS = 10  # below this a percentile interval misses the truth more than one time in ten
MIN_MOVED = 6  # draws in which none of k moved prompts is drawn are e⁻ᵏ of them: with 3, more than the tail itself
MAX_LOST = 0.05  # draws in which a value does not exist; above this share the interval is withheld
NAN = float("nan")


@dataclass(frozen=True)
class Trajectory:
    """An objective under one condition: its budgets in order, and where each stands among the cells."""

    objective: str
    condition: str
    budgets_B: Floats
    columns_B: Ints
    base: int  # column of the base under the same condition; −1 where there is none
    n_clusters: int
    withheld: str  # why no number can be made of it; empty if one can
    note: str  # what weakens every number made of it

    @property
    def key(self) -> dict[str, object]:
        return {"objective": self.objective, "condition": self.condition}

    @property
    def label(self) -> str:
        return self.objective if self.condition == PLAIN else f"{self.objective} {self.condition}"


def trajectories(drawn: Draws, measure: str, objectives: Asked | None = None) -> list[Trajectory]:
    """One per objective, in the order asked for: under the condition with the most budgets (`plain` if several have),
    or the one asked for. Raises StatsError for a measure or an objective that the rows do not have."""
    drawn.need(measure)
    cells = drawn.cells[drawn.cells["measure"] == measure]
    tuned = cells[cells["objective"] != BASE]
    if tuned.empty:
        raise StatsError(f"no trained checkpoint has {measure}: there is no trajectory to look at")
    asked = list(objectives) if objectives is not None else sorted(str(o) for o in tuned["objective"].unique())
    return [_trajectory(cells, tuned, one) for one in asked]


def _trajectory(cells: pd.DataFrame, tuned: pd.DataFrame, asked: str | tuple[str, str]) -> Trajectory:
    objective, condition = (asked, None) if isinstance(asked, str) else asked
    own = tuned[tuned["objective"] == objective]
    if own.empty:
        there = ", ".join(sorted(tuned["objective"].unique()))
        raise StatsError(f"no checkpoints of {objective!r}: the rows have {there}")
    budgets = own.groupby("condition")["budget"].nunique()
    if condition is None:
        condition = min(budgets.index, key=lambda c: (-budgets[c], c != PLAIN, c))
    elif condition not in budgets.index:
        raise StatsError(f"{objective} was not measured under {condition!r}: only under {', '.join(budgets.index)}")
    own = own[own["condition"] == condition].sort_values("budget")
    base = cells[(cells["objective"] == BASE) & (cells["condition"] == condition)]
    together = pd.concat([own, base])
    clusters, weak = int(together["n_clusters"].min()), []
    withheld = "; ".join(f"{r['objective']} at {r['budget']}: {r['note']}" for _, r in together.iterrows() if r["note"])
    if not withheld and together["templates"].nunique() > 1:
        withheld = "asked under different templates along the way: not the same questions"
    seeds = sorted(own["seeds"].unique())
    if seeds[0] == 1:
        weak.append("one training seed: says nothing of another run")
    elif seeds[0] < 5:
        weak.append(f"{seeds[0]} training seeds: the spread between runs is known roughly")
    if (together["n"] + together["n_unscored"]).div(together["seeds"]).nunique() > 1:
        weak.append("not every checkpoint was asked as many questions")
    where = int(base.index[0]) if len(base) else -1
    found = own.index.to_numpy(np.intp)
    budgets_B = own["budget"].to_numpy(float)
    return Trajectory(objective, condition, budgets_B, found, where, clusters, withheld, "; ".join(weak))


@dataclass(frozen=True)
class Interval:
    """A percentile interval and the two-sided p-value of zero; NaN with a `note` where draws cannot tell."""

    low: float
    high: float
    p: float
    note: str = ""


def interval(drawn_R: Floats, clusters: int, moved: int | None = None, level: float = LEVEL) -> Interval:
    """Expanded percentiles of the draws, and the p-value that agrees with them.

    Percentiles are a normal's, of a variance short of C/(C − 1): with few prompts too narrow. The tail α/2 is therefore
    taken at Φ(−√(C/(C − 1)) · t_{C−1, α/2}) (Hesterberg 2015, Am. Stat. 69:371), and 2·min(P(draw ≤ 0), P(draw ≥ 0)),
    counted with the observed value itself, is turned into p the same way.

    Withheld below 10 prompts, where fewer than 6 of them moved (draws of the few say nothing of the many), and where
    the value does not exist in more than 5% of draws; below that it is of the draws in which it does, and noted.
    """
    known = drawn_R[np.isfinite(drawn_R)]
    lost = 1 - len(known) / max(len(drawn_R), 1)
    if clusters < MIN_CLUSTERS:
        return Interval(NAN, NAN, NAN, f"{clusters} prompts: too few for an interval")
    if moved is not None and moved < MIN_MOVED:
        return Interval(NAN, NAN, NAN, f"only {moved} prompts moved: too few for an interval")
    if lost > MAX_LOST:
        return Interval(NAN, NAN, NAN, f"undefined in {lost:.0%} of draws")
    if np.ptp(known) <= TIE:
        return Interval(NAN, NAN, NAN, "no draw differs from another: no interval")
    short = float(np.sqrt((clusters - 1) / clusters))
    tail = float(norm.cdf(student.ppf((1 - level) / 2, clusters - 1) / short))
    low, high = np.quantile(known, [tail, 1 - tail])
    said = f"the interval leaves out {lost:.1%} of draws, in which there is no value" if lost else ""
    return Interval(round(float(low), 10), round(float(high), 10), p_zero(known, clusters), said)


def p_zero(known_R: Floats, clusters: int) -> float:
    """Two-sided p of zero, on `clusters` − 1 degrees of freedom."""
    below, above = int((known_R <= 0).sum()), int((known_R >= 0).sum())
    beyond = min(0.5, (min(below, above) + 1) / (len(known_R) + 1))
    short = float(np.sqrt((clusters - 1) / clusters))
    return float(f"{2 * student.cdf(norm.ppf(beyond) * short, clusters - 1):.10g}")


def notes(*said: str) -> str:
    """What there is to say, each thing once."""
    return "; ".join(dict.fromkeys(part for one in said if one for part in one.split("; ")))


def simultaneous_lower(point_B: Floats, drawn_RB: Floats, level: float = LEVEL) -> Floats:
    """One-sided lower bounds that hold for all B values at once: point − c·se, c the `level` quantile over draws of
    max_b (drawn_b − point_b)/se_b (max-t; Romano & Wolf 2005, Econometrica 73:1237). NaN where nothing varies."""
    se_B = drawn_RB.std(axis=0, ddof=1)
    varies: NDArray[np.bool_] = se_B > 1e-12
    bound_B = np.full(len(point_B), NAN)
    if varies.any():
        t_R = ((drawn_RB - point_B)[:, varies] / se_B[varies]).max(axis=1)
        bound_B[varies] = point_B[varies] - np.quantile(t_R, level) * se_B[varies]
    return bound_B
