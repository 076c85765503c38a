"""The file of translations: reuse, review, hashes, concurrent writers and invalid lines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from leeway.attacks import AttackFailed, Passage
from leeway.errors import LeewayError
from leeway.evals.attack_helpers import TranslationFile


@dataclass
class Recorder:
    """A translator that records its queries."""

    hash: str = "inner"
    name: str = "inner"
    queries: list[Passage] = field(default_factory=list)

    def help(self, queries: Sequence[Passage]) -> list[str | AttackFailed]:
        self.queries += queries
        return [AttackFailed("lost") if p.text == "bad" else f"{self.hash}:{p.direction}:{p.text}" for p in queries]


A, B, BAD = Passage("out", "a"), Passage("back", "a"), Passage("out", "bad")


def write(path: Path, *entries: dict[str, object]) -> Path:
    path.write_text("".join(json.dumps(e) + "\n" for e in entries), "utf-8")
    return path


def test_a_text_is_translated_once_and_a_failure_again(tmp_path: Path) -> None:
    path, inner = tmp_path / "new" / "zulu.jsonl", Recorder()
    found = TranslationFile(path, inner).help([A, BAD, A, B])
    assert [str(f) for f in found] == ["inner:out:a", "lost", "inner:out:a", "inner:back:a"]
    assert inner.queries == [A, BAD, B]
    again = Recorder()
    assert [str(f) for f in TranslationFile(path, again).help([B, BAD, A])] == ["inner:back:a", "lost", "inner:out:a"]
    assert again.queries == [BAD]
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"direction": d, "source": "a", "text": f"inner:{d}:a", "by": "inner"} for d in ("out", "back")
    ]


def test_without_a_translator_a_missing_text_is_a_failure(tmp_path: Path) -> None:
    path = write(tmp_path / "z.jsonl", {"direction": "out", "source": "a", "text": "b"})
    found = TranslationFile(path).help([A, B])
    assert found[0] == "b"
    assert isinstance(found[1], AttackFailed)
    assert "no translation (back) in z.jsonl" in str(found[1])
    with pytest.raises(LeewayError, match="no such file"):
        TranslationFile(tmp_path / "none.jsonl")


def test_reviewed_lines_serve_any_translator(tmp_path: Path) -> None:
    path = write(
        tmp_path / "z.jsonl",
        {"direction": "out", "source": "a", "text": "first", "by": "inner"},
        {"direction": "out", "source": "a", "text": "read", "by": "inner", "reviewed": True},
        {"direction": "back", "source": "a", "text": "old", "by": "another"},
        {"direction": "out", "source": "c", "text": "machine", "by": "inner"},
        {"direction": "out", "source": "c", "text": "by hand"},
        {"direction": "back", "source": "b", "text": "b", "reviewed": True},
    )
    assert TranslationFile(path, Recorder()).help([A, Passage("back", "b"), Passage("out", "c")]) == [
        "read",
        "b",
        "by hand",
    ]
    other = TranslationFile(path, Recorder("other"))
    assert other.help([A, B]) == ["read", "other:back:a"]  # not the line of another translator


def test_the_hash_covers_reviewed_lines_not_appended_ones(tmp_path: Path) -> None:
    path = write(tmp_path / "z.jsonl", {"direction": "out", "source": "a", "text": "b"})
    one = TranslationFile(path, Recorder())
    one.help([B])
    assert len(path.read_text().splitlines()) == 2
    assert TranslationFile(path, Recorder()).hash == one.hash
    assert TranslationFile(path, Recorder("other")).hash != one.hash
    alone = TranslationFile(path)
    assert alone.hash != one.hash
    write(path, {"direction": "out", "source": "a", "text": "c"})
    assert len({TranslationFile(path, Recorder()).hash, one.hash, TranslationFile(path).hash, alone.hash}) == 4


def test_concurrent_writers_agree(tmp_path: Path) -> None:
    left, right = (
        TranslationFile(tmp_path / "z.jsonl", Recorder()),
        TranslationFile(tmp_path / "z.jsonl", OtherWording()),
    )
    assert left.help([A]) == right.help([A]) == ["inner:out:a"]
    assert len((tmp_path / "z.jsonl").read_text().splitlines()) == 1


class OtherWording(Recorder):
    """A translator of the same hash with other translations."""

    def help(self, queries: Sequence[Passage]) -> list[str | AttackFailed]:
        return [f"drift {p.text}" for p in queries]


def test_a_last_line_without_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "z.jsonl"
    path.write_text('{"direction": "out", "source": "a", "text": "é"}', "utf-8")
    TranslationFile(path, Recorder()).help([B])
    assert TranslationFile(path).help([A, B]) == ["é", "inner:back:a"]


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        (['{"direction": "out"'], "line 1: not JSON"),
        (["[]"], "line 1: not a translation"),
        (['{"direction": "in", "source": "a", "text": "b"}'], "line 1: not a translation"),
        (["", '{"direction": "out", "source": "a", "text": " "}'], "line 2: not a translation"),
        (['{"direction": "out", "source": "a", "text": "b", "reviewed": 1}'], "line 1: reviewed is neither"),
        ([f'{{"direction": "out", "source": "a", "text": "{t}", "reviewed": true}}' for t in "bc"], "line 2: another"),
    ],
)
def test_invalid_lines(tmp_path: Path, lines: list[str], fault: str) -> None:
    path = tmp_path / "z.jsonl"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(LeewayError, match=fault):
        TranslationFile(path, Recorder())
