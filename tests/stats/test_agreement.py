"""Agreement and corrected rates: tables worked by hand, laws, and coverage by simulation."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from leeway.stats import StatsError, confusion, judge_agreement, kappa, rogan_gladen
from leeway.stats.agreement import Confusion, cohen_kappa, wilson_rate
from leeway.stats.intervals import wilson

Record = Callable[[str, str], None]


def test_confusion_by_hand() -> None:
    truth = [True, True, True, False, False, False, False, True]
    said = [True, True, False, False, True, False, None, None]
    found = confusion(truth, said)
    assert found == Confusion(true_positive=2, false_positive=1, false_negative=1, true_negative=2, unscored=2)
    assert found.n == 6
    assert found.agreement == (pytest.approx(4 / 6), *wilson(4, 6))
    assert found.sensitivity == (pytest.approx(2 / 3), *wilson(2, 3))
    assert found.specificity == (pytest.approx(2 / 3), *wilson(2, 3))


def test_nothing_counted_is_no_share() -> None:
    assert all(map(math.isnan, wilson_rate(0, 0)))
    assert all(map(math.isnan, confusion([True], [True]).specificity))


def test_kappa_by_hand() -> None:
    """20, 5, 10, 15 of 50: agreement 0.7, by chance 0.5·0.6 + 0.5·0.4 = 0.5, κ = 0.4."""
    assert cohen_kappa(np.array([[20, 5], [10, 15]])) == pytest.approx(0.4)
    a = ["y"] * 25 + ["n"] * 25
    b = ["y"] * 20 + ["n"] * 5 + ["y"] * 10 + ["n"] * 15
    point, low, high = kappa(a, b)
    assert point == pytest.approx(0.4)
    assert low < 0.4 < high
    assert kappa(a, b) == kappa(a, b)
    assert kappa(b, a) == kappa(a, b)


def test_kappa_of_three_outcomes_by_hand() -> None:
    """Diagonal 5, 4, 3 of 15 with one elsewhere in each row: p_o = 12/15, p_e = (6·5 + 5·5 + 4·5)/225 = 1/3."""
    table = np.array([[5, 1, 0], [0, 4, 1], [0, 0, 4]])
    assert cohen_kappa(table) == pytest.approx((13 / 15 - (6 * 5 + 5 * 5 + 4 * 5) / 225) / (1 - 1 / 3))


def test_kappa_limits() -> None:
    assert kappa(["a", "b"] * 5, ["a", "b"] * 5)[0] == 1.0
    assert kappa(["a", "b"] * 5, ["b", "a"] * 5)[0] == -1.0
    assert math.isnan(kappa(["a"] * 5, ["a"] * 5)[0])  # one category: chance explains everything
    with pytest.raises(StatsError, match="at least one"):
        kappa([], [])


def test_repeated_prompts_do_not_make_kappa_surer() -> None:
    rng = np.random.default_rng(0)
    a = [str(x) for x in rng.integers(0, 2, 60)]
    b = [x if keep else "1" for x, keep in zip(a, rng.random(60) < 0.7, strict=True)]
    _, low, high = kappa(a, b)
    names = [f"{k:02}" for k in range(60)]
    _, low4, high4 = kappa(a * 4, b * 4, names * 4)
    assert (low4, high4) == pytest.approx((low, high))
    _, low_wrong, high_wrong = kappa(a * 4, b * 4)
    assert high_wrong - low_wrong < 0.7 * (high - low)


def test_corrected_rate_by_hand() -> None:
    """(0.3 + 0.8 − 1) / (0.9 + 0.8 − 1) = 1/7; a perfect judge changes nothing."""
    assert rogan_gladen(0.3, 100, 0.9, 0.8, 50, 50).rate == pytest.approx(1 / 7)
    assert rogan_gladen(0.3, 100, 1.0, 1.0, 50, 50).rate == pytest.approx(0.3)
    assert rogan_gladen(0.3, 100, 0.9, 0.8, 50, 50).note == ""


def test_lang_and_reiczigel_by_hand() -> None:
    """n' = 103.8416, q = 31.9208/103.8416, Se = 46/52, Sp = 41/52, and so on, with z² = 3.8416."""
    z, q, se, sp = 1.959963984540054, 31.920729 / 103.841459, 46 / 52, 41 / 52
    gain, v_se, v_sp = se + sp - 1, se * (1 - se) / 52, sp * (1 - sp) / 52
    p = (q + sp - 1) / gain
    centre = p + 2 * z * z * (p * v_se - (1 - p) * v_sp)
    half = z * math.sqrt(q * (1 - q) / (100 + z * z) + p * p * v_se + (1 - p) ** 2 * v_sp) / gain
    found = rogan_gladen(0.3, 100, 0.9, 0.8, 50, 50)
    assert found.low == pytest.approx(max(0.0, centre - half), abs=1e-6)
    assert found.high == pytest.approx(centre + half, abs=1e-6)


@pytest.mark.parametrize(("rate", "clipped", "to"), [(0.05, -0.05 / 0.8, 0.0), (0.97, 1.0875, 1.0)])
def test_clipping_is_told(rate: float, clipped: float, to: float) -> None:
    found = rogan_gladen(rate, 200, 0.9, 0.9, 100, 100)
    assert found.rate == to
    assert found.note == f"clipped to [0, 1] from {clipped:.4f}"
    assert 0 <= found.low <= found.rate <= found.high <= 1


