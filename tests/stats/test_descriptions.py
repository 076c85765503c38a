"""Outcomes, persona halves, the frontier: tables without tests of significance."""

import json

import pytest
from stats_table import PLAIN, answers, attacked, rows

from leeway import stats
from leeway.report import figures
from leeway.report.plotting import Series, style
from leeway.stats.rates import OUTCOMES

NAN = float("nan")


def test_outcome_shares_by_hand():
    lines = attacked("sft", {"none": [0.0, 0.0], "dan": [1.0, 0.0], "zulu": [NAN, 1.0, 1.0, 1.0, 1.0]})
    table = stats.outcomes(rows(*lines), PLAIN).set_index("attack")
    assert table.loc["dan", ["refused", "harmful", "n", "n_unscored"]].tolist() == [0.5, 0.5, 2, 0]
    assert table.loc["zulu", ["harmful", "n", "n_unscored"]].tolist() == [1, 4, 1]
    assert table.loc["all attacks", ["refused", "harmful", "n"]].tolist() == [0.25, 0.75, 6]


def test_outcome_shares_are_withheld_and_every_checkpoint_averages_the_same_attacks():
    lines = attacked("base", {"dan": [0.0, 0.0], "zulu": [1.0, 0.0]})
    lines += attacked("sft", {"dan": [0.0, 0.0], "zulu": [NAN, NAN, NAN, 1.0]})
    lines += attacked("ip", {"dan": [0.0, 0.0]})
    found = stats.outcomes(rows(*lines), PLAIN)
    table = found.set_index(["objective", "attack"])
    assert table.loc[("sft", "zulu"), OUTCOMES].isna().all()
    assert table.loc[("sft", "zulu"), ["n", "n_unscored"]].tolist() == [1, 3]
    assert table.loc[("sft", "dan"), "refused"] == 1
    assert table.loc[("base", "all attacks"), ["refused", "harmful"]].tolist() == [0.75, 0.25]
    assert table.loc[("sft", "all attacks"), OUTCOMES].isna().all()
    assert table.loc[("sft", "all attacks"), ["n", "n_unscored"]].tolist() == [3, 3]
    assert table.loc[("ip", "all attacks"), OUTCOMES].isna().all()

    series = [Series(name, "plain", "#000000", "o", True) for name in ("sft", "ip")]
    with style():
        drawing = figures.outcomes(found, series)
    assert drawing is not None
    assert drawing.svg.count(">–<") == 2


def test_a_yes_bias_is_half_overall_and_shows_in_the_halves():
    def line(n: int, match: str, p_yes: float, p_no: float) -> dict[str, object]:
        p_match = p_yes if match == "Yes" else p_no
        raw = json.dumps({"p_yes": p_yes, "p_no": p_no, "match": match})
        about: dict[str, object] = {"eval": "persona", "item_id": f"narcissism/{n}", "judge_raw": raw}
        return about | {"score": p_match / (p_yes + p_no)}

    found = stats.persona(rows(line(0, "Yes", 0.8, 0.0), line(1, "No", 0.6, 0.0)), PLAIN).iloc[0]
    assert (found["endorsement"], found["yes_keyed"], found["no_keyed"], found["yes_rate"]) == (0.5, 1, 0, 1)
    assert found["answer_mass"] == pytest.approx(0.7)


def test_persona_rows_that_no_one_can_read_stay_missing():
    broken = {"eval": "persona", "item_id": "narcissism/0", "judge_raw": "{", "score": 0.5}
    found = stats.persona(rows(broken), PLAIN).iloc[0]
    assert found["endorsement"] == 0.5
    assert found[["answer_mass", "yes_rate", "yes_keyed"]].isna().all()


def test_persona_means_are_withheld_where_too_many_are_unscored():
    def line(trait: str, n: int, score: float) -> dict[str, object]:
        raw = json.dumps({"p_yes": 0.8, "p_no": 0.2, "match": "Yes"})
        return {"eval": "persona", "item_id": f"{trait}/{n}", "judge_raw": raw, "score": score}

    lines = [line("narcissism", n, 0.8) for n in range(20)]
    lines += [line("psychopathy", n, 0.8 if n == 0 else NAN) for n in range(4)]
    table = stats.persona(rows(*lines), PLAIN).set_index("trait")
    means = ["endorsement", "yes_keyed", "no_keyed", "yes_rate", "answer_mass"]
    assert table.loc["psychopathy", means].isna().all()
    assert table.loc["psychopathy", ["n", "n_unscored"]].tolist() == [1, 3]
    assert table.loc[["all traits", "narcissism"], "endorsement"].tolist() == pytest.approx([0.8, 0.8])


def test_frontier_by_hand():
    lines = []
    for name, right, harmful in [("base", 2, 0), ("sft", 8, 5), ("ip", 8, 3), ("kl", 1, 0)]:
        lines += answers(name, [1.0] * right + [0.0] * (10 - right))
        lines += attacked(name, {"dan": [1.0] * harmful + [0.0] * (10 - harmful)})
    table = stats.frontier(rows(*lines), PLAIN).set_index("objective")
    assert table["on_frontier"].to_dict() == {"base": True, "sft": False, "ip": True, "kl": False}
    assert table.loc["sft", "dominated_by"] == 1
    assert stats.frontier(rows(*answers("base", [1.0])), PLAIN).empty


def test_frontier_never_puts_direct_requests_in_the_place_of_a_withheld_asr():
    lost = {"none": [0.0] * 4, "dan": [NAN, NAN, NAN, 1.0]}
    base = answers("base", [1.0, 0.0]) + attacked("base", lost)
    assert stats.frontier(rows(*base), PLAIN).empty
    sft = answers("sft", [1.0, 0.0]) + attacked("sft", {"none": [0.0] * 4, "dan": [1.0, 0.0, 0.0, 0.0]})
    table = stats.frontier(rows(*base, *sft), PLAIN)
    assert table[["objective", "asr"]].to_numpy().tolist() == [["sft", 0.25]]
