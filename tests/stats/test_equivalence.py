"""No drift has to be earned, and so does 'not worse'."""

import numpy as np
import pytest
from scipy.stats import beta, expon, gamma
from stats_table import PLAIN, answers, attacked, rows

from leeway import stats
from leeway.stats.cluster_tests import _whole_prompt, bound_draws, few_discordant

NAN = float("nan")


def two(base: list[float], tuned: list[float]) -> list[dict[str, object]]:
    return [*answers("base", base), *answers("sft", tuned)]


@pytest.mark.parametrize(("n", "earned"), [(3, False), (30, False), (58, False), (60, True), (300, True)])
def test_nothing_moved_is_equivalence_only_of_many(n: int, earned: bool):
    # with margin 5 points and none of n moved, (1 − 0.05)^n ≤ 0.05 from n = 59 on
    table = rows(*two([0.0] * n, [0.0] * n))
    found = stats.equivalence(table, PLAIN, {"accuracy": 0.05}).iloc[0]
    assert found["equivalent"] == earned
    assert found["high90"] == pytest.approx(1 - 0.05 ** (1 / n), rel=0.06)
    assert found["low90"] == pytest.approx(-found["high90"], abs=1e-9)
    assert (found["difference"], found["n_discordant"]) == (0, 0)


def test_bounds_on_zeros_and_ones_are_clopper_pearsons():
    pulls = np.zeros((60, 4))
    for k in range(1, 5):
        pulls[: k - 1, k - 1] = 1 / 60
    found = bound_draws(pulls, np.full((60, 4), 1 / 60), resamples=40_000, seed=0)
    theirs = [beta.ppf(0.95, k + 1, 60 - k) for k in range(4)]
    assert found.high() == pytest.approx(theirs, rel=0.02)


def test_pseudo_prompt_shrinks_by_the_variance_of_what_is_no_full_move():
    """4 of 20 prompts moved by ½: ν = 4 · (½ · ½)² = ¼, so e has exp(−5/4) = 28.7% of a whole prompt."""
    moves = np.zeros((20, 3))
    moves[:4, 0], moves[:8, 1], moves[:, 2] = 0.5, 1.0, 0.05
    weights = np.full((20, 3), 1 / 20)
    assert _whole_prompt(moves / 20, weights) == pytest.approx([0.2865, 1.0, 1.0], abs=1e-4)
    high = bound_draws(moves / 20, weights, resamples=40_000, seed=0).high()
    rng = np.random.default_rng(1)  # the definition, with draws of its own: U = (½ Γ(4) + e)/(Γ(20) + e)
    moved, others, u = rng.gamma(4, size=100_000), rng.gamma(16, size=100_000), rng.random(100_000)
    e = 0.2865 * expon.ppf(u) + 0.7135 * gamma.ppf(u, 0.5)
    assert high[0] == pytest.approx(np.quantile((moved / 2 + e) / (moved + others + e), 0.95), rel=0.02)
    assert high[1] == pytest.approx(beta.ppf(0.95, 9, 12), rel=0.02)  # 8 of 20 full moves: Clopper–Pearson
    assert high[2] == pytest.approx(0.05 + 0.95 * (1 - 0.05 ** (1 / 20)), rel=0.02)  # all equal: 0 of 20, from 0.05


def test_a_rare_full_move_may_be_absent_from_the_sample():
    """50 prompts, 5% of them change fully, the others by noise: none is in the sample in 7.7% of studies."""
    rng = np.random.default_rng(8)
    moves = np.where(rng.random((50, 800)) < 0.05, 1.0, rng.normal(0.0, 0.02, (50, 800)))
    weights = np.full_like(moves, 1 / 50)
    passed = bound_draws(moves * weights, weights, resamples=999, seed=0).p_below(np.full(800, 0.05)) <= 0.05
    assert ((moves < 0.5).all(axis=0)).mean() > 0.06
    assert passed.mean() <= 0.05


def test_one_prompt_that_moved_never_narrows_the_bound():
    pulls = np.zeros((100, 2))
    pulls[0, 1] = 0.2 / 100
    found = bound_draws(pulls, np.full((100, 2), 0.01), resamples=4_000, seed=0).high()
    assert found[1] > found[0]


def test_few_is_few_that_differ_from_the_rest():
    moved = np.full((100, 3), 0.01)
    moved[:4, 1], moved[:40, 2] = 0, 0
    assert list(few_discordant(moved, np.full((100, 3), 0.01))) == [True, True, False]


