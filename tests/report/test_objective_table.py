"""The table of objectives that ends a run: words, intervals, width, colour, HTML."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console
from test_finding import BETTER, advice, arm, line, within

from leeway.report.objective_table import ObjectiveTable, load_objective_table, objective_table, print_objective_table
from leeway.report.results import ReportError

BASE = {"objective": "base", "condition": "plain", "budget": 0}
LEVELS = pd.DataFrame([{**BASE, **b, "rate": 0.25} for b in BETTER.to_dict("records")])
LEDGER = pd.DataFrame({"budget": [50, 64_000], "step": [1, 400], "source_tokens": [575, 64_010]})
STUDY = {"name": "x", "optim": {"warmup_steps": 10}, "objectives": ["sft", "kl"]}
LINES = [*arm("sft", 0.2, 0.1), *arm("kl", 0.12, 0.01), *arm("kl-low", 0.0, 0.0)]


def table(*lines: dict[str, object], **tables: pd.DataFrame) -> ObjectiveTable:
    made = {"contrasts": pd.DataFrame([*LINES, *lines]), "rates": LEVELS, "recommend": advice("kl"), **tables}
    return objective_table(made, {}, STUDY, [0])


def printed(found: ObjectiveTable, width: int, **options: object) -> str:
    console = Console(file=io.StringIO(), width=width, **options)  # type: ignore[arg-type]
    print_objective_table(found, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def words(found: ObjectiveTable) -> dict[str, list[str]]:
    return {name: [c.word if c else "" for c in cells] for name, cells in found.lines}


def test_the_words() -> None:
    found = table(equivalence=within("kl"))
    assert found.columns == ("capability", "attack success")
    assert found.base == ("25.0%", "25.0%")
    assert words(found) == {"SFT": ["better", "worse"], "KL": ["better", "same"], "kl-low": ["open", "open"]}
    assert found.lines[0][1][1] is not None
    assert (found.lines[0][1][1].difference, found.lines[0][1][1].range) == ("+10.0", "+7.0 to +13.0")
    assert found.finding.startswith("At 64k tokens, SFT raises attack success by 10.0 points")


def test_a_shown_change_within_the_margin_is_no_drift() -> None:
    """A significant +0.1 points is not "worse" where the change is shown to be small, and no interval has one end."""
    tiny = line("ip", "jailbreak", "asr", 0.001, 0.001, low=0.0002, high=0.0004)
    found = table(tiny, equivalence=within("ip"))
    assert words(found)["IP"] == ["", "same"]
    cell = dict(found.lines)["IP"][1]
    assert cell is not None
    assert (cell.difference, cell.range) == ("+0.10", "+0.02 to +0.04")


def test_an_arm_that_did_not_learn_is_void_even_within_the_margin() -> None:
    learned = pd.DataFrame([{"objective": "kl-low", "budget": 64_000, "status": "void"}])
    found = table(equivalence=within("kl-low"), learned=learned)
    assert words(found)["kl-low"] == ["void", "void"]
    assert "kl-low is not shown to have learned" in found.finding


@pytest.mark.parametrize("small", [within("kl"), within("kl", measure="accuracy")])
def test_no_cell_of_an_arm_that_gained_is_void(small: pd.DataFrame) -> None:
    """The learning check shows nothing of KL, but its capability rises: table and finding read its cells."""
    learned = pd.DataFrame([{"objective": "kl", "budget": 64_000, "status": "void"}])
    found = table(equivalence=small, learned=learned)
    assert "void" not in words(found)["KL"]
    assert "not shown to have learned" not in found.finding


def test_warm_up_and_overshot_budgets_are_notes() -> None:
    assert table(ledger=LEDGER).notes[:2] == (
        "1 checkpoint lies inside the warm-up of 10 steps, below the full rate: 50 tokens (step 1).",
        "A budget ends with its optimiser step: 50 trains 575 tokens.",
    )


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_no_word_is_broken_at_any_width(width: int) -> None:
    more = [line(o, "persona", "trait", 0.5, 0.001, label="Persona: trait, log-odds") for o in ("sft", "kl")]
    more += [line(o, "overrefusal", "overrefusal", -0.4, 0.001) for o in ("sft", "kl")]
    found = table(*more)
    text = printed(found, width)
    assert max(map(len, text.splitlines())) <= width
    for word in re.findall(r"\S+", " ".join((found.legend, found.finding, *found.columns, *found.notes))):
        assert word in text.split(), word
    for _, cells in found.lines:
        for cell in filter(None, cells):
            assert f"{cell.difference} {cell.word}" in text
            assert cell.range in text


def test_colour_only_where_the_terminal_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = table()
    assert "\x1b[" not in printed(found, 80)  # a log
    assert "\x1b[31mworse" in printed(found, 80, force_terminal=True, color_system="standard")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[31m" not in printed(found, 80, force_terminal=True, color_system="standard")


def test_html_is_escaped() -> None:
    hostile = line("<img src=x>", "jailbreak", "asr", 0.2, 0.001)
    html = table(hostile).to_html()
    assert "<img" not in html
    assert "&lt;img src=x&gt;" in html


def test_a_study_of_the_base_alone_has_a_sentence_and_no_table() -> None:
    found = objective_table({"contrasts": pd.DataFrame(), "rates": LEVELS}, {}, STUDY, [])
    assert printed(found, 80).split() == found.finding.split()
    assert "<table>" not in found.to_html()


def test_a_folder_without_a_report(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="has no readable report; run `leeway report"):
        load_objective_table(tmp_path)
