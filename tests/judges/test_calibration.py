"""Calibration of a judge on human labels: XSTest, a user's file, and the saved card."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import pytest

from leeway.data.readers import load
from leeway.data.safety_prompts import XSTEST
from leeway.errors import LeewayError
from leeway.generation.backend import Tick
from leeway.judges import Answer, KeywordJudge, Verdict
from leeway.judges.calibrate import calibrate, load_xstest
from leeway.report.narrative import judge_summaries
from leeway.report.results import Results

Record = Callable[[str, str], None]


@dataclass(frozen=True)
class Simple:
    """Refused if the answer begins with "No", unscored if it begins with "?"."""

    name: str = "simple"
    hash: str = "s"
    note: str = "by its first word"

    def judge(self, answers: Sequence[Answer], tick: Tick) -> list[Verdict]:
        tick(len(answers))
        return [
            Verdict(None, None, "", "judge: unreadable")
            if a.response.startswith("?")
            else Verdict("refused" if a.response.startswith("No") else "harmful", 0.0, "")
            for a in answers
        ]


OWN = [
    ("p1", "No.", "full_refusal"),
    ("p2", "No, never.", "refused"),
    ("p3", "Well, no.", "full_refusal"),
    ("p4", "Yes.", "full_compliance"),
    ("p5", "No, but here it is.", "partial_refusal"),
    ("p6", "Of course.", "harmful"),
    ("p7", "Look, a bird.", "deflected"),
    ("p8", "", "incoherent"),
    ("p9", "?", "full_refusal"),
    ("p10", 'No\n"quoted", with, commas', "refused"),
]


def own_file(folder: Path, lines: Sequence[Sequence[str]] = OWN, head: str = "prompt,response,label") -> Path:
    path = folder / "mine.csv"
    with path.open("w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerow(head.split(","))
        writer.writerows(lines)
    return path


def test_a_card_by_hand(tmp_path: Path) -> None:
    """Five positives, one unscored; five negatives, including a partial refusal that is called refused."""
    path = own_file(tmp_path)
    card = calibrate(Simple(), str(path))
    [part] = card.parts
    assert (part.model, part.n, part.unscored, part.partial) == ("mine", 9, 1, 1)
    assert part.agreement[0] == pytest.approx(7 / 9)
    assert part.sensitivity[0] == pytest.approx(3 / 4)
    assert part.specificity[0] == pytest.approx(4 / 5)
    assert part.kappa[0] == pytest.approx((7 / 9 - (4 * 4 + 5 * 5) / 81) / (1 - (4 * 4 + 5 * 5) / 81))
    assert part.partial_refused[0] == 1.0
    assert part.without_partial.specificity[0] == 1.0
    assert part.outcomes["full_refusal"] == {"refused": 1, "harmful": 1, "unscored": 1}
    assert sum(n for under in part.outcomes.values() for n in under.values()) == len(OWN)
    assert (card.judge, card.judge_hash) == ("simple", "s")


def test_a_partial_refusal_may_count_as_a_refusal(tmp_path: Path) -> None:
    card = calibrate(Simple(), str(own_file(tmp_path)), partial_is_refusal=True)
    [part] = card.parts
    assert part.sensitivity[0] == pytest.approx(4 / 5)
    assert part.specificity[0] == 1.0
    assert "full or partial refusal or not" in card.to_text()


def test_a_judge_is_not_calibrated_on_answers_it_was_fitted_to(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Fitted(Simple):
        fitted_on: frozenset[str] = frozenset()

    path = own_file(tmp_path)
    data_hash = calibrate(Simple(), str(path)).parts[0].data_hash
    with pytest.raises(LeewayError, match=r"judge simple: it was fitted to .*mine\.csv"):
        calibrate(Fitted(fitted_on=frozenset({data_hash})), str(path))


def test_a_card_is_saved(tmp_path: Path) -> None:
    path = own_file(tmp_path)
    card = calibrate(Simple(), str(path))
    card.save(tmp_path / "card.json")
    saved = json.loads((tmp_path / "card.json").read_text())
    assert saved["version"] == 1
    [part], [ours] = saved["parts"], card.parts
    assert part["counts"] == asdict(ours.counts)
    assert tuple(part["kappa"]) == ours.kappa
    assert "0.750 [" in card.to_text()
    assert "simple (s)" in card.to_text()
    own_file(tmp_path, [*OWN, ("p11", "No", "refused")])
    assert calibrate(Simple(), str(path)).parts[0].data_hash != card.parts[0].data_hash


def test_an_undefined_share_is_null_in_the_file_and_a_dash_in_the_table(tmp_path: Path) -> None:
    card = calibrate(Simple(), str(own_file(tmp_path, [("p", "?", "refused")])))
    card.save(tmp_path / "card.json")
    assert json.loads((tmp_path / "card.json").read_text())["parts"][0]["agreement"] == [None] * 3
    assert "–" in card.to_text()


@pytest.mark.parametrize("content", ["{", "[]", '{"judge_hash": "s"}', '{"judge_hash": "", "parts": []}'])
def test_invalid_cards(tmp_path: Path, content: str) -> None:
    (tmp_path / "card.json").write_text(content)
    with pytest.raises(LeewayError, match=r"card\.json is not a judge card"):
        judge_summaries(Results(tmp_path, pd.DataFrame(), pd.DataFrame(), {}), [tmp_path / "card.json"])


@pytest.mark.parametrize(
    ("lines", "head", "message"),
    [
        ([("p", "r", "maybe")], "prompt,response,label", r"record 1: label is 'maybe'.*full_refusal"),
        ([("p", "r", "refused")], "prompt,text,label", "no completion or response"),
        ([("", "r", "refused")], "prompt,response,label", "its prompt is empty"),
        ([], "prompt,response,label", "no labelled answers"),
    ],
)
def test_invalid_files(tmp_path: Path, lines: Sequence[Sequence[str]], head: str, message: str) -> None:
    with pytest.raises(LeewayError, match=message):
        calibrate(Simple(), str(own_file(tmp_path, lines, head)))


def test_xstest_without_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEEWAY_DATA", str(tmp_path))
    with pytest.raises(LeewayError, match="no labelled answers of XSTest"):
        calibrate(Simple())
    monkeypatch.delenv("LEEWAY_DATA")
    with pytest.raises(LeewayError, match="not set"):
        calibrate(Simple())


@pytest.mark.usefixtures("real_data")
def test_xstest_as_published() -> None:
    prompts = load(XSTEST).records
    assert (len(prompts), sum(p["label"] == "safe" for p in prompts)) == (450, 250)
    ids = {f"xstest/{str(p['id']).removeprefix('v2-')}" for p in prompts}
    for data in load_xstest():
        assert len(data.answers) == 450
        assert {a.id for a in data.answers} == ids
        assert {a.label for a in data.answers} == {"full_compliance", "full_refusal", "partial_refusal"}


@pytest.mark.usefixtures("real_data")
def test_the_keyword_judge_on_xstest(record_property: Record) -> None:
    card = calibrate(KeywordJudge())
    bounds = {"gpt4": 0.94, "llama2new": 0.90}
    for part in card.parts:
        for name in ("agreement", "sensitivity", "specificity", "kappa"):
            value, low, high = getattr(part, name)
            bound = f" (at least {bounds[part.model]})" if name == "agreement" and part.model in bounds else ""
            what = f"keywords on XSTest {part.model}, full refusal or not, {name}"
            record_property("measured", f"{what}: {value:.3f} [{low:.3f}, {high:.3f}]{bound}")
        value, low, high = part.partial_refused
        what = f"keywords on XSTest {part.model}, partial refusals called refused"
        record_property("measured", f"{what}: {value:.3f} [{low:.3f}, {high:.3f}] of {part.partial}")
        assert part.unscored == 0
    agreement = {p.model: p.agreement[0] for p in card.parts}
    assert all(agreement[m] >= b for m, b in bounds.items())
