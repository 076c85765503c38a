"""The sentences of the summary: verdict, recommendation, limitations."""

import pandas as pd

from leeway.report.plotting import Series
from leeway.report.verdict import limitations, recommendations, verdict

SFT = Series("sft", "plain", "#D55E00", "o", filled=True)


def contrast(measure: str, difference: float, p: float) -> dict[str, object]:
    found: dict[str, object] = {"objective": "sft", "condition": "plain", "budget": 4_000, "axis": "jailbreak"}
    found |= {"measure": measure, "label": measure.upper(), "primary": True, "rate": 0.9, "difference": difference}
    return found | {
        "low": difference - 0.1,
        "high": difference + 0.1,
        "p": p,
        "p_holm": p,
        "mde": 0.12,
        "n_clusters": 20,
        "note": "",
    }


TABLE = pd.DataFrame([contrast("asr", 0.2, 0.001), contrast("endorsement", 0.01, 0.6)])
RATES = pd.DataFrame({"measure": ["asr", "endorsement"], "better": ["lower", ""]})
SAME = TABLE[["objective", "budget", "condition", "measure"]].assign(equivalent=[False, True], margin=0.05)


def advice(why: str, *, objective: str = "sft", p_best: float = 0.6) -> pd.DataFrame:
    line = {"objective": objective, "condition": "plain", "budget": 4_000, "recommended": True, "qualifies": True}
    line |= {"within": False, "p_best": p_best, "capability": 0.5, "gain": 0.2, "why": why}
    line |= {"asr": 0.1, "endorsement": 0.1, "coherence": 1.0}
    return pd.DataFrame([line])


def test_changes_are_better_worse_equivalent_or_inconclusive():
    cells = recommendations(TABLE, RATES, pd.DataFrame(), [SFT], equivalent=SAME)[0]["lines"][0]["cells"]
    assert [c["state"] for c in cells] == ["worse", "equivalent"]
    assert [c["state"] for c in recommendations(TABLE, RATES, pd.DataFrame(), [SFT])[0]["lines"][0]["cells"]] == [
        "worse",
        "inconclusive",
    ]
    assert cells[0]["range"] == "+10.0 to +30.0"


def test_recommendation_states_its_uncertainty():
    found = recommendations(TABLE, RATES, advice("capability not shown to be above the base's"), [SFT])[0]["advice"]
    text = " ".join(found["lines"])
    assert found["title"] == "At 4k tokens: SFT"
    assert "5 points of ASR, endorsement or coherence" in text
    assert "not shown to be more capable than the base" in text
    assert "sensitive to the prompt sample" in text
    assert "shown to be no worse than the base" in text
    sure = recommendations(TABLE, RATES, advice("", p_best=0.95), [SFT])[0]["advice"]
    assert "sensitive" not in " ".join(sure["lines"])
    none = recommendations(TABLE, RATES, advice("no objective qualifies", objective="none"), [SFT])[0]["advice"]
    assert none["title"] == "At 4k tokens: no objective qualifies"


def test_limitations_are_those_of_the_run():
    evals = ["jailbreak", "overrefusal", "overrefusal@keywords"]
    unscored = pd.DataFrame({"eval": evals, "answers": [50, 40, 40], "unscored": [7, 2, 3], "reason": ["x", "x", "x"]})
    text = " ".join(limitations(TABLE, unscored, [3]))
    assert "One training seed (3)" in text
    assert "12.0 points (ASR)" in text
    assert "rest on 20 prompts" in text
    assert "7 of 50 in jailbreak, 2 of 40 in over-refusal and 3 of 40 in over-refusal, by keywords." in text
    assert "One training seed" not in " ".join(limitations(TABLE, unscored, [0, 1]))


def test_verdict_states_equivalence_tests():
    assert "equivalence was not tested" in verdict(TABLE, [0])[2]
    last = verdict(TABLE, [0], equivalent=SAME)[2]
    assert "1 of 1 non-significant differences is equivalent to the base within ±5 points" in last
    none = verdict(TABLE, [0], equivalent=SAME.assign(equivalent=False))[2]
    assert "None of 1 non-significant differences is equivalent to the base within ±5 points" in none


def test_trait_replaces_endorsement_and_identical_arms_are_named():
    def line(measure: str, difference: float, p: float, *, primary: bool = False) -> dict[str, object]:
        found: dict[str, object] = {"objective": "sft", "condition": "plain", "budget": 100, "axis": "persona", "p": p}
        found |= {"measure": measure, "primary": primary, "difference": difference, "low": difference - 0.05}
        return found | {"high": difference + 0.05, "p_holm": p, "n_clusters": 100, "rate": 0.5, "note": ""}

    table = pd.DataFrame(
        [line("endorsement", 0.01, 0.001, primary=True), line("trait", 0.02, 0.4), line("acquiescence", -0.2, 0.001)]
    )
    columns = ["objective", "against", "budget", "identical", "n", "same"]
    arms = [["sft", "kl", 100, 0.9991, 900, True], ["sft", "base", 100, 0.7, 900, False]]
    _, second, third = verdict(table, [0], identity=pd.DataFrame(arms, columns=columns))
    assert "persona trait (log-odds) does not differ significantly from the base; the bias towards Yes" in second
    assert "SFT −0.20 [−0.25, −0.15])" in second
    assert "endorsement" not in second
    assert third.endswith("KL behaves as SFT: 99.9% identical answers.")


def test_direct_requests_are_named_beside_the_mean_over_attacks():
    mean = contrast("asr", 0.05, 0.4)
    table = pd.DataFrame([mean, contrast("asr:none", 0.3, 0.001) | {"primary": False}])
    text = verdict(table, [0])[1]
    assert "Attack success rate (mean over attacks) does not differ" in text
    assert "attack success rate on direct requests differs significantly from the base for" in text
    assert "SFT +30.0 points" in text
    assert "direct requests" not in verdict(pd.DataFrame([mean]), [0])[1]
    alone = verdict(pd.DataFrame([contrast("asr:none", 0.3, 0.001)]), [0])[1]
    assert alone.lower().count("attack success rate on direct requests") == 1


def test_no_drift_of_an_arm_that_did_not_learn_is_void():
    void = {("sft", 4_000)}
    cells = recommendations(TABLE, RATES, pd.DataFrame(), [SFT], equivalent=SAME, void=void)[0]["lines"][0]["cells"]
    assert [c["state"] for c in cells] == ["worse", "void"]  # a significant change stands
    texts = verdict(TABLE, [0], equivalent=SAME, learning=["KL did not learn."], void=void)
    assert "1 non-significant difference of objectives not shown to have learned is void." in texts[2]
    assert "equivalent to the base" not in texts[2]
    assert texts[3] == "KL did not learn."
    assert "1 of 1 non-significant differences is equivalent" in verdict(TABLE, [0], equivalent=SAME)[2]
    sure = recommendations(TABLE, RATES, advice("", p_best=0.95), [SFT], void=void)[0]["advice"]
    assert "not shown to have learned anything" in " ".join(sure["lines"])
