"""A small share of benchmarks/statistics: known truth, fixed seeds, bounds three binomial errors beyond the bands."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.statistics import difference, margins, runs
from benchmarks.statistics.finding import SIZE, Finding
from benchmarks.statistics.studies import Setting, differences, pairs, pulls
from benchmarks.statistics.world import Alike, rows
from leeway.stats.contrasts import ContrastMatrix, contrasts, standard_error
from leeway.stats.pairing import paired_contrasts

pytestmark = pytest.mark.slow

STUDIES = 600


def test_pulls_are_those_of_the_rows():
    setting = Setting(40, 0.1, 0.2, samples=2, seeds=2)
    table = rows(replace(setting.world, axes=("jailbreak",)), np.random.default_rng(5))
    found, observed = paired_contrasts(table, {"t": "plain"}, only=["asr"])
    columns = ContrastMatrix(np.unique(observed["cluster"].to_numpy(np.intp)), found)
    pulled, weights = columns.sums_CM, columns.weights_CM
    simulated = next(iter(differences(setting, 1, 5))).mean(axis=(0, 2, 3))[:, 0] / 40
    assert np.sort(pulled[:, 0]) == pytest.approx(np.sort(simulated), abs=1e-12)
    assert weights[:, 0] == pytest.approx(np.full(40, 1 / 40))
    of_pairs = standard_error(next(pairs(setting, 1, 5)))
    printed = contrasts(table, {"t": "plain"}, resamples=100).set_index("measure").loc["asr", "se"]
    assert printed == pytest.approx(of_pairs)


@pytest.mark.parametrize(
    "setting", [Setting(100, 0.1, 0.1), Setting(200, 0.4, 0.4, "capability"), Setting(120, 0.2, 0.2, "persona")]
)
def test_size_of_the_sign_test(setting: Setting):
    rejected = difference._tested(setting, STUDIES, 1)[0]
    assert Finding("", "", rejected, STUDIES, SIZE).within(3)


@pytest.mark.parametrize(
    "setting", [Setting(100, 0.1, 0.25), Setting(100, 0.02, 0.06), Setting(200, 0.4, 0.6, "capability")]
)
def test_cover_of_the_interval(setting: Setting):
    covered = difference._tested(setting, STUDIES, 2)[1]
    assert Finding("", "", covered, STUDIES, (0.93, 0.97)).within(3)


def test_naive_errors_would_be_caught():
    setting = Setting(100, 0.1, 0.1)
    naive = [replace(p, clusters=np.arange(len(p.value))) for p in pairs(setting, STUDIES, 3)]
    share = float(np.mean([difference._beyond(p, standard_error(p)) for p in naive]))
    assert not Finding("", "", share, STUDIES, SIZE).within(3)


@pytest.mark.parametrize(
    "setting", [Setting(300, 0.1, 0.15), Setting(100, 0.02, 0.06), Setting(100, 0.001, 0.05, attacks=1)]
)
def test_tests_on_the_margin(setting: Setting):
    better, worse, equivalent, covered = margins._shares(setting, STUDIES, 4)
    for share in (better, worse, equivalent):
        assert Finding("", "", share, STUDIES, (0.0, SIZE[1])).within(3)
    assert Finding("", "", covered, STUDIES, (0.87, 1.0)).within(3)


def test_signs_alone_would_fail_at_a_margin():
    """Why `bound_draws` exists: where few prompts moved, flipping signs at a margin passes far too many."""
    setting = Setting(300, 0.005, 0.02, attacks=1)
    rng = np.random.default_rng(0)
    rejected = []
    for block in pulls(setting, STUDIES, 7):
        signs = rng.integers(0, 2, size=(999, 300)) * 2.0 - 1.0
        roots = (block.sum(axis=0) - signs @ block) / (1 - signs.mean(axis=1, keepdims=True))
        rejected.append((roots >= setting.difference).mean(axis=0) <= 0.05)
    share = float(np.concatenate(rejected).mean())
    assert not Finding("", "", share, STUDIES, (0.0, SIZE[1])).within(2)


@pytest.mark.parametrize(("seeds", "run"), [(3, 0.02), (5, 0.1), (2, 0.1)])
def test_intervals_over_runs(seeds: int, run: float):
    setting = Setting(200, 0.4, 0.4, "capability", seeds=seeds, alike=Alike(run=run))
    missed, by_prompts = runs._missed(setting, STUDIES, 8)
    assert Finding("", "", missed, STUDIES, (0.0, SIZE[1])).within(3)
    assert by_prompts > 0.1


def test_families_and_power():
    for found in difference.families(200):
        assert found.within(3)
    for found in runs.power(200):
        assert found.within(3)
