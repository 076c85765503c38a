"""The study file: every fault at once, the nearest known key, presets that parse."""

from __future__ import annotations

import pytest

from leeway.errors import LeewayError
from leeway.study.parse import load, parse
from leeway.study.presets import PRESETS, preset_text
from leeway.study.spec import Spec

GOOD = """
name: x
model: organism
task: {name: organism}
objectives: [sft, dpo]
budgets: [1k, 2k]
evals: {capability: [organism]}
"""


def fault(text: str, *overrides: str) -> str:
    with pytest.raises(LeewayError) as found:
        parse(text, "x.yaml", overrides)
    assert "\n" not in str(found.value)
    return str(found.value)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_parse_and_come_back_from_their_own_yaml(name: str) -> None:
    spec = parse(preset_text(name), name)
    assert parse(spec.to_yaml(), name).hash == spec.hash


def test_budgets_may_be_written_with_units() -> None:
    assert parse(GOOD, "x", ("budgets=[500, 1.1k, 0.01M]",)).budgets == (500, 1100, 10_000)


def test_all_faults_at_once_with_the_nearest_known_key() -> None:
    message = fault(GOOD + "seedz: [1]\noptim: {lrr: 1, batch: 0}\nadapter: {rank: 3}\n")
    for part in (
        "unknown key 'seedz'; did you mean 'seeds'?",
        "'optim.lrr'; did you mean 'lr'?",
        "optim.batch",
        "unknown key 'adapter.rank'",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("budgets=[2k,1k]", "must rise; write [1000, 2000]"),
        ("budgets=[1k,1k]", "must rise"),
        ("budgets=[1.0005k]", "budgets"),
        ("budgets=[-5]", "budgets"),
        ("objectives=[sft,sft]", "'sft' is listed twice"),
        ("objectives=[sff]", "no objective 'sff'; did you mean 'sft'?"),
        ("objectives=[{orpo: {wieght: 1}}]", "no setting 'wieght'; did you mean 'weight'?"),
        ("objectives=[{ip: {p: 2}}]", "p is 2"),
        ("objectives=[{kl: {towards: up}}]", "reverse or forward"),
        ("objectives=sft", "give a list"),
        ("task={name: gsm9k}", "task.name"),
        ("task={files: {train: a}}", "task.files.test is missing"),
        ("evals={}", "nothing is measured"),
        ("evals={jailbreak: {attacks: [zulu]}}", "zulu needs a translator"),
        ("evals={jailbreak: {judge: organism}}", "use judge: keywords"),
        ("evals={capability: [files]}", "files needs task"),
        ("seeds=[0,0]", "seeds: one is listed twice"),
        ("seeds=[true]", "seeds.0"),
        ("optim.lr=.inf", "optim.lr"),
        ("objectives=[{kl: {weight: .nan}}]", "weight is nan"),
        ("evals={capability: [organism, organism]}", "one is listed twice"),
        ("evals={persona: {traits: [narcissism, narcissism]}}", "one is listed twice"),
        ("budgets=100", "give a list, such as [100]"),
        ("pairs=corrupted", "give a mapping (from, "),
        ("pairs={from: thin-air}", "pairs.from"),
        ("nonsense", "is not an override"),
        ("name.x=1", "override"),
    ],
)
def test_faults_say_what_and_where(override: str, part: str) -> None:
    assert part in fault(GOOD, override)


def test_a_fault_elsewhere_hides_no_other() -> None:
    message = fault(GOOD + "seedz: [1]\n", "budgets=[2k,1k]", "seeds=[0,0]", "objectives=[sft,sft]")
    for part in ("did you mean 'seeds'?", "must rise", "seeds: one is listed twice", "'sft' is listed twice"):
        assert part in message


def test_aliases_run_an_objective_twice() -> None:
    spec = parse(
        GOOD,
        "x",
        ("objectives=[orpo, {orpo-0.2: {orpo: {weight: 0.2}}}, {kl: {weight: 1.0, towards: forward}}]",),
    )
    assert [o.alias for o in spec.objectives] == ["orpo", "orpo-0.2", "kl"]
    assert [getattr(o.build(), "weight", None) for o in spec.objectives] == [0.05, 0.2, 1.0]


def test_scientific_notation_in_an_override_is_a_number() -> None:
    assert parse(GOOD, "x", ("optim.lr=1e-3",)).optim.lr == 1e-3


def test_broken_yaml_is_named_by_its_line() -> None:
    assert "x.yaml, line 3" in fault("name: x\nmodel: [a\ntask: }\n")
    assert "not a study" in fault("[1, 2]")


def test_an_unknown_study_suggests_a_preset() -> None:
    with pytest.raises(LeewayError, match="did you mean 'real-data'"):
        load("real_data")


def test_the_hash_sees_every_setting() -> None:
    spec = parse(GOOD, "x")
    assert spec.hash != parse(GOOD, "x", ("optim.clip=2",)).hash
    assert isinstance(spec, Spec)
