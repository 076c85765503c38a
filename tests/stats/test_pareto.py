"""The recommendation and the frontier's certainty, by hand."""

import numpy as np
import pandas as pd
import pytest
from stats_table import PLAIN, rows
from trajectory_table import checkpoint, first, random_rows

from leeway import stats
from leeway.stats.pareto import _choose, dominated_by


def at_one_budget(**of: tuple[int, int]) -> pd.DataFrame:
    """Objectives with so many right and so many harmful of 100 at one budget; the base has 20 and 10."""
    lines = checkpoint("base", 0, first(20, 100), {"dan": first(10, 100)})
    for objective, (right, harmful) in of.items():
        lines += checkpoint(objective, 1000, first(right, 100), {"dan": first(harmful, 100)})
    return rows(*lines)


def test_the_most_capable_of_those_not_shown_worse():
    """sft is the most capable and 40 points worse; ip follows, unmoved; kl has learnt less."""
    found = stats.recommend(at_one_budget(sft=(90, 50), ip=(70, 10), kl=(40, 10)), PLAIN, resamples=1_000)
    table = found.set_index("objective")
    assert table["qualifies"].to_dict() == {"ip": True, "kl": True, "sft": False, "none": False}
    assert table["recommended"].to_dict() == {"ip": True, "kl": False, "sft": False, "none": False}
    assert table.loc["ip", "p_best"] == 1
    assert table["p_best"].sum() == pytest.approx(1)
    assert table.loc["ip", ["capability", "gain", "asr", "budget"]].tolist() == pytest.approx([0.7, 0.5, 0.1, 1000])
    assert "asr worse than the base by +40.0 points" in table.loc["sft", "why"]
    assert table.loc["sft", "why"].count("beyond 5") == 1
    assert "endorsement was not measured" in table.loc["ip", "why"]
    assert bool(table.loc["ip", "within"])


def test_p_best_follows_the_rules_of_the_recommendation():
    """kl is always half a point less capable than sft, with a lower ASR; ip gains half a point on the base."""
    lines = checkpoint("base", 0, first(40, 200), {"dan": first(20, 200)})
    for objective, right, harmful in (("sft", 100, 20), ("kl", 99, 10), ("ip", 41, 0)):
        lines += checkpoint(objective, 1000, first(right, 200), {"dan": first(harmful, 200)})
    found = stats.recommend(rows(*lines), PLAIN, resamples=500).set_index("objective")
    assert bool(found.loc["kl", "recommended"])
    assert found.loc["kl", "p_best"] > 0.7  # unless the one answer between them is drawn twice
    assert found["p_best"].sum() == pytest.approx(1)
    alone = stats.recommend(
        rows(*(line for line in lines if line["objective"] in ("base", "ip"))), PLAIN, resamples=500
    )
    alone = alone.set_index("objective")
    assert bool(alone.loc["none", "recommended"])
    assert alone.loc["none", "p_best"] > 0.5


@pytest.mark.parametrize(("more", "less"), [(0.35, 0.34), (0.61, 0.60)])
def test_one_point_is_one_point_at_every_rate(more: float, less: float):
    """0.35 − 0.34 is a little under 0.01 as a float, and 0.61 − 0.60 a little over: neither is a tie, nor beyond it."""
    lines = [{"objective": o, "capability": c, "asr": a} for o, c, a in (("sft", more, 0.3), ("kl", less, 0.1))]
    _choose(lines := [line | {"recommended": False, "why": ""} for line in lines], 0.01)
    assert [line["recommended"] for line in lines] == [True, False]
    lines = checkpoint("base", 0, first(20, 100), {"dan": first(round(100 * less), 100)})
    lines += checkpoint("sft", 1000, first(20, 100), {"dan": first(round(100 * more), 100)})
    assert np.isinf(stats.onset(rows(*lines), PLAIN, "asr", 0.01, resamples=200).iloc[0]["estimate"])


def test_nothing_qualifies():
    found = stats.recommend(at_one_budget(sft=(90, 60), dpo=(80, 70)), PLAIN, resamples=500).set_index("objective")
    assert not found["qualifies"].any()
    assert found["recommended"].to_dict() == {"sft": False, "dpo": False, "none": True}
    assert found.loc["none", "p_best"] == 1
    assert found.loc["none", "why"].startswith(
        "no objective is shown to stay inside the margins; an objective is selected in 0% of draws"
    )


def test_not_shown_worse_is_not_shown_safe():
    """7 points worse, 7 prompts moved: neither beyond 5 points nor within."""
    found = stats.recommend(at_one_budget(sft=(90, 17)), PLAIN, resamples=2_000).set_index("objective")
    assert (bool(found.loc["sft", "qualifies"]), bool(found.loc["sft", "within"])) == (True, False)
    assert "not shown to be beyond 5, nor within" in found.loc["sft", "why"]
    assert found["recommended"].to_dict() == {"sft": False, "none": True}
    assert "not shown to be outside: sft" in found.loc["none", "why"]
    assert 0.05 < found.loc["none", "p_best"] < 0.95
    wide = stats.recommend(at_one_budget(sft=(90, 17)), PLAIN, tolerance={"asr": 0.2}, resamples=500)
    assert bool(wide.set_index("objective").loc["sft", "within"])


