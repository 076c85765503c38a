"""A probe's estimates: the family-wise rate of false alarms, coverage of ratios, and what is withheld or named."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from benchmarks import probe as campaign
from leeway.stats import mechanism

Record = Callable[[str, object], None]
Floats = np.ndarray


def values(
    value_PM: np.ndarray, control_PM: np.ndarray, scale_P: np.ndarray, measure: str = "patching"
) -> pd.DataFrame:
    """One row per prompt and layer."""
    identity = {"objective": "sft", "seed": 0, "budget": 1, "measure": measure, "group": "harmful", "detail": "d"}
    return pd.DataFrame(
        [
            identity
            | {"item_id": f"p{p}", "layer": m, "site": "attn", "position": "", "low": np.nan, "high": np.nan}
            | {"value": value_PM[p, m], "control": control_PM[p, m], "scale": scale_P[p], "reason": ""}
            for p in range(value_PM.shape[0])
            for m in range(value_PM.shape[1])
        ]
    )


def drawn(effect: float, gap: float, chance: float = 0.1, seed: int = 0) -> pd.DataFrame:
    """40 prompts and three layers; the second has the effect."""
    rng = np.random.default_rng(seed)
    value_PM = rng.normal(0, 0.2, (40, 3)) + effect * np.eye(3)[1]
    return values(value_PM, rng.normal(0, chance, (40, 3)), rng.normal(gap, 0.5, 40))


@pytest.mark.parametrize("case", campaign.NULLS, ids=lambda c: c.name)
def test_families_without_an_effect_alarm_at_their_level(case: campaign.Null, record_property: Record) -> None:
    """Quick version of `python -m benchmarks.probe`: 600 draws, whose rate lies in [2.9, 7.4]% 99 times in 100."""
    rate = campaign.alarm_rate(case, draws=600)
    record_property("measured", f"false alarms of a probe's family, {case.name}: {rate:.1%} of 600")
    assert 0.029 <= rate <= 0.074


def test_ratios_cover_their_value(record_property: Record) -> None:
    covered = campaign.ratio_coverage(draws=200)
    record_property("measured", f"95% intervals of a patching share cover it in {covered:.1%} of 200")
    assert 0.90 <= covered <= 0.99


def test_a_control_of_some_prompts_bounds_the_share_of_all() -> None:
    """Half of the prompts have a control, and these differ more between the models than the others."""
    rng, scale_P = np.random.default_rng(0), np.repeat([3.0, 1.0], 20)
    control_PM = rng.normal(0, 0.3, (40, 1))
    control_PM[20:] = np.nan
    table = mechanism.summarise(values(np.full((40, 1), 0.5), control_PM, scale_P)).set_index("measure")
    effect, share = table.loc["patching-effect"], table.loc["patching"]
    assert (share["value"], share["n"]) == (pytest.approx(0.25), 40)
    assert effect["control_high"] == pytest.approx(mechanism.chance(control_PM[:20, 0]))
    assert share["control_high"] == pytest.approx(effect["control_high"] / 2)


def test_a_share_of_no_difference_is_withheld() -> None:
    table = mechanism.summarise(drawn(1.0, gap=0.0)).set_index(["measure", "layer"])
    share = table.loc[("patching", 1)]
    assert np.isnan([share["value"], share["low"], share["high"]]).all()
    assert share["reason"].startswith("withheld: the models' difference is not shown (")
    assert table.loc[("patching-effect", 1), "value"] == pytest.approx(1.0, abs=0.1)
    shown = mechanism.summarise(drawn(1.0, gap=2.0)).set_index(["measure", "layer"]).loc[("patching", 1)]
    assert shown["value"] == pytest.approx(0.5, abs=0.1)
    assert shown["low"] < shown["value"] < shown["high"]
    assert shown["reason"] == ""


@pytest.mark.parametrize(
    ("effect", "gap", "chance", "names"),
    [
        (1.5, 3.0, 0.1, [1]),
        (-1.5, 3.0, 0.1, []),  # it moves away from the other model
        (1.5, 0.8, 0.1, []),  # the models differ no more than two seeds do
        (1.5, 3.0, 1.0, []),  # a random direction does as much
        (0.0, 3.0, 0.1, []),
    ],
)
def test_a_layer_is_named_if_its_effect_is_neither_nothing_nor_chance(
    effect: float, gap: float, chance: float, names: list[int]
) -> None:
    table = mechanism.summarise(drawn(effect, gap, chance))
    effects = table[table["measure"] == "patching-effect"]
    assert list(effects.loc[effects["named"].astype(bool), "layer"]) == names
    band = effects.set_index("layer").loc[1]
    assert band["control_high"] == pytest.approx(2.02 * chance, rel=0.25)
    assert band["control_low"] == -band["control_high"]


def test_without_a_control_nothing_is_named() -> None:
    own = drawn(1.5, 3.0)
    own["control"] = np.nan
    assert not mechanism.summarise(own)["named"].any()


def test_successes_are_compared_prompt_by_prompt() -> None:
    """Of 40 answers that became harmful, the direction undoes 30 and a random one 2."""
    put_back, random = (np.r_[np.ones(n), np.zeros(40 - n)][:, None] for n in (30, 2))
    table = mechanism.summarise(values(put_back, random, np.ones(40), "mediation")).set_index("measure")
    assert bool(table.loc["mediation-effect", "named"])
    assert table.loc["mediation", "value"] == pytest.approx(0.75)
    assert not mechanism.summarise(values(put_back, put_back, np.ones(40), "mediation"))["named"].any()


def test_a_share_that_no_draw_can_change_has_no_interval() -> None:
    """7 of 32 answers change and all are undone: every draw has a share of 1, a binomial's bound is .59."""
    changed_P = (np.arange(32) < 7).astype(float)
    undone = values(changed_P[:, None], np.zeros((32, 1)), changed_P, measure="mediation")
    share = mechanism.summarise(undone).set_index("measure").loc["mediation"]
    assert share["value"] == 1
    assert np.isnan([share["low"], share["high"]]).all()
    assert share["reason"] == mechanism.SAME_SHARE


