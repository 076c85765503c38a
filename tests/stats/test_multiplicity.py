import numpy as np
import pandas as pd
import pytest
from statsmodels.stats.multitest import multipletests

from leeway.stats.contrasts import holm, holm_by_family


def test_holm_by_hand():
    # sorted 0.005 0.01 0.03 0.04 times 4 3 2 1 = 0.02 0.03 0.06 0.04, made non-decreasing
    assert holm(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_agrees_with_statsmodels():
    p = np.random.default_rng(0).random(48) ** 3
    assert holm(p) == pytest.approx(multipletests(p, method="holm")[1])
    assert holm(np.array([0.7, 0.9])).max() <= 1


def test_families_apart_and_missing_tests_not_counted():
    table = pd.DataFrame({"family": ["a", "a", "b", "a"], "p": [0.01, 0.02, 0.03, float("nan")]})
    found = holm_by_family(table)
    assert list(found["family_size"]) == [2, 2, 1, 2]
    assert list(found["p_holm"][:3]) == pytest.approx([0.02, 0.02, 0.03])
    assert np.isnan(found["p_holm"][3])
