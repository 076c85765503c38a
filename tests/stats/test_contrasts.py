import numpy as np
import pandas as pd
import pytest
from stats_table import PLAIN, answers, attacked, rows

from leeway import stats


def one(table: pd.DataFrame, measure: str) -> pd.Series:
    found = table[table["measure"] == measure]
    assert len(found) == 1
    return found.iloc[0]


def test_a_paired_difference_by_hand():
    base = [1, 0, 0, 0, 1, 0, 0, 0, 0, 0]
    tuned = [1, 1, 1, 1, 0, 1, 1, 1, 0, 0]  # 6 up, 1 down of 10
    table = rows(*answers("base", base), *answers("sft", tuned))
    found = one(stats.contrasts(table, PLAIN), "accuracy")
    assert (found["base"], found["rate"], found["difference"]) == pytest.approx((0.2, 0.7, 0.5))
    assert found["p"] == pytest.approx(2 * (1 + 7 / 2) / 2**7, abs=0.01)  # McNemar's mid-p, 1 of 7 the other way
    assert found["p_mcnemar"] == pytest.approx(2 * (1 + 7) / 2**7)  # and the exact one
    assert found["low"] <= 0 < found["difference"] < found["high"] <= 1
    assert (found["n"], found["n_clusters"], found["n_discordant"], found["n_unpaired"]) == (10, 10, 7, 0)
    assert (found["family"], found["family_size"], found["p_holm"]) == (
        "capability @ 1000, primary",
        1,
        found["p"],
    )
    assert found["note"] == "one training seed"


def test_macro_average_leaves_out_the_direct_question():
    base = {"none": [0.0] * 8, "dan": [0.0] * 8, "zulu": [0.0] * 8}
    tuned = {"none": [1.0] * 8, "dan": [1.0] * 4 + [0.0] * 4, "zulu": [0.0] * 8}
    table = stats.contrasts(rows(*attacked("base", base), *attacked("sft", tuned)), PLAIN)
    assert one(table, "asr")["difference"] == pytest.approx(0.25)
    assert one(table, "asr:none")["difference"] == 1
    assert one(table, "asr:dan")["difference"] == 0.5
    assert one(table, "refusal")["difference"] == pytest.approx(-0.5)
    assert one(table, "coherence")["difference"] == 0
    primary = table.set_index("measure")["primary"]
    assert primary["asr"]
    assert not primary[["asr:none", "asr:dan", "refusal", "coherence"]].any()


def test_five_attacks_on_one_prompt_are_not_five_prompts():
    rng = np.random.default_rng(0)
    moved = (rng.random(60) < 0.3).astype(float)
    names = ["a", "b", "c", "d", "e"]
    base, tuned = {n: [0.0] * 60 for n in names}, {n: list(moved) for n in names}
    clustered = rows(*attacked("base", base), *attacked("sft", tuned))
    naive = clustered.assign(cluster=clustered["attack"] + clustered["item_id"])
    wide, narrow = (one(stats.contrasts(t, PLAIN), "asr") for t in (clustered, naive))
    assert wide["difference"] == narrow["difference"]
    assert wide["high"] - wide["low"] > 1.8 * (narrow["high"] - narrow["low"])
    assert (wide["n"], wide["n_clusters"], narrow["n_clusters"]) == (300, 60, 300)


def test_unscored_pairs_are_left_out_and_counted():
    nan = float("nan")
    base = [0.0] * 20
    tuned = [1.0] * 17 + [nan] * 3
    found = one(stats.contrasts(rows(*answers("base", base), *answers("sft", tuned)), PLAIN), "accuracy")
    assert (found["difference"], found["n"], found["n_unscored"]) == (1.0, 17, 3)


def test_too_many_unscored_print_no_number():
    nan = float("nan")
    lines = [*answers("base", [0.0] * 10), *answers("sft", [1.0] * 7 + [nan] * 3), *answers("ip", [1.0] * 10)]
    table = stats.contrasts(rows(*lines), PLAIN).set_index("objective")
    assert table.loc["sft", ["difference", "low", "high", "p", "p_holm"]].isna().all()
    assert table.loc["sft", "note"] == "3 of 10 unscored"
    assert table.loc["ip", "family_size"] == 1
    rates = stats.rates(rows(*lines), PLAIN).set_index("objective")
    assert np.isnan(rates.loc["sft", "rate"])
    assert (rates.loc["sft", "reason"], rates.loc["sft", "n_unscored"]) == ("3 of 10 unscored", 3)


