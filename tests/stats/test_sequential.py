"""Items asked until decided: the confidence sequence by hand, its errors by simulation, and what the tables say."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest

from benchmarks.sequential.simulate import moves, outcome, until_decided
from benchmarks.statistics.studies import Setting
from benchmarks.statistics.world import Rates, World, rows
from leeway import stats
from leeway.stats import sequential
from leeway.stats.anytime import BET_FRACTIONS, Anytime, cluster_means, cluster_order
from leeway.stats.metrics import StatsError

CONDITIONS = {"t": "plain"}


def test_capital_worked_by_hand():
    # y = 1, then 0.5: against a mean of at most 1/2 the shares win 1 + c, then nothing
    of = Anytime(np.array([1.0, 0.0]))
    assert of.p_above(0.0) == pytest.approx(1 / np.mean(1 + BET_FRACTIONS))
    assert np.mean(1 + BET_FRACTIONS) == pytest.approx(1.5)
    # against ±: the other side lost 1 − c, and the most that it ever held is what it began with
    assert of.p_below(0.0) == 1.0
    assert of.p == 1.0  # twice 1/1.5 is no p


def test_bounds_invert_the_tests():
    of = Anytime(np.random.default_rng(0).choice([-1.0, 0.0, 1.0], 150, p=[0.05, 0.7, 0.25]))
    for alpha in (0.05, 0.01):
        assert of.p_above(of.low(alpha) - 1e-6) <= alpha < of.p_above(of.low(alpha) + 1e-6)
        assert of.p_below(of.high(alpha) + 1e-6) <= alpha < of.p_below(of.high(alpha) - 1e-6)
    mirrored = Anytime(-of.values_T)
    assert mirrored.low(0.05) == pytest.approx(-of.high(0.05))
    assert mirrored.p == pytest.approx(of.p)


def test_it_only_ever_narrows():
    seen = np.random.default_rng(1).choice([-1.0, 0.0, 1.0], 120, p=[0.1, 0.7, 0.2])
    ends = [(Anytime(seen[:n]).low(0.025), Anytime(seen[:n]).high(0.025)) for n in range(0, 121, 10)]
    assert ends[0] == (-1.0, 1.0)
    assert all(a[0] <= b[0] + 1e-9 and b[1] <= a[1] + 1e-9 for a, b in pairwise(ends))


def test_nothing_moved_is_equivalence_only_after_enough_prompts():
    level = 0.05 / 6
    assert Anytime(np.zeros(100)).decision(level, 0.05) == ""
    assert Anytime(np.zeros(200)).decision(level, 0.05) == "equivalent"
    assert Anytime(np.ones(20)).decision(level, 0.05) == "different"


def test_the_order_is_of_names_alone_and_looks_grow():
    names = [f"item/{n}" for n in range(200)]
    assert cluster_order(names) == cluster_order(reversed(names))
    assert cluster_order(names[:50]) == [n for n in cluster_order(names) if n in set(names[:50])]
    assert list(sequential.looks(200)) == [40, 60, 90, 135, 200]
    assert list(sequential.looks(40)) == [40]
    assert list(sequential.looks(0)) == []


def test_a_prompt_weighs_the_same_whatever_of_it_has_a_score():
    # prompt 3 under both attacks, prompt 1 under one alone
    values = np.array([1.0, 0.0, -1.0])
    assert cluster_means(values, np.array([0, 1, 1]), np.array([3, 3, 1])).tolist() == [-1.0, 0.5]


@pytest.mark.parametrize(
    "setting",
    [
        Setting(200, 0.4, 0.4, "capability", objectives=3),
        Setting(150, 0.1, 0.15, objectives=3),
        Setting(200, 0.2, 0.25, "persona", objectives=3),
    ],
)
def test_wrong_words_are_rare_in_a_family(setting: Setting):
    found = outcome(setting, 60, 3, family=3)
    assert found.wrong <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 60)
    assert found.missed <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 60)
    if not setting.difference:
        assert found.significant <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 60)


def test_the_simulation_looks_as_a_study_does():
    for moves_CK in moves(Setting(150, 0.2, 0.35), 10, 4):
        ended = until_decided(moves_CK[:, 0], 0.01)
        words = {n: Anytime(moves_CK[:n, 0]).decision(0.01, 0.05) for n in sequential.looks(150)}
        first = next((n for n, word in words.items() if word), 150)
        assert (ended.asked, ended.said) == (first, words[first])


def test_a_large_move_is_seen_early():
    found = outcome(Setting(1319, 0.4, 0.8, "capability"), 20, 5)
    assert found.different == 1.0
    assert found.asked < 0.06


def asked_until_decided(world: World, seed: int = 0) -> tuple[pd.DataFrame, dict[tuple[str, int, str], int]]:
    """Rows as a run leaves them, and how many prompts each checkpoint was asked."""
    table = rows(world, np.random.default_rng(seed)).assign(new_tokens=10)
    base = table[table["objective"] == "base"]
    kept, asked = [base], {}
    rule = sequential.StoppingRule(len(world.tuned))
    for (objective, run, axis), own in table[table["objective"] != "base"].groupby(["objective", "seed", "eval"]):
        of_base = base[base["eval"] == axis]
        order = cluster_order(of_base["cluster"])
        for size in sequential.looks(len(order)):
            some = own[own["cluster"].isin(order[:size])]
            if not rule.undecided(of_base, some, str(axis)):
                break
        kept.append(some)
        asked[str(objective), int(run), str(axis)] = size
    return sequential.with_design(pd.concat(kept, ignore_index=True), ["capability", "jailbreak"]), asked


@pytest.fixture(scope="module")
def run() -> tuple[pd.DataFrame, dict[tuple[str, int, str], int]]:
    tuned = {"sft": (Rates(0.8, 0.5),), "kl": (Rates(0.4, 0.1),)}
    world = World(Rates(0.4, 0.1), tuned, seeds=(0, 1), items=300, prompts=120, axes=("capability", "jailbreak"))
    return asked_until_decided(world)


def test_tables_speak_of_what_was_asked(run):
    table, asked = run
    found = stats.contrasts(table, CONDITIONS).set_index(["objective", "measure"])
    assert set(found["design"]) == {"sequential"}
    sft = found.loc[("sft", "accuracy")]
    both = min(asked["sft", 0, "capability"], asked["sft", 1, "capability"])
    assert sft["n_clusters"] == both < 300  # seeds share a prefix
    assert sft["n_unpaired"] == 0
    assert sft["low"] < 0.4 < sft["high"]
    assert sft["p_holm"] <= 0.05
    assert np.isnan(sft[["se", "mde", "seed_ci_low", "seed_ci_high", "p_mcnemar"]].astype(float)).all()
    rates = stats.rates(table, CONDITIONS).set_index(["objective", "seed", "measure"])
    assert rates.loc[("sft", 0, "accuracy"), "method"] == "anytime"
    assert rates.loc[("base", 0, "accuracy"), "method"] == "wilson"
    assert rates.loc[("sft", 0, "accuracy"), "low"] < 0.8 < rates.loc[("sft", 0, "accuracy"), "high"]
    counts = sequential.sample_sizes(table, CONDITIONS).set_index(["objective", "seed", "eval"])
    line = counts.loc[("sft", 0, "capability")]
    assert line["answers"] == asked["sft", 0, "capability"]
    assert line["tokens_saved"] == 10 * (300 - line["answers"])


def test_what_was_decided_is_so_in_the_tables(run):
    table, _ = run
    one = table[(table["seed"] == 0) | (table["objective"] == "base")]
    found = stats.contrasts(one, CONDITIONS)
    same = stats.equivalence(one, CONDITIONS, {"asr": 0.05, "accuracy": 0.05})
    stopped = found[found["primary"] & (found["n_clusters"] < found["axis"].map({"capability": 300, "jailbreak": 120}))]
    assert len(stopped)
    equivalent = same[same["equivalent"]].set_index(["objective", "measure"]).index
    for _, line in stopped.iterrows():
        assert line["p_holm"] <= 0.05 or (line["objective"], line["measure"]) in equivalent


def test_checkpoints_are_compared_on_what_both_were_asked(run):
    table, asked = run
    against = stats.contrasts(table, CONDITIONS, ("kl", None)).set_index(["objective", "measure"])
    both = min(asked[o, s, "capability"] for o in ("sft", "kl") for s in (0, 1))
    assert against.loc[("sft", "accuracy"), "n_clusters"] == both
    assert against.loc[("sft", "accuracy"), "n_unpaired"] == 0


def test_a_gate_is_read_off_the_same_sequence(run):
    table, _ = run
    line = stats.one_sided(table, CONDITIONS, {"asr": (0.05, "higher")}).set_index("objective").loc["sft"]
    assert line["p"] > 0.9
    assert line["p_worse"] <= 0.05
    assert np.isnan(line["items_needed"])
    bound = stats.rate_bounds(table, CONDITIONS, {"accuracy": 0.5}, "lower").set_index("objective").loc["sft"]
    assert bound["p"] <= 0.05
    assert bound["limit"] > 0.5


def test_what_resamples_prompts_is_refused(run):
    table, _ = run
    for ask in (stats.draws, stats.frontier, stats.divergence, stats.coupling, stats.matched, stats.recommend):
        with pytest.raises(StatsError, match="sequential design"):
            ask(table, CONDITIONS)
    with pytest.raises(StatsError, match="sequential design"):
        stats.onset(table, CONDITIONS, "asr", 0.0)


def test_unscored_answers_decide_nothing():
    table = rows(World(Rates(0.4), {"sft": (Rates(0.4),)}, items=200, axes=("capability",)), np.random.default_rng(2))
    base, own = table[table["objective"] == "base"], table[table["objective"] == "sft"].copy()
    own.loc[own.index[::2], "score"] = np.nan  # half of them: no number may be printed, and nothing is decided
    assert sequential.StoppingRule(1).undecided(base, own, "capability") == ["accuracy"]
    none = own.assign(score=np.nan)
    assert sequential.StoppingRule(1).undecided(base, none, "capability") == ["accuracy"]
    assert Anytime(np.empty(0)).decision(0.05, 0.05) == ""
