"""A small version of `benchmarks/statistics/trajectories.py`: what is said of trajectories, against a known truth."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.statistics.trajectories import ALIKE, APART, SPARE, Simulation, measure
from benchmarks.statistics.world import CONDITIONS, rows, scores
from leeway import stats
from leeway.stats.interaction import slope_weights

pytestmark = pytest.mark.slow

STUDIES = 100  # the standard error of 5%, and of 95%, is 2.2 points: bounds are three of them away


@pytest.fixture(scope="module")
def alike():
    return measure(replace(ALIKE, axes=SPARE), STUDIES, resamples=400, gee_studies=40)["share"]


@pytest.fixture(scope="module")
def apart():
    return measure(APART, STUDIES, resamples=400)["share"]


def test_false_alarms_of_the_interaction_and_of_pairs(alike):
    for name in ("asr: bootstrap, equal slopes rejected (null)", "asr: pair rejected (null)"):
        assert alike[name] <= 0.115
    assert alike["asr: GEE, equal slopes rejected (null)"] <= 0.15  # 40 studies


def test_a_true_divergence_is_found(apart):
    assert apart["asr: bootstrap, equal slopes rejected (power)"] > 0.7


@pytest.mark.parametrize(
    "name", ["asr: slope held", "coupling held", "matched at largest held", "onset at 0 points held"]
)
def test_intervals_hold_the_truth(alike, apart, name: str):
    assert alike[name] >= 0.885
    assert apart[name] >= 0.885


def test_onset_is_not_called_too_early(alike, apart):
    for threshold in (0, 5):
        assert alike[f"onset at {threshold} points: tested too early"] <= 0.08
        assert apart[f"onset at {threshold} points: tested too early"] <= 0.08
    assert apart["onset at 0 points: tested at all"] > 0.8


def test_forgetting_that_prompts_are_shared_gives_another_size():
    """A pair of slopes with every answer as independent: far from 5% (too careful, as pairing is lost)."""
    rng = np.random.default_rng(5)
    a = slope_weights(np.log2(np.array(ALIKE.budgets, dtype=float)))
    wrong = 0
    for _ in range(200):
        score = scores(ALIKE, "jailbreak", rng)[..., 0]
        one, other = score[1 : 1 + len(a)], score[1 + len(a) : 1 + 2 * len(a)]
        variance = sum(w**2 * (o.var() + p.var()) / o.size for w, o, p in zip(a, one, other, strict=True))
        wrong += abs(np.tensordot(a, one - other, 1).mean()) > 1.96 * np.sqrt(variance)
    assert wrong / 200 < 0.025


def test_the_benchmark_draws_what_the_package_draws():
    """Points of `Simulation.drawn` and of `stats.draws` on the same scores as a table."""
    simulation = Simulation(APART, 50)
    table = rows(APART, np.random.default_rng(3))
    rng = np.random.default_rng(3)
    of_axes = {"accuracy": scores(APART, "capability", rng)[..., 0], "asr": scores(APART, "jailbreak", rng)[..., 0]}
    quick = simulation.drawn(of_axes, np.random.default_rng(0))
    full = stats.draws(table, CONDITIONS, ("accuracy", "asr"), resamples=50)
    assert quick.point_K == pytest.approx(full.point_K)
    assert quick.drawn_RK.std(axis=0) == pytest.approx(full.drawn_RK.std(axis=0), rel=0.5)
    assert (quick.drawn_RK.mean(axis=0) - full.point_K).max() < 0.03
