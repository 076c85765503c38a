"""Claims in a study: read, checked all at once before anything is trained, and part of the study's identity."""

from __future__ import annotations

import pytest

from leeway import yaml_config
from leeway.claims.evaluate import TESTS
from leeway.claims.schema import BUNDLED, KINDS, NoDrift, build, from_manifest, hash_claims, load, to_manifest
from leeway.errors import LeewayError
from leeway.study.eval_spec import measure_names
from leeway.study.load import load as load_study
from leeway.study.load import parse

STUDY = """
name: x
model: organism
task: {name: organism}
objectives: [sft, dpo, {my-orpo: {orpo: {weight: 0.2}}}]
budgets: [1k, 2k, 4k]
evals:
  capability: [organism]
  persona: {source: organism}
  jailbreak: {prompts: organism, attacks: [none, dan], judge: organism}
"""
ONE = "{id: a, statement: It stays., kind: no_drift, measure: endorsement, objectives: my-orpo, margin: 0.02}"


def fault(claims: str) -> str:
    with pytest.raises(LeewayError) as found:
        parse(STUDY, "x.yaml", (f"claims={claims}",))
    head, *faults = str(found.value).split("\n")
    assert not faults or head == f"x.yaml: {len(faults)} faults"
    return str(found.value)


def test_a_study_without_claims_has_the_hash_it_had():
    plain = parse(STUDY, "x")
    assert "claims" not in yaml_config.load(plain.to_yaml())
    assert parse(STUDY, "x", ("claims=null",)).hash == plain.hash


def test_claims_are_part_of_the_study():
    """Any change of a claim, its sentence too, is another study; the resolved study says all and comes back."""
    whole = parse(STUDY, "x", (f"claims=[{ONE}]",))
    assert whole.hash != parse(STUDY, "x").hash
    for change in (("0.02", "0.03"), ("It stays.", "It stayed."), ("id: a", "id: b")):
        assert parse(STUDY, "x", (f"claims=[{ONE.replace(*change)}]",)).hash != whole.hash
    again = parse(whole.to_yaml(), "x")
    assert again.hash == whole.hash
    assert again.claims is not None
    assert whole.claims is not None
    assert again.claims.hash == whole.claims.hash == hash_claims(yaml_config.load(whole.to_yaml())["claims"])
    assert (
        type(whole).model_validate(whole.model_dump(mode="json", by_alias=True)).hash == whole.hash
    )  # as workers get it


def test_a_file_is_found_beside_the_study_and_one_in_an_override_from_where_the_user_is(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "study.yaml").write_text(STUDY + "claims: mine.yaml\n", "utf-8")
    (tmp_path / "there" / "mine.yaml").write_text(f"[{ONE}]", "utf-8")
    (tmp_path / "other.yaml").write_text(f"{{name: other, version: 3, claims: [{ONE}]}}", "utf-8")
    monkeypatch.chdir(tmp_path)
    beside = load_study("there/study.yaml").claims
    elsewhere = load_study("there/study.yaml", ("claims=other.yaml",)).claims
    assert beside is not None
    assert elsewhere is not None
    assert (beside.name, elsewhere.name, elsewhere.version) == ("claims", "other", 3)
    with pytest.raises(
        LeewayError, match=r"claims: nil\.yaml: neither a file .* nor a bundled set; give a file, or one of"
    ):
        load_study("there/study.yaml", ("claims=nil.yaml",))
    with pytest.raises(LeewayError, match="did you mean 'objective-matters'"):
        load_study("there/study.yaml", ("claims=objective-matter",))


