"""The world the simulations are made in keeps its word: rates, likeness, runs."""

import numpy as np
import pytest

from benchmarks.statistics.world import Alike, Rates, World, rows, scores, truth
from leeway import stats

WORLD = World(Rates(0.4, 0.1, 0.2), {"sft": (Rates(0.5, 0.1, 0.2), Rates(0.6, 0.3, 0.4))}, (1000, 2000))


@pytest.mark.parametrize(("axis", "rate"), [("capability", 0.6), ("jailbreak", 0.3), ("persona", 0.4)])
def test_the_mean_is_the_true_rate(axis: str, rate: float):
    found = scores(WORLD, axis, np.random.default_rng(0), studies=200)
    assert found[0].mean() == pytest.approx({"capability": 0.4, "jailbreak": 0.1, "persona": 0.2}[axis], abs=0.01)
    assert found[2].mean() == pytest.approx(rate, abs=0.01)


def test_runs_move_together_only_where_told_to():
    still, moving = (
        scores(World(alike=Alike(run=r)), "capability", np.random.default_rng(1), studies=400) for r in (0.0, 0.05)
    )
    # Var of the mean of 200 items: φ(Φ⁻¹(0.4))²·0.05 = 0.0075 from the run alone, against about 0.002 without
    assert moving[1].mean(axis=(0, 1, 2)).var() > 2.5 * still[1].mean(axis=(0, 1, 2)).var()
    assert moving[0].mean(axis=(0, 1, 2)).var() < 1.4 * still[0].mean(axis=(0, 1, 2)).var()


def test_rows_are_a_table_that_the_estimates_read():
    table = stats.contrasts(rows(WORLD, np.random.default_rng(0)), {"t": "plain"}, resamples=200)
    primary = table[table["primary"]].merge(truth(WORLD), on=["objective", "budget", "measure"], suffixes=("", "_true"))
    assert len(primary) == 6
    assert (primary["difference"] - primary["difference_true"]).abs().max() < 0.15
