"""What is compared with what: other references, conditions, families, and rows that must not be pooled."""

import time

import numpy as np
import pytest
from stats_table import PLAIN, answers, attacked, rows

from benchmarks.statistics.world import CONDITIONS, Rates, World
from benchmarks.statistics.world import rows as made
from leeway import stats

NAN = float("nan")
TWO = {"t": "plain", "s": "<SAFE>"}


def test_against_another_objective_by_hand():
    lines = [
        *answers("base", [0.0] * 10),
        *answers("sft", [1.0] * 5 + [0.0] * 5),
        *answers("ip", [1.0] * 8 + [0.0] * 2),
    ]
    table = stats.contrasts(rows(*lines), PLAIN, ("sft", None))
    assert list(table["objective"]) == ["ip"]
    found = table.iloc[0]
    assert (found["base"], found["rate"], found["difference"], found["n_discordant"]) == pytest.approx(
        (0.5, 0.8, 0.3, 3)
    )


def test_against_one_budget_and_each_ones_own():
    lines = answers("base", [0.0] * 10)
    for objective in ("sft", "ip"):
        for budget, right in ((1000, 2), (2000, 6)):
            lines += answers(objective, [1.0] * (right + (objective == "ip")) + [0.0] * (9 - right), budget=budget)
    lines = [line for line in lines if line["item_id"] != "sums/9"]  # nine items for all
    fixed = stats.contrasts(rows(*lines), PLAIN, ("sft", 2000)).set_index(["objective", "budget"])
    assert set(fixed.index) == {("sft", 1000), ("ip", 1000), ("ip", 2000)}
    assert fixed.loc[("sft", 1000), "difference"] == pytest.approx(-4 / 9)
    own = stats.contrasts(rows(*lines), PLAIN, ("sft", None)).set_index(["objective", "budget"])
    assert set(own.index) == {("ip", 1000), ("ip", 2000)}
    assert list(own["difference"]) == pytest.approx([1 / 9, 1 / 9])


def test_seeds_are_paired_with_the_same_seed():
    lines = [*answers("base", [0.0] * 8)]
    lines += [*answers("sft", [0.0] * 8, seed=0), *answers("sft", [1.0] * 8, seed=1)]
    lines += [*answers("ip", [0.0] * 8, seed=0), *answers("ip", [1.0] * 8, seed=1), *answers("ip", [1.0] * 8, seed=2)]
    found = stats.contrasts(rows(*lines), PLAIN, ("sft", None)).iloc[0]
    assert (found["difference"], found["n"], found["n_unpaired"]) == (0, 16, 8)


def test_objectives_used_under_different_prompts_are_paired_by_item_and_say_so():
    lines = [*answers("base", [0.0] * 10), *answers("base", [0.0] * 10, template_hash="s")]
    lines += [*answers("sft", [1.0] * 10)]
    lines += [*answers("cft", [0.0] * 10, template_hash="s"), *answers("cft", [1.0] * 10)]
    first = {"cft": "<SAFE>", "sft": "plain"}
    table = stats.contrasts(rows(*lines), TWO, ("sft", None), first=first).set_index("condition")
    assert table.loc["<SAFE>", "difference"] == -1  # each as it is used
    assert "each under its own test prompt: <SAFE> against plain" in table.loc["<SAFE>", "note"]
    assert table.loc["plain", "difference"] == 0  # both under the same prompt
    assert "own test prompt" not in table.loc["plain", "note"]
    assert list(table["n_unpaired"]) == [0, 0]
    back = stats.contrasts(rows(*lines), TWO, ("cft", None), first=first).iloc[0]
    assert (back["objective"], back["difference"]) == ("sft", 1)  # plain against <SAFE>, not against cft's plain
    base = stats.contrasts(rows(*lines), TWO, first=first).set_index(["objective", "condition"])
    assert base.loc[("cft", "<SAFE>"), "difference"] == 0


def test_without_the_same_prompt_there_is_no_pair():
    lines = [*answers("base", [0.0] * 6), *answers("base", [0.0] * 6, template_hash="s")]
    lines += [*answers("sft", [1.0] * 6), *answers("cft", [1.0] * 6), *answers("cft", [1.0] * 6, template_hash="s")]
    table = stats.contrasts(rows(*lines), TWO, ("sft", None), first={"cft": "plain"}).set_index("condition")
    assert table.loc["<SAFE>", "note"] == "no pair: sft was not measured under the same rendered prompts"
    assert table.loc["<SAFE>", ["difference", "if_best", "p"]].isna().all()


