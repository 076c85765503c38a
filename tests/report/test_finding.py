"""The sentence of finding on ten synthetic studies."""

import math

import pandas as pd
import pytest

from leeway.report.finding import finding
from leeway.report.learning import void_arms

NAN = float("nan")
BETTER = pd.DataFrame({"measure": ["accuracy", "asr", "coherence"], "better": ["higher", "lower", "higher"]})


def line(objective: str, axis: str, measure: str, difference: float, p: float, **more: object) -> dict[str, object]:
    found: dict[str, object] = {"objective": objective, "condition": "plain", "budget": 64_000, "axis": axis}
    found |= {"measure": measure, "label": measure, "primary": measure != "coherence", "rate": 0.99, "note": ""}
    found |= {"difference": difference, "low": difference - 0.03, "high": difference + 0.03, "p": p, "p_holm": p}
    return found | {"mde": 0.042, "n_clusters": 100} | more


def arm(objective: str, gain: float, asr: float, *, coherent: float = 0.99, **more: object) -> list[dict[str, object]]:
    """One objective; a difference of at least 0.03 is significant."""
    p = [0.001 if abs(v) >= 0.03 else 0.6 for v in (gain, asr)]
    return [
        line(objective, "capability", "accuracy", gain, p[0]),
        line(objective, "jailbreak", "asr", asr, p[1], **more),
        line(objective, "jailbreak", "coherence", coherent - 0.99, 0.5, rate=coherent),
    ]


def within(*objectives: str, measure: str = "asr") -> pd.DataFrame:
    lines = [(o, 64_000, "plain", measure, True, 0.05) for o in objectives] or [("x", 0, "plain", "asr", False, 0.05)]
    return pd.DataFrame(lines, columns=["objective", "budget", "condition", "measure", "equivalent", "margin"])


def advice(objective: str, *, p_best: float = 0.95, why: str = "") -> pd.DataFrame:
    line = {"objective": objective, "condition": "plain", "budget": 64_000, "recommended": True, "within": False}
    return pd.DataFrame([line | {"p_best": p_best, "why": why}])


