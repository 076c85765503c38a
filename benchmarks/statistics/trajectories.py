"""What the analyses of trajectories get wrong, in studies whose truth is known.

    python -m benchmarks.statistics.trajectories [STUDIES [STUDIES_WITH_GEE [WORLD]]]

Prints one line per world and question: how often a true null was rejected at 5%, how often a 95% interval held the
truth, with the standard error of that share. `docs/statistics.md` keeps what was measured.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pandas as pd

from benchmarks.statistics.world import AXES, CONDITIONS, Alike, Rates, World, checkpoints, rows, scores
from leeway.stats import budget_curves, interaction
from leeway.stats.bootstrap import Draws, MeasureCounts, draws, multinomial_weights, trajectories
from leeway.stats.interaction import Slope, joint_bootstrap_line, pair_line

# the package exports functions of the same names

BUDGETS = (50_000, 100_000, 200_000, 400_000)
RESAMPLES = 1_000
Found = dict[str, float]  # question -> 1 wrong/held, 0 not, NaN where nothing was said


def objective(accuracy: tuple[float, ...], asr: tuple[float, ...]) -> list[Rates]:
    """True rates along the budgets; endorsement rises alike for all."""
    return [Rates(a, v, e) for a, v, e in zip(accuracy, asr, (0.21, 0.22, 0.24, 0.26), strict=True)]


RISING, STEEP, FLAT = (0.08, 0.11, 0.15, 0.20), (0.08, 0.13, 0.20, 0.30), (0.10, 0.10, 0.10, 0.10)
LEARNS, SLOWLY = (0.42, 0.50, 0.58, 0.66), (0.40, 0.45, 0.50, 0.56)
BASE = Rates(0.35, 0.08, 0.2)
THREE = ("a", "b", "c")
SPARE = ("capability", "jailbreak")
ALIKE = World(BASE, {n: objective(LEARNS, RISING) for n in THREE}, BUDGETS)
UNMOVED = World(replace(BASE, asr=0.1), {n: objective(LEARNS, FLAT) for n in THREE}, BUDGETS, axes=SPARE)
APART = World(BASE, {"a": objective(LEARNS, STEEP), "b": objective(SLOWLY, RISING)}, BUDGETS, axes=SPARE)
WORLDS = {
    "alike": ALIKE,
    "apart": APART,
    "unmoved": UNMOVED,
    "apart, 3 seeds with runs that differ": replace(APART, seeds=(0, 1, 2), alike=Alike(run=0.01)),
    "alike, 30 prompts": replace(ALIKE, prompts=30, items=60, axes=SPARE),
    "apart, 30 prompts": replace(APART, prompts=30, items=60),
    "apart, 5 seeds with runs that differ": replace(APART, seeds=(0, 1, 2, 3, 4), alike=Alike(run=0.01)),
    "apart, 1 seed with runs that differ": replace(APART, alike=Alike(run=0.01)),
}


class Simulation:
    """Studies of one world. Their rows differ in the scores alone: what a table says besides is worked out once."""

    def __init__(self, world: World, resamples: int = RESAMPLES) -> None:
        self.world, self.resamples = world, resamples
        self.names = tuple(AXES[a] for a in world.axes)
        first = rows(world, np.random.default_rng(0))
        self.template = draws(first, CONDITIONS, self.names, resamples=10)
        self.along = {m: trajectories(self.template, m) for m in self.names}
        self.columns = {m: np.flatnonzero(self.template.cells["measure"] == m) for m in self.names}

    def study(self, rng: np.random.Generator, gee: bool = True) -> Found:
        """One study, and what each analysis said of it against the truth."""
        of_axes = {AXES[a]: scores(self.world, a, rng)[..., 0] for a in self.world.axes}
        drawn = self.drawn(of_axes, rng)
        found: Found = {}
        for measure in (m for m in ("asr", "endorsement") if m in self.names):
            found |= self.divergence(drawn, measure)
            if gee:
                found |= self.joint(of_axes[measure], measure)
        return found | self.coupling(drawn) | self.matched(drawn) | self.onset(drawn)

    def drawn(self, of_axes: dict[str, np.ndarray], rng: np.random.Generator) -> Draws:
        """`stats.draws` of these scores, without the table in between (`tests` hold the two to be the same)."""
        cells, seeds = self.template.cells.copy(), self.world.seeds
        size = sum(len(s[0]) for s in of_axes.values())
        drawn_RK, shares_CK = np.empty((self.resamples, len(cells))), np.zeros((size, len(cells)))
        outer = multinomial_seeds(len(seeds), self.resamples, rng)
        top = 0
        for measure, score in of_axes.items():
            sums, counts = self.arranged(score)
            mine = self.columns[measure]
            sets = [seeds if o != "base" else (0,) for o in cells.loc[mine, "objective"]]
            block = MeasureCounts(cells.loc[mine], sums, counts, sets, np.ones(len(mine)))
            weights = multinomial_weights(len(sums), self.resamples, rng)
            alone = np.ones((self.resamples, 1))
            drawn_RK[:, mine] = block.rates(weights, {(0,): alone} | {seeds: outer if len(seeds) > 1 else alone})
            shares_CK[np.ix_(np.arange(top, top + len(sums)), mine)] = block.shares()
            cells.loc[mine, "rate"] = block.point()
            top += len(sums)
        return Draws(cells, cells["rate"].to_numpy(float), drawn_RK, shares_CK)

    def arranged(self, score_KCAS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(prompts, cells, seeds, attacks): sums over samples, and how many."""
        where = {(c.objective, c.budget, c.seed): k for k, c in enumerate(checkpoints(self.world))}
        keys = sorted({(o, b) for o, b, _ in where})
        shape = (score_KCAS.shape[1], len(keys), len(self.world.seeds), score_KCAS.shape[2])
        sums, counts = np.zeros(shape), np.zeros(shape)
        for k, (o, b) in enumerate(keys):
            for s, seed in enumerate(self.world.seeds):
                if (o, b, seed) in where:
                    sums[:, k, s] = score_KCAS[where[o, b, seed]].sum(axis=2)
                    counts[:, k, s] = score_KCAS.shape[3]
        return sums, counts

    def curve(self, name: str, measure: str) -> np.ndarray:
        """The true rates, base first."""
        base, tuned = self.world.base, self.world.tuned[name]
        return np.array([getattr(base, measure), *(getattr(r, measure) for r in tuned)])

    def alike(self, measure: str) -> bool:
        return bool(np.ptp([self.curve(n, measure) for n in self.world.tuned], axis=0).max() == 0)

    def joint(self, score_KCAS: np.ndarray, measure: str) -> Found:
        parts = []
        for k, at in enumerate(checkpoints(self.world)):
            if at.objective == "base":
                continue
            prompt, attack, _ = np.indices(score_KCAS.shape[1:]).reshape(3, -1)
            part = {"trajectory": list(self.world.tuned).index(at.objective), "x": np.log2(at.budget)}
            parts.append(pd.DataFrame({"cluster": prompt, "attack": attack, "value": score_KCAS[k].ravel()} | part))
        p = interaction.gee_test(pd.concat(parts), len(self.world.tuned)).p
        return {f"{measure}: GEE, equal slopes rejected ({'null' if self.alike(measure) else 'power'})": rejected(p)}

    def divergence(self, drawn: Draws, measure: str) -> Found:
        slopes = [Slope(t, drawn) for t in self.along[measure]]
        names = [s.trajectory.objective for s in slopes]
        true = {n: float(slopes[0].weights_B @ self.curve(n, measure)[1:]) for n in names}
        one, pair = slopes[0].line(measure), pair_line(slopes[0], slopes[1], drawn, measure)
        kind = "null" if self.alike(measure) else "power"
        p_joint = joint_bootstrap_line(slopes, measure)["p"]
        found = {f"{measure}: bootstrap, equal slopes rejected ({kind})": rejected(p_joint)}
        found[f"{measure}: slope held"] = held(one, true[names[0]])
        if abs(true[names[0]]) < 1e-12:
            found[f"{measure}: slope rejected (null)"] = rejected(one["p"])
        if kind == "null":
            found[f"{measure}: pair rejected (null)"] = rejected(pair["p"])
        return found | {f"{measure}: pair of slopes held": held(pair, true[names[0]] - true[names[1]])}

    def coupling(self, drawn: Draws) -> Found:
        y, x = self.along["asr"][0], self.along["accuracy"][0]
        line = budget_curves._coupling_line(y, x, drawn, "asr", "accuracy")
        true = np.polyfit(self.curve(y.objective, "accuracy"), self.curve(y.objective, "asr"), 1)[0]
        plain = float(str(line["uncorrected"]))
        told = {
            "coupling: corrected − true": float(str(line["estimate"])) - true,
            "coupling: least squares − true": plain - true,
        }
        return {"coupling held": held(line, float(true))} | told

    def matched(self, drawn: Draws) -> Found:
        found: Found = {}
        pairs = zip(self.along["asr"], self.along["accuracy"], strict=True)
        curves = [budget_curves.Curve.of(y, x, drawn, budget_curves.CAPABILITY) for y, x in pairs]
        a, b = (c.trajectory.objective for c in curves[:2])
        of = {n: (self.curve(n, "accuracy"), self.curve(n, "asr")) for n in self.world.tuned}
        for at, true in (("largest", min(x[-1] for x, _ in of.values())), ("base+10", self.world.base.accuracy + 0.1)):
            target_R = budget_curves._target(at, curves, drawn, "accuracy")
            lines = budget_curves.matched_lines("asr", curves, target_R, at)
            line = next(t for t in lines if t["kind"] == "pair" and t["against"] == b)
            found[f"matched at {at} held"] = held(line, float(np.interp(true, *of[a]) - np.interp(true, *of[b])))
        return found

    def onset(self, drawn: Draws) -> Found:
        found: Found = {}
        for threshold in (0.0, 0.05):
            line = budget_curves._onset_line(self.along["asr"][0], drawn, "asr", threshold, "up")
            moved = self.curve(str(line["objective"]), "asr")[1:] - self.world.base.asr > threshold + 1e-9
            lasting = [b for n, b in enumerate(self.world.budgets) if moved[n:].all()]
            true, low, high = (
                float(lasting[0]) if lasting else np.inf,
                float(str(line["low"])),
                float(str(line["high"])),
            )
            name = f"onset at {100 * threshold:g} points"
            found[f"{name} held"] = np.nan if np.isnan(low) else float(low <= true <= high)
            found[f"{name}: tested too early"] = np.nan if np.isnan(low) else float(float(str(line["tested"])) < true)
            found[f"{name}: tested at all"] = (
                np.nan if np.isnan(low) else float(np.isfinite(float(str(line["tested"]))))
            )
        return found


