"""Slopes over budgets: by hand, against statsmodels' GLM, and where there is nothing to say."""

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy.stats import f
from stats_table import PLAIN, rows
from trajectory_table import checkpoint, first, random_rows

from leeway import stats
from leeway.stats import interaction
from leeway.stats.interaction import slope_weights

BUDGETS = (1000, 2000, 4000)


def rising(**hits: tuple[int, ...]) -> pd.DataFrame:
    """Objectives whose `hits` of 40 prompts were harmful at each budget, other prompts at each."""
    lines = checkpoint("base", 0, harmful={"dan": first(4, 40)})
    for objective, of in hits.items():
        for n, budget in enumerate(BUDGETS[: len(of)]):
            lines += checkpoint(objective, budget, harmful={"dan": list(np.roll(first(of[n], 40), 3 * n))})
    return rows(*lines)


def one(table: pd.DataFrame, kind: str, objective: str = "") -> pd.Series:
    found = table[(table["kind"] == kind) & (table["objective"] == objective)]
    assert len(found) == 1
    return found.iloc[0]


def test_slopes_by_hand():
    """ASR 4, 8, 16 of 40 at 1, 2, 4 thousand tokens: (16 − 4)/40/2 = 0.15 a doubling; 4, 8, 6: 0.025."""
    found = stats.divergence(rising(sft=(4, 8, 16), kl=(4, 8, 6)), PLAIN, resamples=500)
    assert one(found, "slope", "sft")["estimate"] == pytest.approx(0.15)
    assert one(found, "slope", "kl")["estimate"] == pytest.approx(0.025)
    pair = one(found, "pair", "kl")
    assert (pair["against"], pair["estimate"]) == ("sft", pytest.approx(-0.125))
    assert pair["low"] <= -0.125 <= pair["high"]
    assert one(found, "joint-check")["estimate"] == pytest.approx(0.125)
    assert slope_weights(np.array([0.0, 1.0, 2.0])) == pytest.approx([-0.5, 0, 0.5])


def gee_table(seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    cluster, trajectory, x, attack = (g.ravel() for g in np.indices((30, 2, 3, 2)))
    value = (rng.random(len(x)) < 0.3 + 0.1 * x * trajectory + 0.1 * attack).astype(float)
    table = pd.DataFrame({"cluster": cluster, "trajectory": trajectory, "x": x.astype(float), "value": value})
    return table.assign(attack=np.array(["dan", "zulu"])[attack])


def test_the_gee_agrees_with_statsmodels_bias_reduced_covariance():
    table = gee_table()
    found = interaction.gee_test(table, 2)
    t, x = table["trajectory"].to_numpy(), table["x"].to_numpy()
    design = np.column_stack([t == 0, t == 1, (t == 0) * x, (t == 1) * x, table["attack"] == "zulu"]).astype(float)
    glm = sm.GLM(table["value"], design, family=sm.families.Binomial()).fit()
    assert found.slopes_J == pytest.approx(glm.params.to_numpy()[2:4], abs=1e-6)
    y, cluster = table["value"].to_numpy(), table["cluster"].to_numpy()
    model = sm.GEE(y, design, groups=cluster, family=sm.families.Binomial())
    covariance = np.asarray(model.fit(cov_type="bias_reduced").cov_params())
    assert found.slope_se_J == pytest.approx(np.sqrt(np.diag(covariance))[2:4], rel=1e-5)
    # one contrast: W = (b1 − b0)² / Var, and W (C − 1)/(1 · (C − 1)) ~ F(1, C − 1)
    move = glm.params.to_numpy()[3] - glm.params.to_numpy()[2]
    w = move**2 / (covariance[2, 2] + covariance[3, 3] - 2 * covariance[2, 3])
    assert (found.statistic, found.df, found.df_resid) == (pytest.approx(w, rel=1e-5), 1, 29)
    assert found.p == pytest.approx(f.sf(w, 1, 29), rel=1e-4)


def test_samples_are_means_with_their_number():
    """A prompt answered twice as its mean: the same estimate as two rows."""
    table = gee_table()
    again = gee_table(1)
    found = interaction.gee_test(pd.concat([table, again]), 2)
    alone = interaction._aggregate(pd.concat([table, again]))
    assert len(alone) == len(table)
    assert set(alone["size"]) == {2}
    t, x = (pd.concat([table, again])[c].to_numpy() for c in ("trajectory", "x"))
    zulu = pd.concat([table, again])["attack"] == "zulu"
    design = np.column_stack([t == 0, t == 1, (t == 0) * x, (t == 1) * x, zulu]).astype(float)
    y = pd.concat([table, again])["value"].to_numpy()
    glm = sm.GLM(y, design, family=sm.families.Binomial()).fit()
    assert found.slopes_J == pytest.approx(np.asarray(glm.params)[2:4], abs=1e-6)


def test_unequal_numbers_of_samples_weigh_as_many():
    table = gee_table()
    more = table[table["x"] == 0]
    found = interaction.gee_test(pd.concat([table, more, more]), 2)
    weighted = np.where(table["x"] == 0, 3.0, 1.0)
    t, x = table["trajectory"].to_numpy(), table["x"].to_numpy()
    design = np.column_stack([t == 0, t == 1, (t == 0) * x, (t == 1) * x, table["attack"] == "zulu"]).astype(float)
    glm = sm.GLM(table["value"], design, family=sm.families.Binomial(), freq_weights=weighted).fit()
    assert found.slopes_J == pytest.approx(np.asarray(glm.params)[2:4], abs=1e-6)
    every = pd.concat([table, more, more])
    t, x, zulu = every["trajectory"], every["x"], every["attack"] == "zulu"
    design = np.column_stack([t == 0, t == 1, (t == 0) * x, (t == 1) * x, zulu]).astype(float)
    model = sm.GEE(every["value"].to_numpy(), design, groups=every["cluster"].to_numpy(), family=sm.families.Binomial())
    covariance = np.asarray(model.fit(cov_type="bias_reduced").cov_params())
    assert found.slope_se_J == pytest.approx(np.sqrt(np.diag(covariance))[2:4], rel=1e-4)


def test_wald_by_hand_and_where_two_slopes_are_one():
    # three slopes, variances 1: L V L' = I − 11'/3 has two unit eigenvalues; W = Σ (b − mean)² = 2
    found = interaction.wald_test(np.array([0.0, 1.0, 2.0]), np.eye(3), 11)
    assert (found.statistic, found.df, found.df_resid) == (pytest.approx(2), 2, 9)
    assert found.p == pytest.approx(f.sf(2 * 9 / (2 * 10), 2, 9))
    alike = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0, 1.0, 1.0]])
    found = interaction.wald_test(np.array([0.0, 1.0, 1.0]), alike, 11)
    assert (found.df, found.note) == (1, "some objectives have identical responses: 1 contrasts instead of 2")
    assert np.isnan(interaction.wald_test(np.array([0.0, 1.0]), np.zeros((2, 2)), 11).p)


