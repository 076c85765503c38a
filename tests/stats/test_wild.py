import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binom, norm

from leeway.stats.cluster_tests import wild_cluster

Floats = NDArray[np.float64]


def mid_p(k: int, n: int) -> float:
    return float(2 * (binom.cdf(k, n, 0.5) - binom.pmf(k, n, 0.5) / 2))


def test_single_binaries_are_mcnemars_mid_p_test():
    pulls = np.zeros((100, 2))
    pulls[:9, 0], pulls[9:11, 0] = 0.01, -0.01  # 9 up, 2 down
    pulls[:6, 1] = 0.01  # 6 up, 0 down: exact 2·2⁻⁶, mid-p half of it
    found = wild_cluster(pulls, np.full((100, 2), 0.01), resamples=40_000, seed=1)
    assert found.p[0] == pytest.approx(mid_p(2, 11), abs=0.004)
    assert found.p[1] == pytest.approx(1 / 2**6, abs=0.004)
    assert found.difference == pytest.approx([0.07, 0.06])


def test_interval_and_p_value_tell_the_same_story():
    rng = np.random.default_rng(5)
    pulls = (rng.normal(0.15, 1, size=(60, 200))) / 60
    found = wild_cluster(pulls, np.full((60, 200), 1 / 60), resamples=2_000, seed=0)
    outside = (found.low > 0) | (found.high < 0)
    assert (outside == (found.p <= 0.05)).all()
    assert 20 < outside.sum() < 100


def test_interval_of_a_mean_is_close_to_students():
    d = np.random.default_rng(2).normal(0.3, 1, size=80)
    found = wild_cluster(d[:, None] / 80, np.full((80, 1), 1 / 80), resamples=20_000, seed=0)
    half = 1.99 * d.std(ddof=1) / np.sqrt(80)
    assert (found.low[0], found.high[0]) == pytest.approx((d.mean() - half, d.mean() + half), abs=0.04 * half)


def test_nothing_moved_is_not_a_point():
    found = wild_cluster(np.zeros((100, 1)), np.full((100, 1), 0.01), resamples=10_000, seed=0)
    # Clopper–Pearson, 0 of 100: 1 − 0.025^(1/100) = 0.0362
    assert (found.low[0], found.high[0], found.p[0]) == (
        pytest.approx(-0.0362, abs=1e-3),
        pytest.approx(0.0362, abs=1e-3),
        1,
    )


def test_same_seed_same_numbers():
    pulls = np.random.default_rng(0).normal(size=(50, 3)) / 50
    one, two = (wild_cluster(pulls, np.full((50, 3), 0.02), resamples=1_000, seed=4) for _ in range(2))
    assert (one.low == two.low).all()
    assert (one.p == two.p).all()


def simulate(base: float, tuned: float, prompts: int, attacks: int, studies: int) -> tuple[Floats, Floats]:
    """Pulls with answers alike inside a prompt, for base and checkpoint together and for each by itself."""
    rng = np.random.default_rng(11)
    shape, alone = (prompts, 1, studies), (prompts, attacks, studies)
    shared = np.sqrt(0.4) * rng.normal(size=shape)
    latent = [shared + np.sqrt(0.3) * rng.normal(size=shape) + np.sqrt(0.3) * rng.normal(size=alone) for _ in "ab"]
    before, after = latent[0] < norm.ppf(base), latent[1] < norm.ppf(tuned)
    difference = after.astype(float) - before
    return difference.sum(axis=1) / (prompts * attacks), difference.reshape(-1, studies)


@pytest.mark.parametrize(("prompts", "attacks", "rate"), [(100, 5, 0.1), (30, 5, 0.1), (200, 1, 0.4)])
def test_false_alarms_under_the_null(prompts: int, attacks: int, rate: float):
    pulls, answers = simulate(rate, rate, prompts, attacks, studies=1_500)
    found = wild_cluster(pulls, np.full_like(pulls, 1 / prompts), resamples=1_000, seed=0)
    assert 0.033 < (found.p <= 0.05).mean() < 0.067  # ±3 standard errors of 1,500 studies round 5%
    if attacks > 1:  # taking answers for prompts rejects far too often: the test is able to fail
        naive = np.abs(answers.mean(axis=0)) > 1.96 * answers.std(axis=0) / np.sqrt(len(answers))
        assert naive.mean() > 0.12


def test_the_interval_covers_a_true_move():
    pulls, _ = simulate(0.1, 0.25, 100, 5, studies=800)
    found = wild_cluster(pulls, np.full_like(pulls, 0.01), resamples=1_000, seed=0)
    assert 0.925 < ((found.low <= 0.15) & (found.high >= 0.15)).mean() < 0.975


def test_four_moved_prompts_cannot_reject():
    assert mid_p(0, 4) > 0.05 > mid_p(0, 5)
    pulls = np.zeros((100, 1))
    pulls[:4] = 0.01
    found = wild_cluster(pulls, np.full((100, 1), 0.01), resamples=2_000, seed=0)
    assert found.p[0] > 0.05
    assert found.low[0] < 0 < found.high[0]
