"""Tests of a difference of 0, their intervals, and the families they are corrected in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from scipy.stats import t

from benchmarks.statistics.finding import COVER, SIZE, Finding
from benchmarks.statistics.studies import Setting, pairs, pulls
from leeway.stats.cluster_tests import wild_cluster
from leeway.stats.contrasts import holm, mcnemar, standard_error
from leeway.stats.pairing import Pairs

LEVEL = 0.05
RESAMPLES = 1_999
FEW = "few prompts move: the outcomes are discrete, and the test has to be conservative"
NULLS = [
    Setting(100, 0.1, 0.1),
    Setting(100, 0.03, 0.03),
    Setting(30, 0.1, 0.1),
    Setting(100, 0.3, 0.3, samples=3, attacks=1),
    Setting(100, 0.05, 0.05, attacks=1),
    Setting(200, 0.4, 0.4, "capability"),
    Setting(700, 0.1, 0.1, "capability"),
    Setting(120, 0.2, 0.2, "persona"),
]
SMALL = [Setting(15, 0.1, 0.1), Setting(100, 0.01, 0.01, attacks=1)]
MOVED = [
    Setting(100, 0.1, 0.25),
    Setting(100, 0.02, 0.06),
    Setting(30, 0.1, 0.3),
    Setting(200, 0.4, 0.6, "capability"),
    Setting(300, 0.02, 0.05, "capability"),
    Setting(120, 0.2, 0.3, "persona"),
]


def signs(studies: int) -> Iterator[Finding]:
    """Share of true nulls rejected by `p`, and of 95% intervals that cover a true difference."""
    about = "`contrasts`: wild signs with mid-p, rejected at 5% where nothing differs"
    for n, setting in enumerate(NULLS + SMALL):
        found = _tested(setting, studies, seed=n)
        few = FEW if setting in SMALL else ""
        yield Finding(about, str(setting), found[0], studies, (0.0, SIZE[1]) if few else SIZE, few)
    about = "`contrasts`: 95% interval `low` to `high` covers the true difference"
    for n, setting in enumerate(MOVED + SMALL):
        few = FEW if setting in SMALL else ""
        covered = _tested(setting, studies, seed=100 + n)[1]
        yield Finding(about, str(setting), covered, studies, (COVER[0], 1.0) if few else COVER, few)


def _tested(setting: Setting, studies: int, seed: int) -> tuple[float, float]:
    rejected, covered = [], []
    for block in pulls(setting, studies, seed):
        weights = np.full_like(block, 1 / setting.prompts)
        found = wild_cluster(block, weights, resamples=RESAMPLES, seed=seed)
        rejected.append(found.p <= LEVEL)
        covered.append((found.low <= setting.difference) & (found.high >= setting.difference))
    return float(np.concatenate(rejected).mean()), float(np.concatenate(covered).mean())


def errors(studies: int) -> Iterator[Finding]:
    """The clustered standard error, by the t it gives; and the naive one, which shows what clustering is for."""
    about = "`se`: |difference| > t · se where nothing differs"
    for n, setting in enumerate(NULLS):
        share = np.mean([_beyond(p, standard_error(p)) for p in pairs(setting, studies, 200 + n)])
        yield Finding(about, str(setting), float(share), studies, SIZE)
    about = "What clustering is for: the same, answers taken for prompts"
    for n, setting in enumerate(NULLS[:2] + NULLS[3:4]):
        naive = [replace(p, clusters=np.arange(len(p.value))) for p in pairs(setting, studies, 200 + n)]
        share = np.mean([_beyond(p, standard_error(p)) for p in naive])
        yield Finding(about, str(setting), float(share), studies, (0.065, 1.0), "far too often")


def _beyond(p: Pairs, se: float) -> bool:
    count = len(np.unique(p.clusters))
    return bool(abs((p.value - p.base).mean()) > t.ppf(1 - LEVEL / 2, count - 1) * se)


def exact(studies: int) -> Iterator[Finding]:
    """McNemar's exact test stays below 5%, and how far below is shown."""
    about = "`p_mcnemar`: exact, rejected at 5% where nothing differs (conservative by construction)"
    for n, setting in enumerate(
        s for s in [*NULLS, *SMALL] if (s.attacks == 1 and s.samples == 1) or s.axis == "capability"
    ):
        share = np.mean([mcnemar(p) <= LEVEL for p in pairs(setting, studies, 300 + n)])
        yield Finding(about, str(setting), float(share), studies, (0.0, LEVEL), "")


def families(studies: int) -> Iterator[Finding]:
    """Six objectives against one base, nothing having moved: any rejected after Holm, and before."""
    for setting in (Setting(100, 0.1, 0.1, objectives=6), Setting(200, 0.4, 0.4, "capability", objectives=6)):
        found = []
        for block in pulls(setting, studies, 400):
            weights = np.full_like(block, 1 / setting.prompts)
            found.append(wild_cluster(block, weights, resamples=RESAMPLES, seed=0).p.reshape(-1, setting.objectives))
        p = np.concatenate(found)
        any_raw = float((p <= LEVEL).any(axis=1).mean())
        share = float(np.mean([(holm(line) <= LEVEL).any() for line in p]))
        about = "`p_holm`: any of six objectives called moved where none did (family-wise error)"
        yield Finding(about, str(setting), share, studies, (0.0, SIZE[1]), f"without Holm {100 * any_raw:.1f}%")
