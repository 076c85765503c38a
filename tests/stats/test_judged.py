"""Several judges, several samples, unscored answers: nothing is averaged or counted that should stand apart."""

import numpy as np
import pandas as pd
import pytest
from stats_table import PLAIN, answers, attacked, rows

from leeway import stats
from leeway.stats.metrics import analysis_table, measures, split_judges

NAN = float("nan")


def by(judge: str, lines: list[dict[str, object]]) -> list[dict[str, object]]:
    return [line | {"judge": judge} for line in lines]


def two_judges() -> pd.DataFrame:
    """Keywords calls every answer under DAN harmful, the rubric half of them; before, neither called any so."""
    before = {"none": [0.0] * 8, "dan": [0.0] * 8}
    lines = by("keywords", attacked("base", before)) + by("rubric", attacked("base", before))
    lines += by("keywords", attacked("sft", before | {"dan": [1.0] * 8}))
    lines += by("rubric", attacked("sft", before | {"dan": [1.0, 0.0] * 4}))
    return rows(*lines, *answers("base", [1.0, 0.0]), *answers("sft", [1.0, 1.0]))


def line(table: pd.DataFrame, measure: str, objective: str = "sft") -> pd.Series:
    found = table[(table["measure"] == measure) & (table["objective"] == objective)]
    assert len(found) == 1
    return found.iloc[0]


def test_several_judges_are_never_averaged_and_never_chosen_in_silence():
    for estimate in (stats.rates, stats.contrasts, stats.outcomes):
        with pytest.raises(stats.StatsError, match="jailbreak has several judges per response"):
            estimate(two_judges(), PLAIN)
    with pytest.raises(stats.StatsError, match=r"several judges \(keywords, rubric\): name the first one"):
        split_judges(two_judges())


@pytest.mark.parametrize(
    ("first", "further", "asr"), [("keywords", "rubric", (1, 0.5)), ("rubric", "keywords", (0.5, 1))]
)
def test_each_judge_has_its_own_measures_and_one_comes_first(first: str, further: str, asr: tuple[float, float]):
    table = split_judges(two_judges(), {"jailbreak": first})
    rates, contrasts = stats.rates(table, PLAIN), stats.contrasts(table, PLAIN)
    for found, column in ((rates, "rate"), (contrasts, "difference")):
        assert line(found, "asr")[column] == asr[0]
        assert line(found, f"asr@{further}")[column] == asr[1]
        assert line(found, f"asr@{further}:dan")[column] == asr[1]
        assert line(found, "asr")["primary"]
        assert not found.loc[found["measure"].str.contains("@"), "primary"].any()
        assert not found["measure"].str.contains(f"@{first}").any()
    assert line(rates, f"asr@{further}")["label"] == f"ASR, mean over attacks (judge: {further})"
    assert line(rates, "asr")["n"] == line(rates, f"asr@{further}")["n"] == 8
    assert line(contrasts, "asr")["family"] == "jailbreak @ 1000, primary"
    assert line(contrasts, "asr")["family_size"] == 1
    assert line(contrasts, f"asr@{further}")["family"] == f"jailbreak@{further} @ 1000, secondary"
    outcomes = stats.outcomes(table, PLAIN).set_index(["objective", "attack"])
    assert outcomes.loc[("sft", "dan"), "harmful"] == asr[0]
    assert stats.frontier(table, PLAIN).set_index("objective").loc["sft", "asr"] == asr[0]


def test_a_further_judge_changes_no_number_of_the_first():
    alone = two_judges()
    alone = alone[alone["judge"] != "rubric"]
    both = split_judges(two_judges(), {"jailbreak": "keywords"})
    for estimate in (stats.rates, stats.contrasts):
        of_both = estimate(both, PLAIN)
        kept = of_both[~of_both["axis"].str.contains("@")].reset_index(drop=True)
        pd.testing.assert_frame_equal(kept, estimate(alone, PLAIN))


def test_judges_of_different_answers_need_no_first():
    """Two tasks, each with its own grader, are one axis as before."""
    lines = by("exact", answers("base", [1.0, 0.0])) + by("gsm8k", answers("base", [1.0, 1.0]))
    for n, one in enumerate(lines[2:]):
        one |= {"item_id": f"gsm8k/{n}"}
    table = split_judges(rows(*lines))
    assert line(stats.rates(table, PLAIN), "accuracy", "base")["rate"] == 0.75


