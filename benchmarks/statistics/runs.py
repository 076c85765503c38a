"""Intervals over training runs, rates, and what a design could have detected."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from benchmarks.statistics.difference import LEVEL, RESAMPLES
from benchmarks.statistics.finding import COVER, SIZE, Finding
from benchmarks.statistics.studies import Setting, pairs, pulls
from benchmarks.statistics.world import Alike, scores
from leeway.stats.cluster_tests import wild_cluster
from leeway.stats.contrasts import minimal_detectable_effect, seed_interval, standard_error
from leeway.stats.intervals import estimate

LARGE = "runs differ more than prompts do"
SPREAD = {0.0: "runs alike", 0.005: "runs differ a little", 0.02: "runs differ as prompts do", 0.1: LARGE}


def over_training_runs(studies: int) -> Iterator[Finding]:
    """Does `seed_ci_low` to `seed_ci_high` exclude a true difference of new runs on new prompts?"""
    for seeds in (2, 3, 5):
        about = f"`seed_ci_low` to `seed_ci_high`, {seeds} seeds: the true difference excluded at 5%"
        for n, (run, called) in enumerate(SPREAD.items()):
            for shape in (Setting(200, 0.4, 0.4, "capability"), Setting(100, 0.1, 0.1)):
                setting = replace(shape, seeds=seeds, alike=Alike(run=run))
                missed, without = _missed(setting, studies, 700 + 10 * seeds + n)
                note = f"by prompts alone {100 * without:.1f}%"
                careful = seeds == 2 or run == 0.0
                note = f"conservative; {note}" if careful else note
                band = (0.0, SIZE[1]) if careful else SIZE
                yield Finding(about, f"{setting}, {called}", missed, studies, band, note)


def _missed(setting: Setting, studies: int, seed: int) -> tuple[float, float]:
    both, alone = [], []
    for p in pairs(setting, studies, seed):
        difference, se = float((p.value - p.base).mean()), standard_error(p)
        low, high = seed_interval(difference, se, p)
        both.append(not low <= setting.difference <= high)
        alone.append(abs(difference - setting.difference) > 1.98 * se)
    return float(np.mean(both)), float(np.mean(alone))


def rates(studies: int) -> Iterator[Finding]:
    """Intervals of a single rate."""
    about = "`rates`: 95% interval covers the true rate"
    settings = [Setting(100, 0.1, 0.1), Setting(100, 0.02, 0.02), Setting(200, 0.4, 0.4, "capability")]
    settings += [Setting(700, 0.9, 0.9, "capability"), Setting(120, 0.2, 0.2, "persona")]
    for n, setting in enumerate(settings):
        rng = np.random.default_rng(800 + n)
        many = min(studies, 500) if setting.axis == "persona" else studies  # each of them a bootstrap of 10,000
        drawn_CASR = scores(setting.world, setting.axis, rng, many)[0]
        prompts, attacks, _ = (g.ravel().astype(np.intp) for g in np.indices(drawn_CASR.shape[:3]))
        found = [estimate(drawn_CASR[..., r].ravel(), attacks, prompts) for r in range(many)]
        share = float(np.mean([f.low <= setting.base <= f.high for f in found]))
        yield Finding(about, str(setting), share, many, COVER)


def power(studies: int) -> Iterator[Finding]:
    """Power of `p` at 5% where the true difference is the MDE that such studies print on average."""
    about = "`mde`: power at the difference that it names"
    for n, setting in enumerate(
        [Setting(100, 0.1, 0.1), Setting(200, 0.4, 0.4, "capability"), Setting(120, 0.2, 0.2, "persona")]
    ):
        at = setting
        for _ in range(4):  # the error of a study depends on its difference: a few steps to the fixed point
            at = replace(at, tuned=at.base + _mean_mde(at, min(studies, 300), 900 + n))
        rejected = []
        for block in pulls(at, studies, 950 + n):
            found = wild_cluster(block, np.full_like(block, 1 / at.prompts), resamples=RESAMPLES, seed=0)
            rejected.append(found.p <= LEVEL)
        name = f"{replace(at, tuned=round(at.tuned, 3))}"
        yield Finding(about, name, float(np.concatenate(rejected).mean()), studies, (0.75, 0.85))


def _mean_mde(setting: Setting, studies: int, seed: int) -> float:
    found = []
    for p in pairs(setting, studies, seed):
        moved = int((np.bincount(p.clusters, weights=np.abs(p.value - p.base)) > 0).sum())
        found.append(minimal_detectable_effect(standard_error(p), setting.prompts, moved))
    return float(np.mean(found))