def test_further_conditions_are_a_family_of_their_own():
    lines = [*answers("base", [0.0] * 10), *answers("base", [0.0] * 10, template_hash="s")]
    for name in ("sft", "cft"):
        lines += answers(name, [1.0] * 10)
    lines += answers("cft", [1.0] * 10, template_hash="s")
    told = stats.contrasts(rows(*lines), TWO, first={"cft": "<SAFE>", "sft": "plain"})
    told = told.set_index(["objective", "condition"])
    primary = "capability @ 1000, primary"
    assert told["family"].to_dict() == {
        ("cft", "<SAFE>"): primary,
        ("cft", "plain"): f"{primary}, further conditions",
        ("sft", "plain"): primary,
    }
    assert list(told["family_size"]) == [2, 1, 2]
    assert list(told["first"]) == [True, False, True]
    # untold, one budget under two conditions leaves it in doubt: all count alike
    assert set(stats.contrasts(rows(*lines), TWO)["family"]) == {primary}
    # the smallest budget under one condition leaves none
    early = answers("cft", [1.0] * 10, template_hash="s", budget=500)
    seen = stats.contrasts(rows(*lines, *early), TWO)
    assert list(seen.loc[~seen["first"], "condition"]) == ["plain"]


@pytest.mark.parametrize(
    ("against", "words"),
    [
        (("dpo", None), "no objective dpo to contrast with \\(the rows have sft"),
        (("base", None), "no objective base"),
        (("sft", 7), "sft was not measured at 7 \\(its budgets: 1000"),
    ],
)
def test_a_reference_that_is_not_there(against: stats.ContrastReference, words: str):
    with pytest.raises(stats.StatsError, match=words):
        stats.contrasts(rows(*answers("base", [0.0]), *answers("sft", [0.0])), PLAIN, against)


def test_two_versions_of_a_template_are_not_pooled():
    lines = [*answers("base", [0.0] * 6), *answers("base", [0.0] * 6, template_hash="new")]
    lines += [*answers("sft", [1.0] * 6), *answers("sft", [1.0] * 6, template_hash="new")]
    both = {"t": "plain", "new": "plain"}
    for ask in (stats.contrasts, stats.rates):
        with pytest.raises(
            stats.StatsError, match=r"2 rendered prompts of capability under condition plain \(t, new\)"
        ):
            ask(rows(*lines), both)
    assert len(stats.contrasts(rows(*lines), {"t": "plain", "new": "plain, new version"})) == 2
    # a checkpoint under the one and its base under the other is no pair, and says so
    apart = [*answers("base", [0.0] * 6), *answers("sft", [1.0] * 6, template_hash="new")]
    assert "same rendered prompts" in stats.contrasts(rows(*apart), both).iloc[0]["note"]


def test_a_scale_in_both_directions_is_no_second_version():
    def asked(objective: str, score: dict[str, float], hashes: str, **more: object) -> list[dict[str, object]]:
        lines = []
        for (direction, value), h in zip(score.items(), hashes, strict=True):
            of = {"eval": "persona-sd3", "prompt": direction, "template_hash": h} | more
            lines += answers(objective, [value] * 8, **of)
        return lines

    known = {"u": "plain", "d": "plain", "U": "<SAFE>", "D": "<SAFE>"}
    lines = asked("base", {"up": 0.2, "down": 0.4}, "ud") + asked("base", {"up": 0.2, "down": 0.4}, "DU")
    lines += asked("sft", {"up": 0.2, "down": 0.6}, "ud") + asked("cft", {"up": 0.3, "down": 0.9}, "DU")
    table = stats.contrasts(rows(*lines), known).set_index("objective")
    assert list(table["n"]) == [16, 16]
    # CFT behind its token against SFT without: up with up and down with down, whatever the hashes
    found = stats.contrasts(rows(*lines), known, ("sft", None)).set_index("objective").loc["cft"]
    assert (found["n"], found["n_unpaired"], found["difference"]) == (16, 0, pytest.approx(0.2))
    third = asked("sft", {"up": 0.2}, "x")
    with pytest.raises(stats.StatsError, match="3 rendered prompts"):
        stats.contrasts(rows(*lines, *third), known | {"x": "plain"})


def test_all_unscored():
    lines = [*answers("base", [0.0] * 6), *answers("sft", [NAN] * 6)]
    found = stats.contrasts(rows(*lines), PLAIN).iloc[0]
    assert found["note"] == "6 of 6 unscored"
    assert found[["difference", "low", "high", "se", "mde", "p", "p_mcnemar", "seed_ci_low"]].isna().all()
    assert (found["if_best"], found["if_worst"], found["n"]) == (1, 0, 0)


