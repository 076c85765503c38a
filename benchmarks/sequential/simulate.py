"""Checkpoints asked in looks until decided, by the code that a study runs, on moves whose true mean is known."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.statistics.studies import Setting, differences
from leeway.stats.anytime import Anytime, log_capital
from leeway.stats.cluster_tests import wild_cluster
from leeway.stats.contrasts import holm
from leeway.stats.sequential import LEVEL, MARGIN, looks

Floats = NDArray[np.float64]
RESAMPLES = 999


@dataclass(frozen=True)
class Ended:
    """One checkpoint when it was no longer asked."""

    said: str  # different, equivalent, or nothing
    asked: int
    of: Anytime


def moves(setting: Setting, studies: int, seed: int) -> Iterator[Floats]:
    """Checkpoint − base of every study's prompts in order, (prompts, objectives)."""
    for difference_KCASR in differences(setting, studies, seed):
        moved_KCR = difference_KCASR.mean(axis=(2, 3))
        yield from moved_KCR.transpose(2, 1, 0)


def until_decided(moves_C: Floats, level: float, margin: float = MARGIN) -> Ended:
    """One checkpoint asked as a study asks it; all its looks are read off one pass over its prompts."""
    up_C, down_C = (1 + moves_C) / 2, (1 - moves_C) / 2
    moved_C = np.maximum(log_capital(up_C, 0.5), log_capital(down_C, 0.5))
    same_C = np.minimum(log_capital(up_C, (1 - margin) / 2), log_capital(down_C, (1 - margin) / 2))
    needed = np.log(2 / level)
    for size in looks(len(moves_C)):
        said = "different" if moved_C[size - 1] >= needed else "equivalent" if same_C[size - 1] >= needed else ""
        if said:
            break
    return Ended(said, size, Anytime(moves_C[:size]))


def wrong(said: str, difference: float, margin: float = MARGIN) -> bool:
    """Whether what was said is false of the true difference; on the margin is not within it."""
    return (said == "different" and difference == 0) or (said == "equivalent" and abs(difference) >= margin - 1e-12)


@dataclass(frozen=True)
class Outcome:
    """Shares of studies in one setting, of the checkpoints that share the level."""

    different: float
    equivalent: float
    wrong: float  # any wrong decision in the family
    asked: float  # mean share of the prompts
    fixed: float  # different by the fixed test on all prompts, at the same level
    missed: float  # the 95% interval where it stopped does not hold the truth
    significant: float  # any of the family by Holm's p of the confidence sequence
    naive: float  # different by the fixed test at 5%, read at every look


def outcome(setting: Setting, studies: int, seed: int, *, family: int = 6) -> Outcome:
    """`setting.objectives` checkpoints of a family of `family`, whose level is shared out over all of them."""
    ended, fixed, naive, any_wrong, any_holm = [], [], [], [], []
    for moves_CK in moves(setting, studies, seed):
        own = [until_decided(column, LEVEL / family) for column in moves_CK.T]
        ended += own
        any_wrong.append(any(wrong(e.said, setting.difference) for e in own))
        any_holm.append(bool((holm(np.array([e.of.p for e in own])) <= LEVEL).any()))
        fixed += list(_p(moves_CK) <= LEVEL / family)
        if not setting.difference:
            naive.append(any(_p(moves_CK[:n, :1])[0] <= LEVEL for n in looks(len(moves_CK))))
    half, true = LEVEL / 2, setting.difference  # the interval holds the truth where neither side rejects it
    missed = [min(e.of.p_above(true), e.of.p_below(true)) < half for e in ended]
    return Outcome(
        different=_share([e.said == "different" for e in ended]),
        equivalent=_share([e.said == "equivalent" for e in ended]),
        wrong=_share(any_wrong),
        asked=float(np.mean([e.asked for e in ended])) / setting.prompts,
        fixed=_share(fixed),
        missed=_share(missed),
        significant=_share(any_holm),
        naive=_share(naive) if naive else float("nan"),
    )


def _p(moves_CK: Floats) -> Floats:
    clusters = len(moves_CK)
    weights_CK = np.full(moves_CK.shape, 1 / clusters)
    return wild_cluster(moves_CK / clusters, weights_CK, resamples=RESAMPLES, seed=0).p


def _share(of: list[bool]) -> float:
    return float(np.mean(of))