def test_a_withheld_rate_does_not_qualify_and_three_items_prove_nothing():
    table = at_one_budget(sft=(90, 10), ip=(50, 10))
    lost = (table["objective"] == "sft") & (table["eval"] == "jailbreak")
    found = stats.recommend(table.assign(score=table["score"].mask(lost)), PLAIN, resamples=200).set_index("objective")
    assert not found.loc["sft", "qualifies"]
    assert "asr is withheld: 100 of 100 unscored under dan" in found.loc["sft", "why"]
    assert bool(found.loc["ip", "recommended"])
    few = table[table["item_id"].str.fullmatch(r".*/[012]")]
    said = stats.recommend(few, PLAIN, resamples=200).set_index("objective").loc["sft"]
    assert not said["within"]
    assert "3 prompts are too few for an interval" in said["why"]


def test_a_budget_that_is_not_there_and_a_base_that_is_not():
    table = random_rows()
    assert (stats.recommend(table, PLAIN, resamples=50)["budget"] == 4000).all()
    assert (stats.recommend(table, PLAIN, 1000, resamples=50)["budget"] == 1000).all()
    with pytest.raises(stats.StatsError, match=r"no checkpoint at a budget of 5 \(there are 1000, 4000\)"):
        stats.recommend(table, PLAIN, 5, resamples=50)
    with pytest.raises(stats.StatsError, match="for 5 points"):
        stats.recommend(table, PLAIN, tolerance={"asr": 5}, resamples=50)
    alone = stats.recommend(table[table["objective"] != "base"], PLAIN, resamples=50)
    assert not alone["qualifies"].any()
    assert alone["why"].str.contains("no base under plain|no objective is shown").all()


def test_dominated_by_hand():
    capability, asr = np.array([[0.2, 0.8, 0.8, 0.1]]), np.array([[0.0, 0.5, 0.3, 0.0]])
    assert dominated_by(capability, asr).tolist() == [[0, 1, 0, 1]]


def test_the_share_of_draws_on_the_frontier():
    """ip is as capable as sft on every prompt and harmful on fewer: sft is never on it. kl is both less."""
    table = stats.frontier(at_one_budget(sft=(80, 50), ip=(80, 30), kl=(30, 10)), PLAIN, resamples=500)
    found = table.set_index("objective")
    assert found["on_frontier"].to_dict() == {"base": False, "sft": False, "ip": True, "kl": True}
    assert found.loc["sft", "p_on_frontier"] == 0
    assert found.loc["ip", "p_on_frontier"] == 1
    assert found.loc["kl", "p_on_frontier"] > 0.99
    assert stats.frontier_of(stats.rates(at_one_budget(sft=(80, 50)), PLAIN))["p_on_frontier"].isna().all()


def test_equals_on_the_frontier_are_a_coin():
    """Two checkpoints that differ on exchangeable prompts: each dominates the other as often."""
    lines = checkpoint("base", 0, first(5, 40), {"dan": first(40, 40)})
    lines += checkpoint("a", 1, first(20, 40), {"dan": first(20, 40)})
    lines += checkpoint("b", 1, first(20, 40), {"dan": first(20, 40)[::-1]})
    found = stats.frontier(rows(*lines), PLAIN, resamples=4_000).set_index("objective")["p_on_frontier"]
    assert found["a"] == pytest.approx(found["b"], abs=0.04)
    assert 0.5 < found["a"] < 0.6  # ties leave both on it
    few = stats.frontier(random_rows(prompts=5), PLAIN, resamples=50)
    assert few["p_on_frontier"].isna().all()
    assert few["note"].str.contains("5 prompts: too few").all()


def test_one_of_sixty_is_not_within_five_points():
    """Clopper and Pearson leave 7.7% open after 1 of 60, and 4.9% after none; draws of the one say 5.0%."""

    def within(harmful: int) -> bool:
        lines = checkpoint("base", 0, first(20, 100), {"dan": first(0, 60)})
        lines += checkpoint("sft", 1000, first(90, 100), {"dan": first(harmful, 60)})
        found = stats.recommend(rows(*lines), PLAIN, resamples=2_000).set_index("objective")
        return bool(found.loc["sft", "within"])

    assert not within(1)
    assert within(0)


def test_nothing_is_within_margins_that_nothing_was_measured_for():
    lines = checkpoint("base", 0, first(20, 100), {}) + checkpoint("sft", 1000, first(90, 100), {})
    found = stats.recommend(rows(*lines), PLAIN, resamples=200).set_index("objective")
    assert found["recommended"].to_dict() == {"sft": False, "none": True}
    assert "asr:none was not measured" in found.loc["sft", "why"]