@pytest.mark.parametrize(("se", "sp"), [(0.5, 0.5), (0.3, 0.6), (0.0, 1.0)])
def test_a_judge_that_tells_nothing_corrects_nothing(se: float, sp: float) -> None:
    found = rogan_gladen(0.3, 100, se, sp, 50, 50)
    assert all(map(math.isnan, (found.rate, found.low, found.high)))
    assert found.note.startswith("undefined")


@pytest.mark.parametrize("bad", [{"rate": 1.2}, {"sensitivity": -0.1}, {"specificity": math.nan}, {"n_pos": 0}])
def test_what_is_no_share_is_refused(bad: dict[str, float]) -> None:
    given = {"rate": 0.3, "n": 100, "sensitivity": 0.9, "specificity": 0.8, "n_pos": 50, "n_neg": 50} | bad
    with pytest.raises(StatsError):
        rogan_gladen(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize(("p", "se", "sp"), [(0.1, 0.95, 0.9), (0.5, 0.8, 0.85), (0.9, 0.9, 0.7)])
def test_the_corrected_interval_covers(p: float, se: float, sp: float, record_property: Record) -> None:
    """2,000 studies: 313 answers judged, the judge's errors measured on 200 positives and 200 negatives."""
    rng = np.random.default_rng(0)
    n, n_pos, n_neg, runs = 313, 200, 200, 2000
    called = rng.binomial(n, p * se + (1 - p) * (1 - sp), runs) / n
    se_hat, sp_hat = rng.binomial(n_pos, se, runs) / n_pos, rng.binomial(n_neg, sp, runs) / n_neg
    found = [rogan_gladen(r, n, a, b, n_pos, n_neg) for r, a, b in zip(called, se_hat, sp_hat, strict=True)]
    covered = sum(f.low <= p <= f.high for f in found) / runs
    naive = sum(low <= p <= high for low, high in (wilson(r * n, n) for r in called)) / runs
    what = f"corrected rate, truth {p}, Se {se}, Sp {sp}"
    record_property("measured", f"{what}: covered {covered:.1%} (0.93 to 0.985), uncorrected {naive:.1%}")
    assert 0.93 <= covered <= 0.985
    assert naive < covered


def rows(*lines: tuple[str, str, str, str | None]) -> pd.DataFrame:
    """(judge, attack, item, outcome); None is unscored."""
    frame = pd.DataFrame(lines, columns=["judge", "attack", "item_id", "outcome"])
    frame["unscored_reason"] = ["judge: lost" if missing else None for missing in frame["outcome"].isna()]
    shared = {"objective": "base", "seed": 0, "budget": 0, "eval": "jailbreak", "sample": 0, "template_hash": "t"}
    return frame.assign(**shared, adapter_hash="", cluster=frame["item_id"])


def test_judges_over_rows_by_hand() -> None:
    table = rows(
        *[("a", "none", str(k), "refused") for k in range(6)],
        *[("b", "none", str(k), "refused" if k < 4 else "harmful") for k in range(6)],
        *[(j, "dan", str(k), "harmful") for j in "ab" for k in range(3)],
        ("a", "dan", "3", "harmful"),
        ("b", "dan", "3", None),
        ("a", "dan", "4", "harmful"),
    )
    lines, tables = judge_agreement(table)
    [line] = lines.to_dict("records")
    assert (line["judge_a"], line["judge_b"], line["n"], line["n_unscored"]) == ("a", "b", 9, 1)
    # by prompt: variance 6/5 · (3 · 4² + 2² + 2 · 7²)/81² = 20/729, so 9 answers are (14/81)/(20/729) = 6.3 trials
    assert (line["agreement"], line["low"], line["high"]) == pytest.approx((7 / 9, *wilson(4.9, 6.3)))
    assert line["kappa"] == pytest.approx((7 / 9 - (6 * 4 + 3 * 5) / 81) / (1 - (6 * 4 + 3 * 5) / 81))
    assert tables["a", "b"].loc["refused", "harmful"] == 2
    assert tables["a", "b"].to_numpy().sum() == 9


def test_three_judges_are_three_pairs_and_one_is_none() -> None:
    three = rows(*[(j, "none", "0", "refused") for j in "abc"])
    assert list(zip(*judge_agreement(three)[0][["judge_a", "judge_b"]].to_numpy().T, strict=True)) == [
        ("a", "b"),
        ("a", "c"),
        ("b", "c"),
    ]
    assert judge_agreement(rows(("a", "none", "0", "refused")))[0].empty


def test_a_judge_has_one_row_for_an_answer() -> None:
    with pytest.raises(StatsError, match="two rows"):
        judge_agreement(rows(("a", "none", "0", "refused"), ("a", "none", "0", "harmful")))


def test_rows_that_nobody_could_score_are_no_agreement() -> None:
    lines, _ = judge_agreement(rows(("a", "none", "0", None), ("b", "none", "0", "refused")))
    assert lines.loc[0, "n"] == 0
    assert lines.loc[0, "n_unscored"] == 1
    assert math.isnan(lines.loc[0, "agreement"])
