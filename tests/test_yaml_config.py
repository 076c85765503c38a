"""YAML in every file that people write: hostile texts are refused quickly in one line, values round-trip."""

from __future__ import annotations

import itertools
import time
import warnings
from pathlib import Path

import pytest

from leeway.attacks import load_templates
from leeway.claims.schema import load as load_claims
from leeway.errors import LeewayError
from leeway.gate.rules import load as load_rules
from leeway.study.load import load as load_study
from leeway.study.load import parse
from leeway.yaml_config import dump, read

LETTERS = "abcdefghijklmnop"


def bomb(first: str, join: str) -> str:
    """Ten aliases of the level before on each of 12 levels: 10¹² values."""
    levels = [f"a: &a {first}"]
    levels += [
        f"{one}: &{one} " + join.format(", ".join([f"*{before}"] * 10))
        for before, one in itertools.pairwise(LETTERS[:12])
    ]
    return "\n".join(levels) + "\n"


def doubled(levels: int) -> str:
    """Few aliases, and 2^levels values."""
    return "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, levels))


HOSTILE = {
    "aliases": (bomb("[x]", "[{}]"), "values"),
    "merge keys": (bomb("{x: 1}", "{{<<: [{}]}}"), "values"),
    "few aliases": (doubled(40), "values"),
    "a list in itself": ("a: &a [*a]\n", "contains it"),
    "a mapping in itself": ("&a {name: *a}\n", "contains it"),
    "a key that is its mapping": ("&a {*a : 1}\n", "contains it"),
    "deep flow": ("a: " + "[" * 100 + "]" * 100, "nested deeper than 50 levels"),
    "very deep flow": ("a: " + "[" * 5_000 + "]" * 5_000, "nested deeper than 50 levels"),
    "very deep, open": ("a: " + "[" * 50_000, "nested deeper than 50 levels"),
    "deep mappings": ("a: " + "{a: " * 3_000 + "}" * 3_000, "nested deeper than 50 levels"),
    "a long line": ("a: " + "x" * (9 << 20), "over 8 MiB of text"),
    "deep block": ("".join(" " * n + "a:\n" for n in range(3_000)), "nested too deep"),
}
READERS = {
    "study": load_study,
    "claims": load_claims,
    "rules": lambda path: load_rules(Path(path)),
    "attacks": load_templates,
}


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_yaml_is_refused_quickly(name: str, kind: str, tmp_path: Path) -> None:
    text, words = HOSTILE[name]
    path = tmp_path / "file.yaml"
    path.write_text(text)
    began = time.monotonic()
    with pytest.raises(LeewayError, match=words) as found:
        READERS[kind](str(path))
    assert time.monotonic() - began < 5
    assert "\n" not in str(found.value)
    assert len(str(found.value)) < 500


@pytest.mark.parametrize("value", ["&a [*a]", "[" * 3_000 + "]" * 3_000, "{" + doubled(40).replace("\n", ", ") + "}"])
def test_a_hostile_override_is_refused(value: str) -> None:
    with pytest.raises(LeewayError, match="override 'budgets="):
        parse("name: x", "x", (f"budgets={value}",))


@pytest.mark.parametrize(
    "value", ["!!bool x", "!!timestamp x", "!!int x", "!!binary a", "!!null x", "!!python/none ''"]
)
def test_a_tag_that_does_not_fit_its_value(value: str) -> None:
    with pytest.raises(LeewayError, match=r"^study[:,]") as found:
        parse(f"name: {value}\n", "study")
    head, *faults = str(found.value).split("\n")
    assert not faults or head == f"study: {len(faults)} faults"


@pytest.mark.parametrize("value", ["[[" + "7, " * 4_000 + "7]]", f"[{'a/' * 3_000}a]"])
def test_a_long_value_is_not_quoted_whole(value: str) -> None:
    with pytest.raises(LeewayError) as found:
        parse(f"name: x\nmodel: organism\ntask: organism\nobjectives: {value}\nbudgets: [1k]", "x")
    assert "objectives: " in str(found.value)
    assert len(str(found.value)) < 2_500


@pytest.mark.parametrize("key", ["kind", "id"])
def test_a_long_value_of_a_claim_is_not_quoted_whole(key: str, tmp_path: Path) -> None:
    (tmp_path / "claims.yaml").write_text(f"[{{id: a, {key}: [{'7, ' * 4_000}7]}}]".replace("id: a, id", "id"))
    with pytest.raises(LeewayError, match=r"no kind|kind is missing") as found:
        load_claims(str(tmp_path / "claims.yaml"))
    assert len(str(found.value)) < 1_500


def test_an_override_of_thousands_of_levels() -> None:
    with pytest.raises(LeewayError, match="more than 20 levels"):
        parse("name: x", "x", (".".join(["a"] * 5_000) + "=1",))


def test_aliases_and_merges_of_plain_size_are_read() -> None:
    text = "a: &a {x: 1, y: [1, 2]}\nb: {<<: *a, x: 2}\nc: [*a, *a]\n"
    a = {"x": 1, "y": [1, 2]}
    assert read(text, "x") == {"a": a, "b": {"x": 2, "y": [1, 2]}, "c": [a, a]}
    assert read("", "x") is None
    assert read("a: " + "[" * 49 + "]" * 49, "x")
    assert len(read("\n".join(f"- {n}" for n in range(50_000)), "x")) == 50_000


def test_an_anchor_that_is_given_again_is_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read("a: &a 1\nb: &a 2\nc: *a\n", "x") == {"a": 1, "b": 2, "c": 2}


def test_yes_and_no_are_text_and_true_and_false_are_not() -> None:
    assert read("[yes, no, on, off, true, False]", "x") == ["yes", "no", "on", "off", True, False]


def test_what_is_written_is_read_back() -> None:
    texts = ["1e5", "no", "0x1", "2024-01-02", "~", "a: b", "two\nlines\n", "\\left(" + "\\frac{a}{b} " * 40]
    value = {"z": texts, "a": {"empty": {}, "none": None, "small": 3e-05}}
    assert read(dump(value), "x") == read(dump(value, flow=True), "x") == value
    assert list(read(dump(value), "x")) == ["z", "a"]