def test_unscored_answers_are_bounded_both_ways():
    lines = attacked("base", {"dan": [0.0] * 9 + [NAN]}) + attacked("sft", {"dan": [NAN] + [1.0] * 4 + [0.0] * 5})
    table = stats.contrasts(rows(*lines), PLAIN)
    found = table[table["measure"] == "asr"].iloc[0]
    assert found["difference"] == 0.5  # 4 of the 8 that both have
    assert (found["if_best"], found["if_worst"]) == pytest.approx((0.3, 0.5))  # (0 + 4 − 1)/10, (1 + 4 − 0)/10
    scored = stats.contrasts(rows(*answers("base", [0.0] * 9), *answers("sft", [1.0] * 9)), PLAIN).iloc[0]
    assert scored["if_best"] == scored["if_worst"] == scored["difference"] == 1


@pytest.mark.parametrize("tuned", [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
def test_three_items_say_nothing(tuned: list[float]):
    found = stats.contrasts(rows(*answers("base", [0.0] * 3), *answers("sft", tuned)), PLAIN).iloc[0]
    assert (found["low"], found["high"]) == (-1, 1)
    assert found["p"] > 0.05
    assert np.isnan(found["mde"])
    assert "only 3 prompts: no test can reject" in found["note"]


def test_all_moved_alike_is_no_point_either():
    found = stats.contrasts(rows(*answers("base", [0.0] * 30), *answers("sft", [1.0] * 30)), PLAIN).iloc[0]
    assert found["difference"] == 1
    # none of 30 otherwise: at most 1 − 0.025^(1/30) = 11.6% of prompts, which could have lost 2 each
    assert found["low"] == pytest.approx(1 - 2 * (1 - 0.025 ** (1 / 30)), abs=0.01)
    assert np.isnan(found["se"])
    assert found["mde"] > 0.1
    assert "all prompts changed equally" in found["note"]


def test_several_samples_are_one_prompt_and_judges_are_never_pooled():
    lines = [line for k in range(4) for line in answers("base", [0.0] * 10, sample=k)]
    lines += [line for k in range(4) for line in answers("sft", [1.0] * 5 + [0.0] * 5, sample=k)]
    found = stats.contrasts(rows(*lines), PLAIN).iloc[0]
    assert (found["n"], found["n_clusters"], found["n_discordant"]) == (40, 10, 5)
    assert np.isnan(found["p_mcnemar"])
    single = stats.contrasts(rows(*lines).query("sample == 0"), PLAIN).iloc[0]
    assert single["se"] == pytest.approx(found["se"])  # four equal answers are one

    judged = rows(*lines, *(line | {"judge": "second", "score": 0.0} for line in lines))
    with pytest.raises(stats.StatsError, match="several judges"):
        stats.contrasts(judged, PLAIN)
    apart = stats.contrasts(stats.split_judges(judged, {"capability": "exact"}), PLAIN).set_index("measure")
    assert list(apart["difference"]) == [0.5, 0.0]
    assert list(apart["primary"]) == [True, False]


def test_one_seed_says_so_and_three_have_an_interval_over_runs():
    world = World(tuned={"sft": (Rates(0.5, 0.1, 0.2),)}, seeds=(0, 1, 2), axes=("capability",))
    table = made(world, np.random.default_rng(0))
    three = stats.contrasts(table, CONDITIONS).iloc[0]
    assert three["seed_ci_low"] < three["low"] < three["high"] < three["seed_ci_high"]
    assert three["note"] == ""
    one = stats.contrasts(table[(table["seed"] == 0)], CONDITIONS).iloc[0]
    assert np.isnan(one["seed_ci_low"])
    assert one["note"] == "one training seed"


def test_ten_thousand_resamples_take_seconds():
    tuned = {o: tuple(Rates(0.4, 0.1 + 0.03 * b, 0.2) for b in range(4)) for o in ("sft", "dpo", "ip")}
    table = made(World(tuned=tuned, budgets=(1, 2, 3, 4), items=400, prompts=100), np.random.default_rng(0))
    start = time.perf_counter()
    stats.contrasts(table, CONDITIONS, resamples=10_000)
    assert len(table) > 13_000
    assert time.perf_counter() - start < 20  # about 1 s; a loop over resamples would take minutes


def test_same_rows_same_numbers_in_any_order():
    table = made(World(seeds=(0, 1)), np.random.default_rng(3))
    mixed = table.sample(frac=1, random_state=0)
    one, two = (stats.contrasts(t, CONDITIONS, resamples=500) for t in (table, mixed))
    numbers = one.select_dtypes("number").columns
    assert np.allclose(one[numbers], two[numbers], equal_nan=True)
