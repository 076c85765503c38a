"""Tests at a margin: equivalence and non-inferiority where the truth lies on the margin, their bounds, their power."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from benchmarks.statistics.difference import FEW, LEVEL, RESAMPLES
from benchmarks.statistics.finding import COVER_90, SIZE, Finding
from benchmarks.statistics.studies import Setting, pulls
from benchmarks.statistics.world import Alike
from leeway.stats.cluster_tests import BoundDraws, bound_draws

AT_MARGIN = [
    Setting(300, 0.1, 0.15),
    Setting(300, 0.15, 0.1),
    Setting(200, 0.4, 0.5, "capability"),
    Setting(1000, 0.4, 0.37, "capability"),
    Setting(500, 0.02, 0.05, "capability"),
    Setting(400, 0.2, 0.25, "persona"),
]
CAREFUL = {
    Setting(100, 0.02, 0.06): FEW,
    Setting(100, 0.001, 0.05, attacks=1): FEW,
    Setting(300, 0.005, 0.02, attacks=1): FEW,
    Setting(50, 0.02, 0.06, attacks=1): FEW,
    Setting(120, 0.2, 0.25, "persona"): "the worst possible move weighs more where moves are small",
}
COVERED = 3
STILL = Alike(
    prompt=0.998, attack=0.0, trained=0.001
)  # the checkpoint answers as the base does, but for the few that moved


def at_margin(studies: int) -> Iterator[Finding]:
    """`one_sided` and `equivalence` with the true difference on the margin: rejected is wrong."""
    shares = {s: _shares(s, studies, 500 + n) for n, s in enumerate([*AT_MARGIN, *CAREFUL])}
    for k, about in enumerate(
        (
            "`one_sided`: called better than the bound where the truth lies on it",
            "`one_sided`, `p_worse`: called worse than the bound where the truth lies on it",
            "`equivalence` (TOST): called equivalent where the truth lies on the margin",
            "`equivalence`: `low90` to `high90` covers the true difference",
        )
    ):
        for setting, of_setting in shares.items():
            band = (COVER_90[0], 1.0) if k == COVERED else (0.0, SIZE[1])
            yield Finding(about, str(setting), of_setting[k], studies, band, CAREFUL.get(setting, ""))


def earned(studies: int) -> Iterator[Finding]:
    """How often no drift is earned at a margin of five points where there is none."""
    about = "`equivalence`: power, called equivalent within ±5 points where nothing differs"
    settings = [Setting(n, 0.1, 0.1) for n in (50, 100, 300)]
    settings += [Setting(n, 0.05, 0.05, attacks=1, alike=STILL) for n in (3, 30, 100, 300)]
    for n, setting in enumerate(settings):
        rejected = [_equivalent(b, 0.05) for b in _drawn(setting, studies, 600 + n)]
        name = f"{setting}{', hardly anything moves' if setting.alike is STILL else ''}"
        yield Finding(about, name, float(np.concatenate(rejected).mean()), studies, (0.0, 1.0))


def _shares(setting: Setting, studies: int, seed: int) -> tuple[float, ...]:
    """Called better, called worse, called equivalent, covered by the 90% interval."""
    found = []
    d = setting.difference
    for drawn in _drawn(setting, studies, seed):
        at = np.full(drawn.lower_RM.shape[1], d)
        better, worse = drawn.p_below(at) <= LEVEL, drawn.p_above(at) <= LEVEL
        covered = (drawn.low() <= d) & (drawn.high() >= d)
        found.append([better, worse] if d > 0 else [worse, better])
        found[-1] += [_equivalent(drawn, abs(d)), covered]
    return tuple(float(np.concatenate(block).mean()) for block in zip(*found, strict=True))


def _drawn(setting: Setting, studies: int, seed: int) -> Iterator[BoundDraws]:
    for block in pulls(setting, studies, seed):
        yield bound_draws(block, np.full_like(block, 1 / setting.prompts), resamples=RESAMPLES, seed=seed)


def _equivalent(drawn: BoundDraws, margin: float) -> NDArray[np.bool_]:
    at = np.full(drawn.lower_RM.shape[1], margin)
    return np.asarray(np.maximum(drawn.p_below(at), drawn.p_above(-at)) <= LEVEL)
