"""A rate against a bound: exact where it can be, and never too eager where prompts or moves are few."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from stats_table import PLAIN, answers, attacked, rows

from leeway.stats import rate_bounds
from leeway.stats.cluster_tests import bound_draws


def simulated(prompts: int, attacks: int, rate: float, alike: float, runs: int) -> pd.DataFrame:
    """`runs` checkpoints, each with its own budget, whose true rate is `rate`; prompts differ by a beta law."""
    rng = np.random.default_rng(5)
    spread = (1 - alike) / alike
    found = []
    for n in range(runs):
        p = rng.beta(rate * spread, (1 - rate) * spread, prompts)
        scores = (rng.random((attacks, prompts)) < p).astype(float)
        one = attacked("sft", {f"a{a}": list(scores[a]) for a in range(attacks)})
        found += [line | {"budget": n + 1} for line in one]
    return rows(*found)


@pytest.mark.parametrize(("prompts", "attacks", "rate"), [(60, 1, 0.3), (40, 4, 0.15)])
def test_a_rate_on_its_bound_is_shown_at_most_at_the_level(
    prompts: int, attacks: int, rate: float, record_property: pytest.RecordProperty
):
    runs = 250
    table = simulated(prompts, attacks, rate, 0.4, runs)
    found = rate_bounds(table, PLAIN, {"asr": rate}, "higher")
    kept, broken = (found["p"] <= 0.05).mean(), (found["p_worse"] <= 0.05).mean()
    record_property("measured", f"bounded rate: {prompts} × {attacks} at {rate}: kept {kept:.1%}, broken {broken:.1%}")
    assert max(kept, broken) <= 0.05 + 2.5 * (0.05 * 0.95 / runs) ** 0.5
    few = table[table["budget"] <= 10]  # the other direction swaps the two tests
    one, other = (rate_bounds(few, PLAIN, {"asr": rate}, worse) for worse in ("higher", "lower"))
    assert other["p"].tolist() == one["p_worse"].tolist()
    assert other["p_worse"].tolist() == one["p"].tolist()


def test_attacks_with_prompts_of_their_own_are_not_one_binomial(record_property: pytest.RecordProperty):
    """20 prompts at 40% under one attack and 180 at 0% under another: the mean, 20%, varies as 20 prompts do."""
    rng, runs, lines = np.random.default_rng(7), 120, []
    for n in range(runs):
        one = attacked("sft", {"a": list((rng.random(20) < 0.4).astype(float)), "b": [0.0] * 180})
        lines += [line | {"budget": n + 1, "item_id": f"{line['attack']}/{line['item_id']}"} for line in one]
    found = rate_bounds(rows(*lines), PLAIN, {"asr": 0.2}, "higher")
    kept, broken = (found["p"] <= 0.05).mean(), (found["p_worse"] <= 0.05).mean()
    record_property("measured", f"bounded rate: 20 and 180 prompts: kept {kept:.1%}, broken {broken:.1%}")
    assert max(kept, broken) <= 0.05 + 2.5 * (0.05 * 0.95 / runs) ** 0.5


@pytest.mark.parametrize("small", [10, 20])
@pytest.mark.parametrize("where", ["small", "large", "both"])
def test_strata_of_unequal_sizes_are_bounded_by_their_heaviest_prompt(
    small: int, where: str, record_property: pytest.RecordProperty
):
    """100 prompts in two strata of equal weight; full moves at a margin of 5 points, in one of them or in both."""
    rng, runs, margin = np.random.default_rng(8), 1_000, 0.05
    weight_C = np.r_[np.full(small, 0.5 / small), np.full(100 - small, 0.5 / (100 - small))]
    moves_CM = np.zeros((100, runs))
    at = {"small": slice(0, small), "large": slice(small, 100), "both": slice(0, 100)}[where]
    moves_CM[at] = rng.random(moves_CM[at].shape) < (margin if where == "both" else 2 * margin)
    weights_CM = np.repeat(weight_C[:, None], runs, axis=1)
    drawn = bound_draws(moves_CM * weights_CM, weights_CM, resamples=400, seed=1)
    wrong = float((drawn.p_below(np.full(runs, margin)) <= 0.05).mean())
    record_property(
        "measured", f"margin: {small} and {100 - small} prompts, moves in {where}: {wrong:.1%} wrong passes"
    )
    assert wrong <= 0.05 + 2.5 * (0.05 * 0.95 / runs) ** 0.5


def test_probabilities_on_their_bound(record_property: pytest.RecordProperty):
    rng, runs = np.random.default_rng(6), 120
    lines = []
    for n in range(runs):
        values = rng.beta(0.5, 4.5, 30).tolist()
        lines += [line | {"budget": n + 1} for line in answers("sft", values, eval="persona")]
    found = rate_bounds(rows(*lines), PLAIN, {"endorsement": 0.1}, "higher")
    kept, broken = (found["p"] <= 0.05).mean(), (found["p_worse"] <= 0.05).mean()
    record_property("measured", f"bounded rate: probabilities, 30 prompts: kept {kept:.1%}, broken {broken:.1%}")
    assert max(kept, broken) <= 0.05 + 2.5 * (0.05 * 0.95 / runs) ** 0.5


def test_limit_and_p_agree():
    lines = [*answers("sft", [1.0] * 7 + [0.0] * 23), *answers("kl", list(np.linspace(0.1, 0.4, 30)), eval="persona")]
    for worse, sign in (("higher", 1), ("lower", -1)):
        found = rate_bounds(rows(*lines), PLAIN, {"accuracy": 0.3, "endorsement": 0.3}, worse)
        assert len(found) == 2
        inside = sign * (found["bound"] - found["limit"]) > 0
        assert (inside == (found["p"] <= 0.05)).all()
        wide = rate_bounds(rows(*lines), PLAIN, {"accuracy": 0.3, "endorsement": 0.3}, worse, level=0.01)
        assert (sign * (wide["limit"] - found["limit"]) > 0).all()


def test_one_prompt_and_unscored_ones_give_no_number():
    nan = float("nan")
    one = rate_bounds(rows(*attacked("sft", {"dan": [1.0], "zulu": [1.0]})), PLAIN, {"asr": 0.1}, "lower")
    assert one["note"].tolist() == ["a single prompt: its error cannot be estimated"]
    lost = rate_bounds(rows(*answers("sft", [1.0] * 7 + [nan] * 3)), PLAIN, {"accuracy": 0.1}, "lower")
    assert (lost["note"].item(), lost["n_unscored"].item()) == ("3 of 10 unscored", 3)
    assert one[["rate", "limit", "p"]].isna().all(axis=None)
    assert lost[["rate", "limit", "p"]].isna().all(axis=None)