def test_all_faults_of_all_claims_at_once():
    message = fault("[{id: a, kind: no_drift, measur: asr, objectives: sft, margin: 2}, {id: b, kind: movs}, 3]")
    for part in (
        "a: statement is missing",
        "a: measure is missing",
        "a: margin: input should be less than 1",
        "a: unknown key 'measur'; did you mean 'measure'?",
        "b: no kind 'movs'; did you mean 'moves'?",
        "claim 3 is 3, not a mapping",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (("my-orpo", "my-orp"), "a: 'my-orp' is not an objective of this study; did you mean 'my-orpo'?"),
        (("endorsement", "endorsment"), "a: 'endorsment' is not measured here; did you mean 'endorsement'?"),
        (("endorsement", "sd3"), "a: 'sd3' is not measured here"),
        (
            ("margin: 0.02", "margin: 0.02, at: 3k"),
            "a: 3000 is not a budget of this study (there are: 1,000, 2,000, 4,000)",
        ),
        (("margin: 0.02", "margin: 0.02, at: 0.3"), "a: 0.3 is not a budget of this study"),
        (("margin: 0.02", "margin: 0.02, up_to: 0.1"), "a: no budget between 0 and 400"),
        (("margin: 0.02", "margin: 0.02, at: 1k, from: 2k"), "a: at lists budgets, from and up_to give a range"),
        (("margin: 0.02", "margin: 0.02, at: middle"), "is not a budget: give 200k, a share of the largest (0.25)"),
        (("objectives: my-orpo", "objectives: [sft, sft]"), "a: objectives: 'sft' is listed twice"),
        (("margin: 0.02", "margin: 0"), "a: margin: input should be greater than 0"),
    ],
)
def test_what_a_study_lacks_is_an_error_before_training(change: tuple[str, str], part: str):
    assert part in fault(f"[{ONE.replace(*change)}]")


def test_a_claim_may_allow_for_what_is_absent():
    claims = parse(
        STUDY, "x", (f"claims=[{ONE.replace('my-orpo', 'kl').replace('id:', 'if_absent: inconclusive, id:')}]",)
    ).claims
    assert claims is not None
    set_wide = f"{{if_absent: inconclusive, claims: [{ONE.replace('my-orpo', 'kl')}]}}"
    again = parse(STUDY, "x", (f"claims={set_wide}",)).claims
    assert again is not None
    assert again.hash == claims.hash


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ({}, (25, 50, 100, 200, 400, 800)),
        ({"at": "largest"}, (800,)),
        ({"at": ["smallest", 0.25]}, (25, 200)),
        ({"up_to": 0.25}, (25, 50, 100, 200)),
        ({"from": 0.5}, (400, 800)),
        ({"from": 50, "up_to": 0.25}, (50, 100, 200)),
    ],
)
def test_budgets_are_named_in_tokens_or_as_shares_of_the_largest(places: dict[str, object], expected: tuple[int, ...]):
    claim = NoDrift.model_validate(
        {"id": "a", "statement": "x", "kind": "no_drift", "measure": "asr", "objectives": ["sft"], "margin": 0.05}
        | places
    )
    budgets = (25, 50, 100, 200, 400, 800)
    assert claim.budgets_of(budgets) == (expected, "")
    if all(not isinstance(p, int) for p in places.values()):  # shares mean the same in a study scaled down
        scaled = tuple(b * 1000 for b in budgets)
        assert claim.budgets_of(scaled)[0] == tuple(b * 1000 for b in expected)


@pytest.mark.parametrize("name", BUNDLED)
def test_the_bundled_sets_fit_the_demo_and_say_where_each_claim_is_from(name: str):
    claims = load(name)
    assert all(c.source and c.assumptions for c in claims.claims)
    demo = load_study("demo", (f"claims={name}",))
    budgets = [
        f
        for c in claims.claims
        for f in c.absent([o.alias for o in demo.objectives], [*measure_names(demo.evals)], demo.budgets)
    ]
    assert budgets == []
    few = load_study("demo", (f"claims={name}", "objectives=[sft, kl]", "budgets=[4k]"))  # works, and says so later
    assert few.claims == claims


def test_what_a_manifest_keeps_comes_back_or_is_refused():
    claims = load("objective-matters")
    kept = to_manifest(claims)
    assert from_manifest(kept) == claims
    kept["list"][0]["margin"] = 0.06
    with pytest.raises(ValueError, match="they do not match their hash"):
        from_manifest(kept)


def test_every_kind_has_a_test():
    assert KINDS.keys() == TESTS.keys()


def test_two_claims_of_one_name():
    with pytest.raises(ValueError, match="two claims have the id a"):
        build(yaml_config.load(f"[{ONE}, {ONE}]"))


def test_the_plan_prints_the_hash_to_publish():
    from leeway.plan.plan import claimed

    study = parse(STUDY, "x", (f"claims=[{ONE}]",))
    assert study.claims is not None
    assert [study.claims.hash in note for note in claimed(study)] == [True]
    assert list(claimed(parse(STUDY, "x"))) == []