def test_separation_is_seen():
    x = np.array([0.0, 1.0, 2.0])
    assert interaction.separation(np.array([0.0, 0.0, 0.0]), x) == "every outcome is 0"
    assert "infinite" in interaction.separation(np.array([0.0, 0.0, 1.0]), x)
    assert "infinite" in interaction.separation(np.array([0.0, 0.0, 0.0, 1.0]), np.array([0.0, 1.0, 2.0, 2.0]))
    assert interaction.separation(np.array([0.0, 1.0, 0.0]), x) == ""
    assert interaction.separation(np.array([0.2, 0.3, 0.1]), x) == ""


def test_an_objective_without_a_slope_is_left_out_by_name():
    found = stats.divergence(rising(sft=(4, 8, 16), dpo=(5, 9, 20), kl=(0, 0, 0)), PLAIN, resamples=300)
    joint = one(found, "joint")
    assert "kl left out: only 0 discordant prompts" in joint["note"]
    assert (joint["df"], np.isnan(joint["p"])) == (1, False)
    assert one(found, "slope", "kl")[["low", "high", "p"]].isna().all()
    alone = stats.divergence(rising(sft=(4, 8, 16), kl=(0, 0, 0)), PLAIN, resamples=300)
    assert alone.loc[alone["kind"].str.startswith("joint"), "p"].isna().all()
    assert alone["note"].str.startswith("fewer than two objectives with a slope; kl left out").sum() == 2


def test_a_single_budget_has_no_slope_and_few_prompts_no_interval():
    found = stats.divergence(rising(sft=(8,), kl=(4,)), PLAIN, resamples=100)
    assert one(found, "slope", "sft")["note"] == "a single budget: no slope"
    assert found[["estimate", "low", "high", "p"]].isna().all(axis=None)
    lines = checkpoint("base", 0, harmful={"dan": [0.0] * 3})
    for n, budget in enumerate(BUDGETS):
        lines += checkpoint("sft", budget, harmful={"dan": first(n, 3)})
        lines += checkpoint("kl", budget, harmful={"dan": first(2 - n, 3)})
    few = stats.divergence(rows(*lines), PLAIN, resamples=100)
    assert few[["low", "high", "p"]].isna().all(axis=None)
    assert one(few, "slope", "sft")["note"].startswith("3 prompts: too few for an interval")


def test_an_attack_that_never_works_is_not_in_the_model():
    table = rising(sft=(4, 8, 16), kl=(4, 8, 6))
    dead = table.assign(attack="zulu", score=0.0, outcome="refused")
    with_it, without = (
        one(stats.divergence(t, PLAIN, resamples=100), "joint") for t in (pd.concat([table, dead]), table)
    )
    assert "no outcome varies under zulu: not in the model" in with_it["note"]
    assert (with_it["statistic"], with_it["p"]) == pytest.approx((without["statistic"], without["p"]))


def test_holm_runs_over_the_pairs_and_every_row_has_its_numbers():
    found = stats.divergence(random_rows(prompts=60), PLAIN, resamples=400)
    pair = found[found["kind"] == "pair"].iloc[0]
    assert pair["p"] == pair["p_holm"]
    assert (found.loc[found["kind"] == "slope", "n_clusters"] == 60).all()
    with pytest.raises(stats.StatsError, match="no rows of the measure 'endorsement'"):
        stats.divergence(random_rows(), PLAIN, "endorsement")
    with pytest.raises(stats.StatsError, match=r"no checkpoints of 'dpo' \(the rows have ip, sft\)"):
        stats.divergence(random_rows(), PLAIN, objectives=["dpo"])
