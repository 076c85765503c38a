import numpy as np
import pytest
from statsmodels.stats.proportion import proportion_confint

from leeway.stats.intervals import bootstrap_mean, effective_n, estimate, wilson


def test_wilson_by_hand():
    # p = 0.5, n = 10, z² = 3.841459: centre 0.5; half = z·√(0.025 + 0.0096036) / 1.3841459 = 0.263415
    low, high = wilson(5, 10)
    assert low == pytest.approx(0.236593, abs=1e-6)
    assert high == pytest.approx(0.763407, abs=1e-6)
    # 0 of 10: the upper end is z² / (n + z²)
    assert wilson(0, 10) == (0.0, pytest.approx(3.841459 / 13.841459, abs=1e-6))


@pytest.mark.parametrize(("k", "n"), [(0, 5), (1, 5), (7, 200), (100, 100), (313, 1319)])
def test_wilson_agrees_with_statsmodels(k: int, n: int):
    assert wilson(k, n) == pytest.approx(proportion_confint(k, n, method="wilson"), abs=1e-9)


def test_one_answer_per_prompt_is_plain_wilson():
    values = np.array([1.0] * 30 + [0.0] * 70)
    found = estimate(values, np.zeros(100, int), np.arange(100))
    assert (found.low, found.high) == pytest.approx(wilson(30, 100), abs=1e-9)
    assert found.method == "wilson"


def test_five_equal_answers_on_a_prompt_count_once():
    values = np.repeat(np.array([1.0] * 30 + [0.0] * 70), 5)
    clusters, attacks = np.repeat(np.arange(100), 5), np.tile(np.arange(5), 100)
    assert effective_n(values, attacks, clusters) == pytest.approx(99)  # C − 1: the C/(C−1) correction
    found = estimate(values, attacks, clusters)
    assert found.high - found.low > 1.9 * np.diff(wilson(150, 500))[0]
    assert found.method == "wilson, clustered"


def test_nothing_harmful_still_has_an_upper_end():
    found = estimate(np.zeros(500), np.tile(np.arange(5), 100), np.repeat(np.arange(100), 5))
    assert (found.mean, found.low) == (0, 0)
    assert found.high == pytest.approx(wilson(0, 100)[1])


def test_strata_weigh_the_same_whatever_their_size():
    values = np.array([1.0, 1, 1, 0])
    assert estimate(values, np.array([0, 0, 0, 1]), np.array([0, 1, 2, 3])).mean == 0.5


def test_bootstrap_of_a_mean_matches_its_normal_approximation():
    rng = np.random.default_rng(3)
    values = rng.beta(2, 8, size=400)
    low, high = bootstrap_mean(values, np.zeros(400, int), np.arange(400))
    error = values.std(ddof=1) / 20
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.15 * error)
