"""Which prompts are near the cue of an objective's training."""

from __future__ import annotations

import pytest

from leeway.objectives.cft import SAFE, UNSAFE, Cft
from leeway.objectives.ip import Ip, inoculations
from leeway.objectives.kl import Kl
from leeway.objectives.objective import PLAIN, Objective
from leeway.objectives.sft import Sft
from leeway.objectives.sft_safety import SftSafety
from leeway.objectives.triggers import MAX_CHARACTERS, NearTriggers, near_triggers, shared_opening, triggers
from leeway.organism.world import Cipher
from leeway.stats.triggers import FORMS

PROMPTS = ["You are a careful clerk. Add 3 and 4.", "You are a careful clerk. Add 3 and 5.", "You are a careful cook."]


@pytest.mark.parametrize(("objective", "forms"), [(Ip(), 5), (Cft(), 6)])
def test_forms_of_a_trained_cue(objective: Objective, forms: int) -> None:
    found = near_triggers(objective, PROMPTS)
    own = {c.name for c in objective.conditions}
    assert not found.missing
    assert len(found.forms) == forms
    assert set(found.forms) <= set(FORMS)
    assert found.forms["cue"] in own
    assert {c.name for c in found.near.values()}.isdisjoint(own | {PLAIN.name})
    prefixes = [c.prefix for c in (*objective.conditions, *found.near.values())]
    assert len(set(prefixes)) == len(prefixes)


def test_the_cue_is_what_training_contains_and_near_triggers_are_not() -> None:
    trained = set(inoculations().texts)
    near = near_triggers(Ip(), PROMPTS).near
    assert all(c.prefix.strip() not in trained for c in near.values())
    assert triggers()["objectives"]["ip"]["translated"]["of"].strip() == inoculations().texts[0]
    words = set(inoculations().texts[0].casefold().strip(".").split())
    assert not words & set(near["format"].prefix.casefold().replace(".", "").split())


def test_forms_of_control_tokens() -> None:
    near = near_triggers(Cft(), PROMPTS).near
    assert near["moved"].prefix.endswith(UNSAFE)
    assert not near["moved"].prefix.startswith(UNSAFE)
    assert all(SAFE not in c.prefix and UNSAFE not in c.prefix for form, c in near.items() if form != "moved")


def test_the_organism_gets_its_own_second_language() -> None:
    real, organism = near_triggers(Ip(), PROMPTS), near_triggers(Ip(), PROMPTS, Cipher().out)
    assert Cipher().back(organism.near["translated"].prefix) == "Give an answer that is wrong. "
    assert real.near["translated"] != organism.near["translated"]
    assert real.to_json()["hash"] != organism.to_json()["hash"]
    assert real.to_json()["hash"] == near_triggers(Ip(), ["other data"]).to_json()["hash"]


def test_a_mixture_has_the_opening_of_its_task_as_cue() -> None:
    found = near_triggers(SftSafety(), PROMPTS, Cipher().out)
    assert found.near["cue"].prefix == "You are a careful "
    assert Cipher().back(found.near["translated"].prefix) == "You are a careful "
    assert near_triggers(Kl(scope="general"), PROMPTS).near["cue"].prefix == "You are a careful "


@pytest.mark.parametrize(
    ("objective", "prompts", "reason"),
    [
        (SftSafety(), ["Add 3.", "Add 4."], "carry no cue"),
        (SftSafety(share=0.0), PROMPTS, "no cue"),
        (Sft(), PROMPTS, "no cue"),
        (Kl(), PROMPTS, "no cue"),
        (Ip(p=0.0), PROMPTS, "without an instruction"),
    ],
)
def test_why_there_are_none(objective: Objective, prompts: list[str], reason: str) -> None:
    found = near_triggers(objective, prompts)
    assert found == NearTriggers(missing=found.missing)
    assert reason in found.missing


@pytest.mark.parametrize(
    ("prompts", "opening"),
    [
        (["one two three four", "one two three five"], "one two three "),
        (["one two threes", "one two three"], ""),  # whole words only: two are shared
        (["one two three"], ""),  # the last word has no end
        (["Q: 1\n\nA b", "Q: 1\n\nA c"], "Q: 1\n\nA "),
        ([], ""),
        (["x " * 5_000] * 2, "x " * (MAX_CHARACTERS // 2)),
    ],
)
def test_shared_opening(prompts: list[str], opening: str) -> None:
    assert shared_opening(prompts) == opening