def test_one_attack_without_scores_does_not_change_the_average_in_silence():
    nan = float("nan")
    base = {"dan": [0.0] * 10, "zulu": [0.0] * 10}
    tuned = {"dan": [1.0] * 10, "zulu": [nan] * 10}
    table = stats.contrasts(rows(*attacked("base", base), *attacked("sft", tuned)), PLAIN)
    assert np.isnan(one(table, "asr")["difference"])
    assert one(table, "asr")["note"] == "10 of 10 unscored under zulu"
    assert one(table, "asr:dan")["difference"] == 1


def test_each_is_paired_with_the_base_under_its_own_prompt():
    conditions = {"t": "plain", "s": "<SAFE>"}
    lines = [*answers("base", [0.0] * 10), *answers("base", [1.0] * 10, template_hash="s")]
    lines += [*answers("cft", [1.0] * 10, template_hash="s"), *answers("sft", [1.0] * 10)]
    table = stats.contrasts(rows(*lines), conditions).set_index("objective")
    assert (table.loc["cft", "condition"], table.loc["cft", "base"], table.loc["cft", "difference"]) == (
        "<SAFE>",
        1,
        0,
    )
    assert (table.loc["sft", "condition"], table.loc["sft", "base"], table.loc["sft", "difference"]) == (
        "plain",
        0,
        1,
    )
    rates = stats.rates(rows(*lines), conditions)
    assert list(rates["condition"][rates["objective"] == "base"]) == ["<SAFE>", "plain"]


def test_rows_without_a_partner_are_counted_and_not_compared():
    lines = [*answers("base", [0.0] * 8), *answers("sft", [1.0] * 10), *answers("ip", [1.0] * 6)]
    table = stats.contrasts(rows(*lines), PLAIN).set_index("objective")
    assert (table.loc["sft", "n"], table.loc["sft", "n_unpaired"]) == (8, 2)
    assert (table.loc["ip", "n"], table.loc["ip", "n_unpaired"]) == (6, 2)
    other = [*answers("base", [0.0] * 8), *answers("sft", [1.0] * 8, template_hash="s")]
    found = one(stats.contrasts(rows(*other), {"t": "plain", "s": "other"}), "accuracy")
    assert found["note"] == "no pair: the base was not measured under the same rendered prompts"
    assert np.isnan(found["difference"])


def test_seeds_share_their_prompts():
    lines = [*answers("base", [0.0] * 10)]
    lines += [*answers("sft", [1.0] * 10, seed=0), *answers("sft", [0.0] * 10, seed=1)]
    found = one(stats.contrasts(rows(*lines), PLAIN), "accuracy")
    assert (found["difference"], found["seeds"], found["n"], found["n_clusters"]) == (0.5, "0, 1", 20, 10)
    assert "one training seed" not in found["note"]
    rates = stats.rates(rows(*lines), PLAIN, pool_seeds=True).set_index("objective")
    assert (rates.loc["sft", "rate"], rates.loc["sft", "n"], rates.loc["sft", "n_clusters"]) == (0.5, 20, 10)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (answers("sft", [1.0]), "no rows of the base"),
        (answers("base", [1.0]) * 2 + answers("sft", [1.0]), "two responses to sums/0"),
        (answers("base", [1.0]) + answers("sft", [1.0]) * 2, "two responses to sums/0"),
        (answers("base", [1.0]) + answers("sft", [1.5]), "outside"),
    ],
)
def test_rows_that_allow_no_contrast(lines: list[dict[str, object]], words: str):
    with pytest.raises(stats.StatsError, match=words):
        stats.contrasts(rows(*lines), PLAIN)


def test_an_axis_nobody_named_is_measured_by_its_mean():
    lines = [*answers("base", [0.5] * 8, eval="overrefusal"), *answers("sft", [0.25] * 8, eval="overrefusal")]
    found = one(stats.contrasts(rows(*lines), PLAIN), "overrefusal")
    assert (found["difference"], found["axis"], found["primary"]) == (-0.25, "overrefusal", True)
