"""Comparison at equal KL from the base, worked by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from stats_table import PLAIN, rows
from trajectory_table import checkpoint, first

from leeway import stats
from leeway.stats.metrics import StatsError

BASE = checkpoint("base", 0, harmful={"dan": first(10, 100)})
IP = [
    *checkpoint("ip", 1000, harmful={"dan": first(20, 100)}),
    *checkpoint("ip", 4000, harmful={"dan": first(50, 100)}),
]
SFT = [
    *checkpoint("sft", 1000, harmful={"dan": first(15, 100)}),
    *checkpoint("sft", 4000, harmful={"dan": first(20, 100)}),
]
TABLE = rows(*BASE, *IP, *SFT)


def kls(objective: str, values: dict[int, float], seeds: tuple[int, ...] = (0,), spread: float = 0.2) -> pd.DataFrame:
    """Twenty examples whose KLs average `values`, by budget."""
    found = []
    for (budget, mean), seed in ((b, s) for b in values.items() for s in seeds):
        for n, share in enumerate(np.linspace(1 - spread, 1 + spread, 20)):
            line = {"objective": objective, "seed": seed, "budget": budget, "condition": "plain", "prompts": "task"}
            found.append(line | {"item_id": f"e{n}", "kl": mean * share})
    return pd.DataFrame(found)


ITEMS = pd.concat([kls("ip", {1000: 0.1, 4000: 0.4}), kls("sft", {1000: 0.05, 4000: 0.2})])


def compared(items: pd.DataFrame = ITEMS, **settings: object) -> pd.DataFrame:
    found = stats.equal_distance(TABLE, PLAIN, items, resamples=1000, **settings)  # type: ignore[arg-type]
    return found[found["measure"] == "asr"]


def test_levels_and_their_difference_at_the_largest_common_distance():
    """Both reach 0.2 nats. IP is between 20% at 0.1 and 50% at 0.4: 30%, 20 points above the base's 10%, so 100
    points per nat. SFT has 20% there: 10 points, 50 per nat. The difference is 10 points."""
    found = compared()
    levels = found[found["kind"] == "level"].set_index("objective")
    pair = found[found["kind"] == "pair"].iloc[0]
    assert found["distance"].tolist() == pytest.approx([0.2] * 3)
    assert levels.loc[["ip", "sft"], "estimate"].tolist() == pytest.approx([0.3, 0.2])
    assert levels.loc[["ip", "sft"], "per_nat"].tolist() == pytest.approx([1.0, 0.5])
    assert (pair["objective"], pair["against"], pair["estimate"]) == ("ip", "sft", pytest.approx(0.1))
    assert pair["low"] < 0.1 < pair["high"]
    assert pair["p_holm"] == pytest.approx(pair["p"])  # one pair


def test_intervals_contain_the_uncertainty_of_the_distance():
    """The same prompts with KLs that vary more over examples: the common distance is less certain."""
    wide = pd.concat([kls("ip", {1000: 0.1, 4000: 0.4}, spread=1), kls("sft", {1000: 0.05, 4000: 0.2}, spread=1)])
    narrow, broad = (compared(i)["distance_high"].iloc[0] - compared(i)["distance_low"].iloc[0] for i in (ITEMS, wide))
    assert broad > 3 * narrow > 0


def test_a_fixed_distance_is_exact_and_nothing_is_extrapolated():
    found = compared(at=0.3).set_index(["kind", "objective"])
    assert found.loc[("level", "ip"), "estimate"] == pytest.approx(0.4)
    assert np.isnan(found.loc[("level", "sft"), "estimate"])
    assert (
        "KL to the base ranges from 0.000 nats to 0.200 nats: not extrapolated" in found.loc[("level", "sft"), "note"]
    )
    assert np.isnan(found.loc[("pair", "ip"), "estimate"])


def test_seeds_are_averaged():
    """SFT's two seeds at 0.1 and 0.3 nats end at 0.2 on average."""
    both = pd.concat(
        [ITEMS[ITEMS["objective"] == "ip"], kls("sft", {1000: 0.05, 4000: 0.1}), kls("sft", {4000: 0.3}, (1,))]
    )
    both = pd.concat([both, kls("sft", {1000: 0.05}, (1,))])
    table = rows(*BASE, *IP, *SFT, *(line | {"seed": 1} for line in SFT))
    found = stats.equal_distance(table, PLAIN, both, resamples=200)
    assert found["distance"].iloc[0] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("items", "settings", "message"),
    [
        (ITEMS, {"at": "base+10"}, "a KL above 0"),
        (ITEMS, {"at": 0.0}, "a KL above 0"),
        (ITEMS, {"on": "js"}, "give one of kl, kl-general"),
        (ITEMS, {"on": "kl-general"}, "was not measured"),
    ],
)
def test_bad_input(items: pd.DataFrame, settings: dict[str, object], message: str):
    with pytest.raises(StatsError, match=message):
        compared(items, **settings)


def simulated(rng: np.random.Generator, slopes: dict[str, float], reach: dict[str, tuple[float, float]]):
    """100 prompts and 48 examples; ASR is 10% + slope · KL, and a prompt's threshold is one for all checkpoints."""
    threshold = rng.random(100)
    lines = [*checkpoint("base", 0, harmful={"dan": (threshold < 0.1).tolist()})]
    items = []
    for name, slope in slopes.items():
        scale = rng.gamma(4.0, 0.25, 48)  # an example's KL over the mean, in all checkpoints of an objective
        for budget, mean in zip((1000, 4000), reach[name], strict=True):
            noisy = np.where(rng.random(100) < 0.2, rng.random(100), threshold)  # a fifth answers afresh
            lines += checkpoint(name, budget, harmful={"dan": (noisy < 0.1 + slope * mean).tolist()})
            line = {"objective": name, "seed": 0, "budget": budget, "condition": "plain", "prompts": "task"}
            kl = mean * scale * rng.gamma(16.0, 1 / 16, 48)
            items += [line | {"item_id": f"e{n}", "kl": value} for n, value in enumerate(kl)]
    return rows(*lines), pd.DataFrame(items)


def test_intervals_cover_the_truth_at_equal_distance(record_property: pytest.RecordProperty):
    """IP rises by 100 points per nat and SFT by 50, over other distances: 10 points apart at 0.2 nats, 15 at 0.3."""
    rng, studies = np.random.default_rng(4), 75  # the bound is 88.7%: an interval that covers 80% fails
    slopes, reach = {"ip": 1.0, "sft": 0.5}, {"ip": (0.1, 0.4), "sft": (0.1, 0.3)}
    truth = {0.2: 0.1, "largest": 0.15}
    covered = dict.fromkeys(truth, 0)
    for n in range(studies):
        table, items = simulated(rng, slopes, reach)
        drawn = stats.draws(table, PLAIN, ("asr",), resamples=400, seed=n)
        for at, difference in truth.items():
            found = stats.equal_distance(table, PLAIN, items, at, drawn=drawn, seed=n)
            (pair,) = found[found["kind"] == "pair"].to_dict("records")
            covered[at] += pair["low"] <= difference <= pair["high"]
    record_property("measured", f"equal distance: covered {covered} of {studies}")
    for count in covered.values():
        assert count / studies >= 0.95 - 2.5 * (0.95 * 0.05 / studies) ** 0.5
