import itertools

import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from leeway.report import formatting
from leeway.report.figures import _label_ends, spread_labels
from leeway.report.formatting import TOKENS
from leeway.report.plotting import PERCENT
from leeway.report.verdict import verdict


def test_budgets():
    assert [formatting.format_budget(b) for b in (25_000, 8_192, 1_600_000, 800, 12_500)] == [
        "25k",
        "8,192",
        "1.6M",
        "800",
        "12.5k",
    ]


def test_points_are_signed_without_negative_zero():
    assert [formatting.points(v) for v in (0.031, -0.004, -0.0001, float("nan"))] == ["+3.1", "−0.4", "0.0", "–"]
    assert [formatting.p_value(v) for v in (0.0421, 0.0004)] == ["0.042", "<0.001"]
    assert formatting.join_and(["a", "b", "c"]) == "a, b and c"


def test_percent_ticks_are_exact():
    assert [PERCENT(v, 0) for v in (0.0, 0.025, 0.1, 0.3, 1.0)] == ["0%", "2.5%", "10%", "30%", "100%"]


def test_invisible_text_is_escaped():
    shown, cut = formatting.escape_invisible("a\u202eb\u200b\x00\nc\td", 100)
    assert (shown, cut) == ("a⟨U+202E⟩b⟨U+200B⟩⟨U+0000⟩\nc\td", 0)
    assert formatting.escape_invisible("x" * 50, 10) == ("x" * 10, 40)
    assert formatting.escape_invisible("naïve 日本 🙂", 100) == ("naïve 日本 🙂", 0)


def test_labels_keep_order_and_distance():
    placed = spread_labels([0.5, 0.5, 0.1, 0.98], 0.1, 0, 1)
    assert placed[2] < placed[0] < placed[1] < placed[3] <= 1
    assert min(abs(a - b) for a in placed for b in placed if a != b) >= 0.1 - 1e-12


@pytest.mark.parametrize("names", [2, 9, 20, 40])
def test_many_labels_are_evenly_spaced(names: int):
    placed = spread_labels([0.1] * names, 0.1, 0, 1)
    assert len(set(placed)) == names
    assert min(b - a for a, b in itertools.pairwise(placed)) >= min(0.1, 1 / (names - 1)) - 1e-9
    assert min(placed) >= -1e-9
    assert max(placed) <= 1 + 1e-9


@pytest.mark.parametrize("last", [(0.5, 0.5), (0.5, 0.52), (0.52, 0.5), (0.47, 0.49), (0.9, 0.1)])
def test_first_and_last_budget_labels_do_not_overlap(last: tuple[float, float]):
    figure = Figure(figsize=(8, 2.4))
    ax = figure.subplots(1, 3)[0]
    ax.set(xlim=(0, 1), ylim=(0, 1))
    points = [("base", 0, 0.1, 0.1), ("sft", 200_000, 0.5, 0.5), ("sft", 400_000, *last)]
    _label_ends(ax, pd.DataFrame(points, columns=["objective", "budget", "x", "y"]), TOKENS)
    first, second = (t.get_window_extent(FigureCanvasAgg(figure).get_renderer()) for t in ax.texts)
    assert [t.get_text() for t in ax.texts] == ["200k", "400k"]
    assert not first.overlaps(second)


def line(objective: str, axis: str, measure: str, difference: float, p: float) -> dict[str, object]:
    found: dict[str, object] = {"objective": objective, "condition": "plain", "budget": 400_000, "axis": axis}
    found |= {
        "measure": measure,
        "rate": 0.9 + difference / 2,
        "difference": difference,
        "p": p,
        "p_holm": p,
        "note": "",
        "n_clusters": 100,
    }
    return found | {"primary": measure != "coherence"}


def test_verdict_names_changes_and_claims_no_stability():
    table = pd.DataFrame(
        [
            line("sft", "capability", "accuracy", 0.2, 0.001),
            line("kl", "capability", "accuracy", 0.01, 0.6),
            line("sft", "jailbreak", "asr", 0.1, 0.2),
            line("kl", "jailbreak", "asr", 0.01, 0.9),
            line("sft", "jailbreak", "coherence", -0.08, 0.001),
        ]
    )
    first, second, third = verdict(table, [0])
    assert first == (
        "At 400k tokens, capability (accuracy) differs significantly from the base for 1 of 2 "
        "objectives (SFT +20.0 points)."
    )
    assert second.startswith(
        "Attack success rate (mean over attacks) differs significantly from the base for none of 2"
    )
    assert "persona endorsement was not measured" in second
    assert "coherence fell (SFT −8.0 points)" in second
    assert "no evidence of stability" in third
    assert third.endswith("Intervals cover prompt sampling, not training-seed variance (1 seed).")
    assert "drift" not in " ".join([first, second, third])
    assert verdict(table.iloc[:0], []) == ["Only the base model was evaluated: there is nothing to compare it with."]


def test_incoherent_model_is_not_called_robust():
    table = pd.DataFrame(
        [line("sft", "jailbreak", "asr", -0.1, 0.2), line("sft", "jailbreak", "coherence", -0.9, 0.001)]
    )
    assert "few responses to forbidden prompts were coherent (SFT 45%)" in verdict(table, [0])[1]


@pytest.mark.parametrize("p", [0.2, 0.001])
def test_verdict_of_one_objective(p: float):
    table = pd.DataFrame([line("sft", "jailbreak", "asr:none", 0.1, p)])
    sentences = verdict(table, [0, 1])
    assert "capability (accuracy) was not measured" in sentences[0]
    assert ("does not differ significantly" in sentences[1]) == (p > 0.05)
    assert "(2 seeds, pooled)" in sentences[2]
