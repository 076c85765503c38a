"""One joint cluster bootstrap behind every analysis of trajectories.

The prompts of an eval are drawn with one set of multinomial weights for all checkpoints and measures of that eval
(Davison & Hinkley 1997, §3.8), so that whatever is computed from a draw is paired as the rows are: attacks and samples
ride along with their prompt. Different evals ask different items, and are drawn apart. Where an objective has S > 1
training seeds, S − 1 of them are drawn as an outer level, crossed with the prompts (Owen 2007, Ann. Appl. Stat. 1:386);
S − 1 of S makes the variance of a mean over few seeds unbiased (Rao & Wu 1988, JASA 83:231).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from leeway.stats.intervals import CHUNK, RESAMPLES, Floats, Ints
from leeway.stats.measures import (
    AT,
    CHECK,
    CHECKPOINT,
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