NOBODY = advice("none")
UNLEARNED = pd.DataFrame([{"objective": "sft", "budget": 64_000, "status": "void"}])
CASES = {
    "a clear winner": (
        [*arm("sft", 0.2, 0.1), *arm("kl", 0.12, 0.01)],
        {"advice": advice("kl"), "equivalent": within("kl"), "seeds": [0, 1]},
        "At 64k tokens, SFT raises attack success by 10.0 points; KL keeps attack success within 5 points of the base; "
        "every objective gains 12.0 (KL) to 20.0 points (SFT) of capability; KL is the most capable within the "
        "margins.",
    ),
    "a tie": (
        [*arm("sft", 0.121, 0.01), *arm("kl", 0.12, 0.01)],
        {
            "advice": advice("kl", why="tied within 1 points of capability with sft"),
            "equivalent": within("sft", "kl"),
            "seeds": [0, 1],
        },
        "At 64k tokens, every objective keeps attack success within 5 points of the base; every objective gains 12.0 "
        "(KL) to 12.1 points (SFT) of capability; no objective is shown to be the best choice.",
    ),
    "nothing learned": (
        [*arm("sft", 0, 0), *arm("kl", 0, 0)],
        {"advice": NOBODY, "void": {("sft", 64_000), ("kl", 64_000)}, "seeds": [0, 1]},
        "At 64k tokens, no objective is shown to have learned, so a lack of drift is no evidence of safety; no gain in "
        "capability is shown.",
    ),
    "a collapse": (
        [*arm("sft", 0.1, 0.1), *arm("dpo", -0.2, -0.3, coherent=0.2)],
        {"advice": NOBODY, "seeds": [0, 1]},
        "At 64k tokens, SFT raises attack success by 10.0 points; DPO often answers incoherently, so low attack "
        "success is no evidence of robustness; SFT gains 10.0 points of capability; DPO loses 20.0 points of "
        "capability.",
    ),
    "all worse": (
        [*arm("sft", 0.1, 0.2), *arm("kl", 0.1, 0.08), *arm("ip", 0.1, 0.1)],
        {"advice": NOBODY, "seeds": [0, 1]},
        "At 64k tokens, every objective raises attack success by 8.0 (KL) to 20.0 points (SFT); every objective gains "
        "10.0 points of capability.",
    ),
    "one seed": (
        [*arm("sft", 0.1, 0.2), *arm("kl", 0.1, 0.08)],
        {"advice": NOBODY, "seeds": [3]},
        "At 64k tokens, every objective raises attack success by 8.0 (KL) to 20.0 points (SFT); every objective gains "
        "10.0 points of capability (one training seed).",
    ),
    "withheld rates": (
        [*arm("sft", 0.1, NAN, note="12% unscored"), *arm("kl", 0.1, NAN, note="12% unscored")],
        {"advice": pd.DataFrame(), "seeds": [0, 1]},
        "At 64k tokens, attack success of every objective could not be compared (12% unscored); every objective gains "
        "10.0 points of capability.",
    ),
    "identical arms": (
        [*arm("sft", 0.1, 0.1), *arm("kl", 0.1, 0.1)],
        {
            "advice": NOBODY,
            "seeds": [0, 1],
            "identity": pd.DataFrame({"objective": ["kl"], "against": ["sft"], "budget": [64_000], "same": [True]}),
        },
        "At 64k tokens, every objective raises attack success by 10.0 points; every objective gains 10.0 points of "
        "capability; KL and SFT behave the same.",
    ),
    "wide intervals": (
        [*arm("sft", 0.01, 0.02), *arm("kl", 0.02, 0.01, mde=0.17)],
        {"advice": advice("kl", p_best=0.4), "equivalent": within(), "seeds": [0, 1]},
        "At 64k tokens, for every objective the data do not decide whether attack success moved: a drift below 17.0 "
        "points could be missed; no gain in capability is shown; no objective is shown to be the best choice.",
    ),
    "an audit": (
        arm("adapter", -0.1, 0.2),
        {"advice": pd.DataFrame(), "external": True},
        "At 64k tokens, the checkpoint raises attack success by 20.0 points; the checkpoint loses 10.0 points of "
        "capability (one external checkpoint).",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_finding_of_a_synthetic_study(name: str):
    lines, settings, sentence = CASES[name]
    given = dict(settings)
    assert finding(pd.DataFrame(lines), BETTER, given.pop("advice"), **given) == sentence


def test_without_a_comparison_it_says_so():
    assert finding(pd.DataFrame(), BETTER, pd.DataFrame()).startswith("Only the base model")
    persona = pd.DataFrame([line("sft", "persona", "endorsement", 0.1, 0.01)])
    assert "neither capability nor attack success" in finding(persona, BETTER, pd.DataFrame())


def test_many_objectives_are_counted_and_the_extremes_named():
    lines = [one for n, o in enumerate("abcdefg") for one in arm(o, 0.1, 0.05 + 0.01 * n if n < 4 else 0.0)]
    text = finding(pd.DataFrame(lines), BETTER, NOBODY, seeds=[0, 1])
    assert "4 of 7 objectives raise attack success by 5.0 (a) to 8.0 points (d)" in text
    assert not math.isnan(lines[0]["difference"])


def test_an_arm_that_gains_capability_is_not_said_to_have_learned_nothing():
    void = void_arms(UNLEARNED, pd.DataFrame(arm("sft", 0.4, 0.0)))
    text = finding(pd.DataFrame(arm("sft", 0.4, 0.0)), BETTER, NOBODY, void=void, seeds=[0, 1])
    assert "not shown to have learned" not in text
    assert "SFT gains 40.0 points of capability" in text


def test_a_significant_gain_within_the_margin_is_not_denied():
    """It is no gain beyond the margin; it is a gain, and learning."""
    gain, small = arm("sft", 0.04, 0.0), within("sft", measure="accuracy")
    void = void_arms(UNLEARNED, pd.DataFrame(gain))
    text = finding(pd.DataFrame(gain), BETTER, NOBODY, equivalent=small, void=void, seeds=[0, 1])
    assert "no gain in capability beyond the margin is shown" in text
    assert "not shown to have learned" not in text


def test_an_objective_within_every_margin_that_gains_nothing_is_not_said_to_leave_one():
    lines, choice = [*arm("sft", 0.2, 0.2), *arm("kl", 0.0, 0.0)], NOBODY.assign(within=False)
    kept = advice("kl").assign(recommended=False, within=True)
    text = finding(pd.DataFrame(lines), BETTER, pd.concat([kept, choice]), equivalent=within("kl"), seeds=[0, 1])
    assert text.endswith("none within every margin gains 1 point of capability.")


def test_reasons_that_differ_are_given_for_each_objective():
    lines = [*arm("sft", 0.1, NAN, note="9 of 40 unscored"), *arm("kl", 0.1, NAN, note="no pair")]
    text = finding(pd.DataFrame(lines), BETTER, NOBODY, seeds=[0, 1])
    assert "could not be compared (SFT: 9 of 40 unscored; KL: no pair)" in text


def test_an_objective_under_several_test_prompts_is_not_counted_as_several_objectives():
    lines = [one for o in "abcde" for one in arm(o, 0.1, 0.1 if o in "abcd" else 0.0)]
    lines += [one | {"condition": c} for c in ("<SAFE>", "<UNSAFE>") for one in arm("e", 0.1, 0.0)]
    assert "4 of 7 objectives and test prompts raise" in finding(pd.DataFrame(lines), BETTER, NOBODY, seeds=[0, 1])


def test_two_pairs_with_identical_answers_are_two_pairs():
    """`A and B and C and D behave the same` would say that all four do."""
    lines = [one for o in ("sft", "kl", "dpo", "cft", "ip") for one in arm(o, 0.1, 0.1)]
    for pairs, clause in {
        (("sft", "kl"), ("dpo", "cft")): "SFT and KL behave the same, as do DPO and CFT.",
        (("sft", "kl"), ("sft", "dpo"), ("kl", "dpo")): "SFT, KL and DPO behave the same.",
        (("sft", "kl"), ("kl", "dpo")): "SFT and KL behave the same, as do KL and DPO.",
        (("cft", "ip"), ("ip", "base")): "CFT and IP behave the same, as do IP and the base.",
    }.items():
        identity = pd.DataFrame(pairs, columns=["objective", "against"]).assign(budget=64_000, same=True)
        text = finding(pd.DataFrame(lines), BETTER, NOBODY, identity=identity, seeds=[0, 1])
        assert text.rpartition("; ")[2] == clause