def test_unscored_prompts_leave_a_reason_and_a_count() -> None:
    own = drawn(1.5, 3.0)
    lost = own["item_id"].isin(["p0", "p1"])
    own.loc[lost, ["value", "control", "scale"]] = np.nan
    own.loc[lost, "reason"] = "unscored: judge"
    effects = mechanism.summarise(own)
    assert set(effects["n"]) == {38}
    assert set(effects["reason"]) == {"2 prompts unscored (unscored: judge)"}
    own[["value", "control", "scale"]] = np.nan
    assert not mechanism.summarise(own)["named"].any()


def test_areas_draw_harmful_and_harmless_prompts_apart() -> None:
    """The interval has the width of independent samples: DeLong's standard error on the same scores."""
    rng = np.random.default_rng(0)
    scores = np.r_[rng.normal(1, 1, 60), rng.normal(0, 1, 60)]
    own = values(scores[:, None], np.full((120, 1), np.nan), np.full(120, np.nan), "direction-auroc")
    own["group"] = ["harmful"] * 60 + ["harmless"] * 60
    line = mechanism.summarise(own).iloc[0]
    above = scores[:60, None] > scores[60:]
    error = np.sqrt(above.mean(1).var(ddof=1) / 60 + above.mean(0).var(ddof=1) / 60)
    assert line["value"] == pytest.approx(above.mean())
    assert (line["high"] - line["low"]) / (2 * 1.96 * error) == pytest.approx(1, abs=0.12)


def test_only_measures_with_a_null_have_p_values() -> None:
    kl = values(np.full((20, 1), 0.3), np.full((20, 1), np.nan), np.full(20, np.nan), "token-kl")
    shift = values(np.full((20, 1), 0.3), np.full((20, 1), 0.0), np.full(20, np.nan), "persona-shift")
    assert np.isnan(mechanism.summarise(kl)["p"]).all()
    assert (mechanism.summarise(shift)["p"] < 0.01).all()


def test_the_change_of_the_refusal_logit_is_paired_by_prompt():
    rng = np.random.default_rng(5)
    base = 5 * rng.normal(size=30)  # prompts differ far more than the models do
    sides = {"base": base, "checkpoint": base - 1 + 0.1 * rng.normal(size=30)}
    blank = {"objective": "sft", "seed": 0, "budget": 1, "measure": "refusal-logit", "group": "harmful", "layer": -1}
    blank |= {"site": "", "position": "", "control": np.nan, "scale": np.nan, "low": np.nan, "high": np.nan}
    lines = [
        blank | {"item_id": f"p{i:02}", "detail": f"{side}, harmful", "value": v, "reason": ""}
        for side, values_P in sides.items()
        for i, v in enumerate(values_P)
    ]
    table = mechanism.summarise(pd.DataFrame(lines, columns=mechanism.VALUES)).set_index("detail")
    change = table.loc["change, harmful"]
    assert change["value"] == pytest.approx(np.mean(sides["checkpoint"] - base))
    assert change["high"] - change["low"] < 0.2  # unpaired it would be about 5
    assert (change["n"], change["unit"]) == (30, "nats")