def multinomial_seeds(count: int, size: int, rng: np.random.Generator) -> np.ndarray:
    return rng.multinomial(max(count - 1, 1), np.full(count, 1 / count), size=size).astype(np.float64)


def held(line: Mapping[str, object], truth: float) -> float:
    """1 if the interval holds the truth, NaN where it was withheld."""
    low, high = float(str(line["low"])), float(str(line["high"]))
    return float("nan") if np.isnan(low) else float(low - 1e-9 <= truth <= high + 1e-9)


def rejected(p: object) -> float:
    value = float(str(p))
    return float("nan") if np.isnan(value) else float(value <= 0.05)


def measure(
    world: World, studies: int, *, seed: int = 0, resamples: int = RESAMPLES, gee_studies: int = 0
) -> pd.DataFrame:
    """The share of studies (the mean, for what is no share), its standard error, and how many said anything at all."""
    rng, simulation = np.random.default_rng(seed), Simulation(world, resamples)
    found = pd.DataFrame([simulation.study(rng, gee=n < gee_studies) for n in range(studies)])
    return pd.DataFrame({"share": found.mean(), "se": found.sem(), "said": found.notna().sum()})


def main(studies: int = 400, gee_studies: int = 400, only: str = "") -> None:
    for name, world in WORLDS.items():
        if only and only != name:
            continue
        start = time.perf_counter()
        table = measure(world, studies, gee_studies=gee_studies)
        print(f"\n{name}: {studies} studies, {time.perf_counter() - start:.0f} s")
        print(table.round(4).to_string(), flush=True)


if __name__ == "__main__":
    main(*(int(n) for n in sys.argv[1:3]), *sys.argv[3:4])
