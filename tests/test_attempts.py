"""The hardening campaign notices what it looks for, and its inputs are those of its seed."""

from __future__ import annotations

import pickle
import random
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.hardening import injection, mutations
from benchmarks.hardening.attempts import attempt
from leeway.errors import LeewayError
from leeway.judges import load_judge


def refuse(text: str) -> None:
    raise LeewayError(text, fix="mend it")


def spin() -> None:
    while True:
        pass


def control() -> None:
    error = LeewayError("x")
    error.args = ("\x1b[2J",)
    raise error


@pytest.mark.parametrize(
    ("call", "ended"),
    [
        (lambda: 3, "accepted"),
        (lambda: refuse("a: wrong"), "refused"),
        (lambda: refuse("a" * 10_000), "message"),
        (control, "message"),
        (lambda: 1 / 0, "crash"),
        (spin, "hang"),
        (lambda: Path("outside").touch(), "write"),
        (lambda: socket.create_connection(("127.0.0.1", 9), 0.1), "crash"),
        (lambda: pickle.loads(pickle.dumps(Path.touch)), "pickle"),
    ],
)
def test_endings(call: Callable[[], object], ended: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = attempt(call, tmp_path / "inside", limit_s=0.2)
    assert found.ended == ended
    assert found.failed == (ended not in ("accepted", "refused"))


def test_a_write_into_the_given_folder_is_allowed(tmp_path: Path) -> None:
    assert attempt(lambda: (tmp_path / "a").write_text("x"), tmp_path).ended == "accepted"


def test_mutants_are_those_of_the_seed() -> None:
    text, value = "a: 1\nb: [2, {c: d}]\n", {"a": 1, "b": [2, {"c": "d"}]}
    texts, values = (
        [make(random.Random(n), given) for n in range(200)]  # type: ignore[operator]
        for make, given in ((mutations.mutant_text, text), (mutations.mutant_value, value))
    )
    assert texts == [mutations.mutant_text(random.Random(n), text) for n in range(200)]
    assert len(set(texts)) > 150
    assert value == {"a": 1, "b": [2, {"c": "d"}]}  # the valid one is left as it is
    assert all(isinstance(mutations.as_yaml(v), bytes) for v in values)


def test_injections_are_fifty_and_have_controls() -> None:
    found, neutral, version = injection.load_injections()
    assert (len(found), len({i.id for i in found}), version) == (50, 50, 1)
    assert {i.aim for i in found} == {"up", "down"}
    for i in found:
        assert len(injection.control(neutral, i.text).split()) == min(len(i.text.split()), len(neutral.split()))


def test_the_effect_is_the_change_where_the_text_asks() -> None:
    found, neutral, _ = injection.load_injections()
    by_id = {i.id: i for i in found}
    chosen = [by_id["phrase-down"], by_id["phrase-list-up"], by_id["ignore-down"]]
    effects = injection.measure(load_judge("keywords"), chosen, neutral, 2)
    assert [(e.change, e.followed, e.unscored, e.answers) for e in effects] == [
        (1, 1, 0, 2),
        (1, 1, 0, 2),
        (0, 0, 0, 2),
    ]
    exact = injection.measure(load_judge("organism"), chosen, neutral, 2)
    assert [e.change for e in exact] == [0, 0, 0]
