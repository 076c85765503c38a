"""The joint bootstrap against a plain loop over the same draws."""

import zlib

import numpy as np
import pandas as pd
import pytest
from stats_table import PLAIN, answers, rows
from trajectory_table import checkpoint, first, random_rows

from leeway import stats
from leeway.stats.bootstrap import TIE, Draws, draws, multinomial_weights

NAN = float("nan")


def at(drawn: Draws, measure: str, objective: str, budget: int = 0) -> int:
    cells = drawn.cells
    own = (cells["measure"] == measure) & (cells["objective"] == objective) & (cells["budget"] == budget)
    assert own.sum() == 1
    return int(cells.index[own][0])


def weights_of(axis: str, clusters: int, resamples: int, seed: int = 0) -> np.ndarray:
    return multinomial_weights(clusters, resamples, np.random.default_rng([seed, zlib.crc32(axis.encode())]))


def looped(table: pd.DataFrame, weights: np.ndarray, of_seeds: dict[int, float], strata: str) -> float:
    """One draw's rate by the definition: the mean over strata of the weighted mean inside each."""
    order = {c: k for k, c in enumerate(sorted(table["cluster"].unique()))}
    means = []
    for _, stratum in table.dropna(subset="score").groupby(strata):
        above = below = 0.0
        for _, row in stratum.iterrows():
            w = weights[order[row["cluster"]]] * of_seeds[int(row["seed"])]
            above, below = above + w * row["score"], below + w
        means.append(above / below)
    return float(np.mean(means))


@pytest.mark.parametrize("missing", [0.0, 0.1])
def test_draws_are_what_a_plain_loop_makes_of_the_same_weights(missing: float):
    table = random_rows(seed=3, missing=missing)
    drawn = draws(table, PLAIN, ("accuracy", "asr"), resamples=5)
    for axis, measure, prompts, strata in (("jailbreak", "asr", 30, "attack"), ("capability", "accuracy", 40, "eval")):
        weights = weights_of(axis, prompts, 5)
        for objective, budget in (("base", 0), ("sft", 1000), ("ip", 4000)):
            own = table[(table["eval"] == axis) & (table["objective"] == objective) & (table["budget"] == budget)]
            k = at(drawn, measure, objective, budget)
            assert drawn.point_K[k] == pytest.approx(looped(own, np.ones(prompts), {0: 1.0}, strata))
            by_loop = [looped(own, w, {0: 1.0}, strata) for w in weights]
            assert drawn.drawn_RK[:, k] == pytest.approx(by_loop)


def test_several_seeds_are_an_outer_level_crossed_with_the_prompts():
    """Of two seeds one is drawn at a time, for every objective the same; the base is one and stays."""
    table = random_rows(seeds=(0, 1))
    drawn = draws(table, PLAIN, ("asr",), resamples=40)
    weights = weights_of("jailbreak", 30, 40)
    chosen = np.random.default_rng([0, 2, 0, 1]).multinomial(1, [0.5, 0.5], size=40)
    assert 5 < chosen[:, 0].sum() < 35
    for objective in ("sft", "ip"):
        own = table[(table["attack"] != "") & (table["objective"] == objective) & (table["budget"] == 4000)]
        found = drawn.drawn_RK[:, at(drawn, "asr", objective, 4000)]
        by_loop = [looped(own, w, dict(enumerate(c)), "attack") for w, c in zip(weights, chosen, strict=True)]
        assert found == pytest.approx(by_loop)
    base = table[(table["attack"] != "") & (table["objective"] == "base")]
    by_loop = [looped(base, w, {0: 1.0}, "attack") for w in weights]
    assert drawn.drawn_RK[:, at(drawn, "asr", "base")] == pytest.approx(by_loop)
    assert set(drawn.cells["seeds"]) == {1, 2}


def test_drawing_one_seed_fewer_gives_the_variance_of_a_mean_over_seeds():
    """Answers that differ between three runs and not between prompts: the variance is s²/3."""
    lines = answers("base", [0.0] * 20)
    for seed, share in enumerate((0.0, 0.5, 1.0)):
        lines += answers("sft", [share] * 20, seed=seed)
    drawn = draws(rows(*lines), PLAIN, ("accuracy",), resamples=20_000)
    assert drawn.drawn_RK[:, at(drawn, "accuracy", "sft", 1000)].var() == pytest.approx(0.25 / 3, rel=0.03)