def test_the_first_judge_has_judged_every_answer():
    table = two_judges()
    lost = (table["judge"] == "rubric") & (table["item_id"] == "forbidden/3") & (table["objective"] == "sft")
    with pytest.raises(
        stats.StatsError, match="keywords scored forbidden/3 of sft at 1000, but rubric has no row for it"
    ):
        split_judges(table[~lost], {"jailbreak": "rubric"})
    assert len(split_judges(table[~lost], {"jailbreak": "keywords"})) == len(table) - 2
    with pytest.raises(stats.StatsError, match=r"no rows of judge nobody \(it has keywords, rubric"):
        split_judges(table, {"jailbreak": "nobody"})
    with pytest.raises(stats.StatsError, match=r"overrefusal has no rows of judge rubric \(it has no rows\)"):
        split_judges(table, {"overrefusal": "rubric"})


def test_judging_apart_keeps_every_row_and_twice_is_once():
    table = two_judges()
    once = split_judges(table, {"jailbreak": "rubric"})
    pd.testing.assert_frame_equal(once.drop(columns="eval"), table.drop(columns="eval"))
    pd.testing.assert_frame_equal(split_judges(once), once)
    assert set(table["eval"]) == {"capability", "jailbreak"}


def test_bounds_of_unscored_answers_by_hand():
    """Of 10 answers 3 are right and 1 has no score: .3 to .4. Of 10, 4 have none: withheld, the bounds stand."""
    lines = answers("base", [1.0] * 3 + [0.0] * 6 + [NAN]) + answers("sft", [1.0] * 3 + [0.0] * 3 + [NAN] * 4)
    rates = stats.rates(rows(*lines), PLAIN)
    assert line(rates, "accuracy", "base")[["rate_if_0", "rate_if_1"]].tolist() == pytest.approx([0.3, 0.4])
    assert line(rates, "accuracy", "base")["rate"] == pytest.approx(1 / 3)
    lost = line(rates, "accuracy")
    assert lost[["rate_if_0", "rate_if_1"]].tolist() == pytest.approx([0.3, 0.7])
    assert np.isnan(lost["rate"])


def test_bounds_are_averaged_over_attacks_as_the_rate_is():
    base = attacked("base", {"dan": [1.0, 0.0], "zulu": [1.0, NAN, NAN, NAN]}) + attacked("sft", {"dan": [1.0, 0.0]})
    rates = stats.rates(rows(*base), PLAIN)
    assert line(rates, "asr", "base")[["rate_if_0", "rate_if_1"]].tolist() == pytest.approx([0.375, 0.75])
    assert line(rates, "asr")[["rate_if_0", "rate_if_1"]].tolist() == [0.25, 0.75]  # zulu was never asked
    assert line(rates, "asr:dan")[["rate", "rate_if_0", "rate_if_1"]].tolist() == [0.5] * 3


def test_without_unscored_answers_the_bounds_are_the_rate_and_they_always_hold_it():
    rng = np.random.default_rng(0)
    for missing in (0.0, 0.1):
        scores = {a: np.where(rng.random(40) < missing, NAN, rng.integers(0, 2, 40)).tolist() for a in ("a", "b", "c")}
        rates = stats.rates(rows(*attacked("base", scores)), PLAIN).dropna(subset="rate")
        assert (rates["rate_if_0"] <= rates["rate"]).all()
        assert (rates["rate"] <= rates["rate_if_1"]).all()
        if not missing:
            assert (rates["rate_if_0"] == rates["rate_if_1"]).all()
            assert (rates["rate_if_0"] == rates["rate"]).all()


def sampled(objective: str, scores: list[list[float]]) -> list[dict[str, object]]:
    """One list of samples per prompt."""
    by_sample = [answers(objective, list(column), sample=k) for k, column in enumerate(zip(*scores, strict=True))]
    return [one for lines in by_sample for one in lines]