def test_p_and_interval_tell_the_same_story():
    rng = np.random.default_rng(1)
    pulls = (rng.random((80, 60)) < 0.15) / 80 - (rng.random((80, 60)) < 0.15) / 80
    drawn = bound_draws(pulls, np.full((80, 60), 1 / 80), resamples=999, seed=0)
    at = np.full(60, 0.07)
    assert ((drawn.p_below(at) <= 0.05) == (drawn.high() < at)).all()
    assert ((drawn.p_above(-at) <= 0.05) == (drawn.low() > -at)).all()
    assert 5 < (drawn.p_below(at) <= 0.05).sum() < 58


def test_equivalence_line_by_line():
    rng = np.random.default_rng(0)
    base = (rng.random(400) < 0.4).astype(float)
    noise = np.where(rng.random(400) < 0.05, 1 - base, base)
    lines = [*two(list(base), list(noise)), *answers("dpo", list(np.maximum(base, rng.random(400) < 0.2)))]
    table = stats.equivalence(rows(*lines), PLAIN, {"accuracy": 0.05}).set_index("objective")
    assert table["equivalent"].to_dict() == {"dpo": False, "sft": True}
    assert (table["p"] == table[["p_lower", "p_upper"]].max(axis=1)).all()
    assert ((table["p"] <= 0.05) == ((table["low90"] > -0.05) & (table["high90"] < 0.05))).all()
    assert table.loc["sft", "p_holm"] == pytest.approx(2 * table.loc["sft", "p"])
    assert (table.loc["sft", "family"], table.loc["sft", "family_size"]) == (
        "capability @ 1000, primary, equivalence",
        2,
    )


def test_what_cannot_be_tested_is_not_equivalent():
    table = rows(*two([0.0] * 20, [0.0] * 10 + [NAN] * 10))
    found = stats.equivalence(table, PLAIN, {"accuracy": 0.2}).iloc[0]
    assert not found["equivalent"]
    assert np.isnan(found["p"])
    assert found["note"] == "10 of 20 unscored"
    tested = stats.one_sided(table, PLAIN, {"accuracy": -0.2}).iloc[0]
    assert tested[["p", "p_worse", "limit", "difference"]].isna().all()


def test_not_worse_and_surely_worse():
    base = {"dan": [0.0] * 200}
    lines = attacked("base", base)
    lines += attacked("same", {"dan": [0.0] * 200}) + attacked("worse", {"dan": [1.0] * 60 + [0.0] * 140})
    lines += attacked("unclear", {"dan": [1.0] * 10 + [0.0] * 190})
    table = stats.one_sided(rows(*lines), PLAIN, {"asr": 0.05}).set_index("objective")
    assert (table["worse"] == "higher").all()
    assert table["p"].lt(0.05).to_dict() == {"same": True, "unclear": False, "worse": False}
    assert table["p_worse"].lt(0.05).to_dict() == {"same": False, "unclear": False, "worse": True}
    assert ((table["p"] <= 0.05) == (table["limit"] < 0.05)).all()
    assert table.loc["same", "items_needed"] == table.loc["worse", "items_needed"] == 0
    assert table.loc["unclear", "items_needed"] == np.inf  # 10 of 200 is the bound itself


def test_a_bound_knows_its_direction_or_is_told():
    lines = two([1.0] * 100, [1.0] * 97 + [0.0] * 3)
    found = stats.one_sided(rows(*lines), PLAIN, {"accuracy": -0.10}).iloc[0]
    assert (found["worse"], found["difference"]) == ("lower", -0.03)
    assert found["limit"] == pytest.approx(-beta.ppf(0.95, 4, 97), abs=0.003)  # Clopper–Pearson, 3 of 100 lost
    assert found["p"] < 0.05
    other = stats.one_sided(rows(*lines), PLAIN, {"accuracy": (0.02, "higher")}).iloc[0]
    assert (other["worse"], other["p"] < 0.05) == ("higher", True)


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda t: stats.equivalence(t, PLAIN, {"accuracy": 5}), "between 0 and 1"),
        (lambda t: stats.equivalence(t, PLAIN, {"acuracy": 0.1}), "no measure acuracy: these rows have accuracy"),
        (lambda t: stats.one_sided(t, PLAIN, {"accuracy": (0.1, "up")}), "'higher' or 'lower'"),
        (lambda t: stats.one_sided(t.assign(eval="persona"), PLAIN, {"endorsement": 0.1}), "no better direction"),
        (lambda t: stats.one_sided(t, PLAIN, {"accuracy": -3}), r"in \(−1, 1\)"),
    ],
)
def test_margins_that_mean_nothing(ask, words: str):  # type: ignore[no-untyped-def]
    with pytest.raises(stats.StatsError, match=words):
        ask(rows(*two([0.0] * 10, [1.0] * 10)))
