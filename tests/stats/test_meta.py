"""The random-effects mean: worked by hand, held to statsmodels, and its laws."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t
from statsmodels.stats.meta_analysis import combine_effects

from leeway.stats.meta import combine
from leeway.stats.metrics import StatsError

Y = np.array([0.10, 0.30, 0.35, 0.65, 0.45])
V = np.array([0.03, 0.03, 0.05, 0.01, 0.05])


def test_two_equal_errors_by_hand():
    # weights are equal, so the mean is 0.2; Q = 2 · 0.1² / 0.005 = 4; τ² solves 0.02 / (0.005 + τ²) = 1: 0.015
    found = combine(np.array([0.1, 0.3]), np.diag([0.005, 0.005]))
    assert found.estimate == pytest.approx(0.2)
    assert found.q == pytest.approx(4)
    assert found.i2 == pytest.approx(0.75)
    assert found.tau2 == pytest.approx(0.015)
    assert found.tau2_dl == pytest.approx((4 - 1) / (400 - 200))  # (Q − 1) / (Σw − Σw²/Σw)
    assert found.se == pytest.approx(math.sqrt(0.02 / 2))
    assert found.high == pytest.approx(0.2 + 12.7062047 * 0.1)  # t with one degree of freedom
    assert math.isnan(found.predict_low)


def test_statsmodels_agrees_where_errors_are_independent():
    found = combine(Y, np.diag(V))
    pm, dl = (combine_effects(Y, V, method_re=m, use_t=True) for m in ("pm", "dl"))
    assert found.tau2 == pytest.approx(pm.tau2, abs=1e-8)
    assert found.estimate == pytest.approx(pm.mean_effect_re, abs=1e-8)
    assert found.se == pytest.approx(pm.sd_eff_w_re_hksj, abs=1e-8)
    assert found.q == pytest.approx(pm.q)
    assert found.i2 == pytest.approx(pm.i2)
    assert found.tau2_dl == pytest.approx(dl.tau2)
    assert found.estimate_dl == pytest.approx(dl.mean_effect_re)
    assert found.predict_high - found.estimate == pytest.approx(t.ppf(0.975, 3) * math.hypot(pm.tau2**0.5, found.se))


def test_a_small_q_narrows_nothing():
    found = combine(np.array([0.2, 0.2, 0.2]), np.diag([0.01, 0.01, 0.01]))
    assert found.tau2 == found.i2 == 0
    assert found.se == pytest.approx(0.1 / math.sqrt(3))


def test_a_study_and_its_copy_teach_no_more_than_one():
    found = combine(np.array([0.2, 0.2]), np.full((2, 2), 0.01))
    assert found.estimate == pytest.approx(0.2)
    assert found.se == pytest.approx(0.1)
    assert found.correlation == pytest.approx(1)
    assert found.tau2 == 0


def test_correlated_errors_widen_the_mean():
    apart = combine(np.array([0.2, 0.3, 0.25]), np.diag([0.01] * 3))
    together = combine(np.array([0.2, 0.3, 0.25]), 0.01 * (0.5 * np.eye(3) + 0.5))
    assert together.estimate == pytest.approx(apart.estimate)
    assert together.se == pytest.approx(math.sqrt(0.01 * (1 + 2 * 0.5) / 3))
    assert together.se > apart.se


@given(
    st.lists(st.tuples(st.floats(-1, 1), st.floats(0.001, 0.5)), min_size=2, max_size=7),
    st.floats(-0.5, 0.5),
    st.permutations(range(7)),
)
def test_laws(studies: list[tuple[float, float]], shift: float, order: list[int]):
    y, se = (np.array(column) for column in zip(*studies, strict=True))
    one = combine(y, np.diag(se**2))
    assert y.min() - 1e-9 <= one.estimate <= y.max() + 1e-9
    assert 0 <= one.i2 <= 1
    moved = combine(y + shift, np.diag(se**2))
    assert moved.estimate == pytest.approx(one.estimate + shift, abs=1e-6)
    assert moved.tau2 == pytest.approx(one.tau2, abs=1e-8)
    mixed = [k for k in order if k < len(y)]
    again = combine(y[mixed], np.diag(se[mixed] ** 2))
    assert (again.estimate, again.se) == pytest.approx((one.estimate, one.se), abs=1e-6)


def test_the_interval_covers_where_studies_differ():
    rng = np.random.default_rng(5)
    covered = 0
    for _ in range(600):
        se = rng.uniform(0.02, 0.08, size=5)
        y = 0.1 + 0.05 * rng.normal(size=5) + se * rng.normal(size=5)
        found = combine(y, np.diag(se**2))
        covered += found.low <= 0.1 <= found.high
    assert 0.93 <= covered / 600 <= 0.99


def test_what_has_no_answer():
    with pytest.raises(StatsError, match="two or more studies"):
        combine(np.array([0.1]), np.array([[0.1]]))
    with pytest.raises(StatsError, match="positive standard error"):
        combine(np.array([0.1, 0.2]), np.diag([0.0, 0.1]))
    with pytest.raises(StatsError, match="positive standard error"):
        combine(np.array([0.1, math.nan]), np.diag([0.1, 0.1]))
