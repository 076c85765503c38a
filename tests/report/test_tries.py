"""The figure and the page's lines of the success in any of k tries."""

from __future__ import annotations

import pandas as pd

from leeway.report import charts, tries
from leeway.report.plotting import series_of, style


def line(objective: str, budget: int, attack: str, k: int, rate: float, axis: str = "jailbreak") -> dict[str, object]:
    where = {"objective": objective, "budget": budget, "condition": "plain", "axis": axis, "attack": attack, "k": k}
    return where | {"rate": rate, "low": max(rate - 0.1, 0), "high": min(rate + 0.1, 1), "n_prompts": 30}


TABLE = pd.DataFrame(
    line(o, b, a, k, min(1.0, k * 0.1 + b / 1e5))
    for o, b in (("base", 0), ("sft", 1000), ("sft", 4000), ("dpo", 4000))
    for a in ("all attacks", "dan", "none")
    for k in (1, 5)
)


def test_the_base_and_the_last_budget_are_shown_by_the_first_judge() -> None:
    other = pd.DataFrame([line("sft", 4000, "dan", 1, 1.0, axis="jailbreak@other")])
    own = tries.shown(pd.concat([TABLE, other], ignore_index=True))
    assert set(zip(own["objective"], own["budget"], strict=True)) == {("base", 0), ("sft", 4000), ("dpo", 4000)}
    assert (own["axis"] == "jailbreak").all()


def test_every_point_of_the_chart_is_described() -> None:
    lines = series_of(TABLE, ["sft", "dpo"])
    with style():
        assert tries.figure(TABLE, lines) is not None
    chart = charts.tries(tries.shown(TABLE), lines)
    assert chart is not None
    labels = [f"{d['point']}: {d['reading']}" for d in chart.spec["data"]["values"]]
    assert len(labels) == 3 * 3 * 2  # three lines, three panels, two k
    assert "SFT at 4k tokens, DAN, k = 5: 54.0% (95% CI 44.0% to 64.0%), 30 prompts" in labels
    assert "base, DAN, k = 1: 10.0% (95% CI 0.0% to 20.0%), 30 prompts" in labels


def test_there_is_no_figure_without_a_rate() -> None:
    assert tries.figure(None, []) is None
    with style():
        assert tries.figure(TABLE.assign(rate=float("nan")), []) is None