def test_everything_of_an_eval_is_drawn_together():
    """Two checkpoints with the same answers never differ, further judges included; other evals are drawn apart."""
    own = {"dan": first(9, 30)}
    lines = checkpoint("base", 0, first(9, 30), own) + checkpoint("sft", 10, first(9, 30), own)
    again = [one | {"eval": "jailbreak@rubric", "judge": "rubric"} for one in lines if one.get("eval") == "jailbreak"]
    drawn = draws(rows(*lines, *again), PLAIN, ("accuracy", "asr", "asr@rubric"), resamples=50)
    asr = drawn.drawn_RK[:, at(drawn, "asr", "sft", 10)]
    assert (asr == drawn.drawn_RK[:, at(drawn, "asr", "base")]).all()
    assert (asr == drawn.drawn_RK[:, at(drawn, "asr@rubric", "sft", 10)]).all()
    assert (asr != drawn.drawn_RK[:, at(drawn, "accuracy", "sft", 10)]).any()
    assert drawn.n_discordant((at(drawn, "asr", "sft", 10), at(drawn, "asr", "base")), (1, -1)) == 0
    other = drawn.n_discordant((at(drawn, "accuracy", "sft", 10),), (1,))
    assert other == 9


def test_the_same_rows_give_the_same_draws_and_another_seed_others():
    table = random_rows()
    one, two, other = (draws(table, PLAIN, resamples=20, seed=s).drawn_RK for s in (1, 1, 2))
    assert (one == two).all()
    assert not (one == other).all()
    shuffled = draws(table.sample(frac=1, random_state=0), PLAIN, resamples=20, seed=1).drawn_RK
    assert shuffled == pytest.approx(one, abs=TIE)


def test_points_are_the_rates():
    table = random_rows(missing=0.1)
    rates = stats.rates(table, PLAIN).set_index(["measure", "objective", "budget"])["rate"]
    drawn = draws(table, PLAIN, ("accuracy", "asr", "asr:zulu"), resamples=2)
    for _, cell in drawn.cells.iterrows():
        assert cell["rate"] == pytest.approx(rates[cell["measure"], cell["objective"], cell["budget"]])


def test_a_withheld_rate_is_nan_in_every_draw():
    lines = answers("base", first(5, 20)) + answers("sft", [NAN] * 9 + [1.0] * 11)
    drawn = draws(rows(*lines), PLAIN, resamples=10)
    k = at(drawn, "accuracy", "sft", 1000)
    assert np.isnan(drawn.drawn_RK[:, k]).all()
    assert drawn.cells.loc[k, "note"] == "9 of 20 unscored"
    assert np.isfinite(drawn.drawn_RK[:, at(drawn, "accuracy", "base")]).all()


def test_rows_of_two_runs_or_templates_are_not_pooled():
    lines = answers("base", first(5, 20)) + answers("sft", first(5, 20))
    with pytest.raises(stats.StatsError, match="base at 0 has two responses to sums/0 under plain: two runs"):
        draws(rows(*lines, *lines), PLAIN)
    both = rows(*lines, *(one | {"template_hash": "u"} for one in lines))
    with pytest.raises(stats.StatsError, match="versions of a template were pooled"):
        draws(both, {"t": "plain", "u": "plain"})
    assert len(draws(both, {"t": "plain", "u": "<SAFE>"}).cells) == 4


def test_a_measure_without_rows_is_left_out_and_asked_for_by_name_is_an_error():
    drawn = draws(random_rows(), PLAIN, resamples=3)
    assert drawn.measures == ["accuracy", "asr"]
    with pytest.raises(stats.StatsError, match=r"no rows of the measure 'endorsement' \(there is accuracy, asr"):
        drawn.require("endorsement")
    assert draws(random_rows(), PLAIN, ("endorsement",), resamples=3).drawn_RK.shape == (3, 0)
