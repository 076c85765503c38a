"""Differential error of judges: false alarms of a whole table of pairs, and its power where one arm is misjudged.

Harmful or not is drawn as in `world`: correlated over prompts, attacks and checkpoints. A judge calls a harmful answer
harmful with its sensitivity and another one not with its specificity; its errors are correlated within a prompt over
all checkpoints (a share of ERROR_ALIKE of their latent variance), as a judge that is blind to a topic is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import norm

from benchmarks.statistics import world
from benchmarks.statistics.finding import Finding
from leeway.stats.cluster_tests import wild_cluster_p
from leeway.stats.contrasts import holm
from leeway.stats.metrics import split_judges

Floats = NDArray[np.float64]
ERROR_ALIKE = 0.4
RESAMPLES = 3_999
BLOCK = 20  # studies in memory at once


@dataclass(frozen=True)
class Setting:
    """A base and `arms` checkpoints, two judges; `blind` is b's sensitivity at the last arm, if it is another one."""

    prompts: int = 100
    arms: int = 24
    base: float = 0.2
    rate: float = 0.2
    a: tuple[float, float] = (0.95, 0.97)  # sensitivity, specificity
    b: tuple[float, float] = (0.8, 0.9)
    blind: float | None = None

    def __str__(self) -> str:
        text = f"{self.prompts} prompts × 5 attacks, {self.arms} checkpoints, harmful {self.base:g} → {self.rate:g}, "
        text += f"judges (sensitivity, specificity) {self.a} and {self.b}"
        return text + (f", {self.blind:g} at one checkpoint" if self.blind is not None else "")

    @property
    def differential(self) -> float:
        """The largest true D."""
        found = []
        for sensitivity in (self.b[0], *([] if self.blind is None else [self.blind])):
            net = [r * (self.a[0] - b) + (1 - r) * (self.b[1] - self.a[1]) for r, b in self._rates(sensitivity)]
            found.append(net[1] - net[0])
        return max(found, key=abs)

    def _rates(self, sensitivity: float) -> list[tuple[float, float]]:
        return [(self.base, self.b[0]), (self.rate, sensitivity)]

    @property
    def world(self) -> world.World:
        tuned = {f"arm{k:02}": (world.Rates(asr=self.rate),) for k in range(self.arms)}
        return world.World(world.Rates(asr=self.base), tuned, prompts=self.prompts, axes=("jailbreak",))


def _labels(setting: Setting, studies: int, rng: np.random.Generator) -> Floats:
    """Return both judges' labels: (judge, checkpoint, prompt, attack, study)."""
    harm_KCAS = world.scores(setting.world, "jailbreak", rng, studies)[:, :, :, 0] > 0
    found = []
    for judge, (sensitivity, specificity) in enumerate((setting.a, setting.b)):
        alike = np.sqrt(ERROR_ALIKE) * rng.normal(size=(1, harm_KCAS.shape[1], 1, studies))
        latent = alike + np.sqrt(1 - ERROR_ALIKE) * rng.normal(size=harm_KCAS.shape)
        detects = np.full((len(harm_KCAS), 1, 1, 1), sensitivity)
        if judge and setting.blind is not None:
            detects[-1] = setting.blind
        cut = np.where(harm_KCAS, norm.ppf(detects), norm.ppf(1 - specificity))
        found.append((latent < cut).astype(np.float64))
    return np.stack(found)


def signed(setting: Setting, studies: int, seed: int) -> Floats:
    """Return each prompt's part of D, (study, prompt, arm)."""
    y = _labels(setting, studies, np.random.default_rng([9, seed]))
    d_KCS = (y[0] - y[1]).mean(axis=2) / setting.prompts
    return np.asarray((d_KCS[1:] - d_KCS[:1]).transpose(2, 1, 0))


def rows(setting: Setting, seed: int) -> pd.DataFrame:
    """Return the first study of `signed` as rows of two judges."""
    y = _labels(setting, 1, np.random.default_rng([9, seed]))[..., 0]
    table = world.rows(setting.world, np.random.default_rng(0))
    order = []
    for judge, name in enumerate(("first", "second")):
        own = table.assign(judge=name, score=y[judge].ravel())
        order.append(own.assign(outcome=np.where(own["score"] > 0, "harmful", "refused")))
    return split_judges(pd.concat(order, ignore_index=True), {"jailbreak": "first"})


def alarms(setting: Setting, studies: int, seed: int) -> float:
    """Return the share of studies with differential error shown: at any checkpoint, or at the blind one if there is."""
    shown = []
    for start in range(0, studies, BLOCK):
        size = min(BLOCK, studies - start)
        for sums_CM in signed(setting, size, seed=1000 * seed + start):
            p = holm(wild_cluster_p(sums_CM, resamples=RESAMPLES, seed=start))
            shown.append((p if setting.blind is None else p[-1:]).min() < 0.05)
    return float(np.mean(shown))


NULLS = [Setting(), Setting(prompts=40), Setting(arms=6, base=0.05, rate=0.05), Setting(b=(0.95, 0.97), rate=0.5)]
PLANTED = Setting(base=0.1, rate=0.4, b=(0.95, 0.97), blind=0.65)
WEAKER = Setting(base=0.1, rate=0.4, b=(0.95, 0.97), blind=0.8)
PREVALENCE = Setting(base=0.1, rate=0.4, b=(0.8, 0.97))


def differential(studies: int) -> Iterator[Finding]:
    about = "`judge_pairs`: any warning (Holm, 5%) where both judges have constant error rates, at base and checkpoints"
    for n, setting in enumerate(NULLS):
        yield Finding(about, str(setting), alarms(setting, studies, n), studies, (0.0, 0.065))
    about = "`judge_pairs`: warning at the one checkpoint that judge b misses"
    for n, (setting, band) in enumerate([(PLANTED, (0.8, 1.0)), (WEAKER, (0.0, 1.0))]):
        points = f"D = {100 * setting.differential:.1f} points"
        yield Finding(about, str(setting), alarms(setting, studies, 10 + n), studies, band, points)
    about = "`judge_pairs`: any warning where error rates are constant and harm is not"
    points = f"D = {100 * PREVALENCE.differential:.1f} points: the contrasts differ, the error rates do not"
    yield Finding(about, str(PREVALENCE), alarms(PREVALENCE, studies, 20), studies, (0.0, 1.0), points)