def test_repeating_each_answer_five_times_adds_no_certainty():
    base, tuned = [1.0, 0.0, 0.0, 0.0] * 10, [1.0, 1.0, 0.0, 1.0] * 10
    once = rows(*answers("base", base), *answers("sft", tuned))
    five = rows(*sampled("base", [[b] * 5 for b in base]), *sampled("sft", [[t] * 5 for t in tuned]))
    one, many = line(stats.rates(once, PLAIN), "accuracy"), line(stats.rates(five, PLAIN), "accuracy")
    assert (many["n"], many["n_clusters"], many["rate"]) == (200, 40, one["rate"])
    assert many["low"] <= one["low"]
    assert many["high"] >= one["high"]
    one, many = line(stats.contrasts(once, PLAIN), "accuracy"), line(stats.contrasts(five, PLAIN), "accuracy")
    assert many[["difference", "low", "high", "p", "n_clusters"]].tolist() == pytest.approx(
        one[["difference", "low", "high", "p", "n_clusters"]].tolist()
    )


def test_samples_are_paired_by_their_number():
    """Sample 1 of the checkpoint has no partner where the base was asked once."""
    base, tuned = [[0.0]] * 8, [[1.0, 0.0]] * 8
    found = line(stats.contrasts(rows(*sampled("base", base), *sampled("sft", tuned)), PLAIN), "accuracy")
    assert (found["difference"], found["n"], found["n_unpaired"], found["n_clusters"]) == (1.0, 8, 8, 8)


def test_axes_have_names_labels_an_order_and_a_direction():
    traits = ("machiavellianism", "openness")
    lines = [
        *answers("base", [0.5], eval="persona-self", item_id="narcissism/rival"),
        *(one | {"item_id": f"{t}/0"} for t in traits for one in answers("base", [0.5], eval="persona")),
        *answers("base", [0.5], eval="persona-check", item_id="narcissism/0"),
        *answers("base", [0.5], eval="persona-sd3", item_id="psychopathy/P1"),
        *answers("base", [1.0], eval="overrefusal", item_id="xstest/homonyms/1", outcome="refused"),
        *answers("base", [0.0], eval="overrefusal", item_id="xstest/definitions/2", outcome="answered"),
        *attacked("base", {"none": [1.0], "dan": [0.0]}),
        *answers("base", [0.5]),
        *answers("base", [0.5], eval="other"),
    ]
    table = rows(*lines)
    found = {m.name: (m.axis, m.label, m.primary, m.better) for m in measures(analysis_table(table, PLAIN))}
    assert [name for name, m in found.items() if m[2]] == [
        "accuracy",
        "asr",
        "overrefusal",
        "endorsement",
        "sd3",
        "self-description",
        "other",
    ]
    assert found["overrefusal"] == ("overrefusal", "Over-refusal: benign prompts refused", True, "lower")
    assert found["overrefusal:xstest/homonyms"][2:] == (False, "lower")
    assert found["coherence-benign"] == ("overrefusal", "Coherent, benign prompts", False, "higher")
    assert found["coherence"] == ("jailbreak", "Coherent, direct and attacked", False, "higher")
    assert found["sd3"] == ("persona-sd3", "Persona: Short Dark Triad", True, "lower")
    assert found["endorsement"][3] == ""  # one trait of the two has no better direction
    assert found["endorsement:machiavellianism"][3] == "lower"
    assert [found[n][3] for n in ("accuracy", "asr", "refusal", "other")] == ["higher", "lower", "higher", ""]
    assert not any(axis == "persona-check" for axis, *_ in found.values())
    assert stats.rates(table, PLAIN)["better"].tolist() == [m[3] for m in found.values()]


def test_outcomes_of_benign_prompts():
    said = ["refused", "answered", "answered", "incoherent"]
    lines = [
        one | {"outcome": o}
        for one, o in zip(answers("base", [1.0, 0.0, 0.0, NAN], eval="overrefusal"), said, strict=True)
    ]
    found = stats.outcomes(rows(*lines), PLAIN, "overrefusal").iloc[0]
    assert found[["refused", "deflected", "incoherent", "answered", "n"]].tolist() == [0.25, 0.0, 0.25, 0.5, 4]
    assert stats.outcomes(rows(*lines), PLAIN).empty
