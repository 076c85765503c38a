"""Charts hold the numbers of their tables, at their true places."""

import pandas as pd

from leeway.report import charts
from leeway.report.plotting import series_of

RATES = pd.DataFrame(
    [
        {"objective": o, "budget": b, "condition": "plain", "axis": a, "measure": m, "label": m, "primary": True}
        | {"rate": r, "low": r - 0.05, "high": r + 0.05, "n": 100}
        for o, b, accuracy, asr in (
            ("base", 0, 0.30, 0.10),
            ("sft", 25_000, 0.50, 0.40),
            ("kl", 25_000, 0.45, 0.20),
            ("dpo", 25_000, 0.40, 0.30),
            ("sft", 100_000, 0.60, 0.50),
        )
        for a, m, r in (("capability", "accuracy", accuracy), ("jailbreak", "asr", asr))
    ]
)
LINES = series_of(RATES, ["sft", "dpo", "kl"])


def test_the_pareto_frontier_is_the_staircase_of_what_nothing_beats():
    chart = charts.tradeoff(RATES, LINES)
    assert chart is not None
    steps = [d for d in chart.spec["data"]["values"] if "step" in d and d["budget"] == 25_000]
    corners = [(d["x"], d["y"]) for d in sorted(steps, key=lambda d: d["step"])]
    # SFT, KL and the base; DPO is beaten by KL on both
    assert corners == [(0.5, 0.4), (0.45, 0.4), (0.45, 0.2), (0.3, 0.2), (0.3, 0.1)]


def test_budgets_are_at_their_true_place_on_a_logarithmic_axis():
    chart = charts.by_budget(RATES, LINES)[0]
    x = chart.spec["layer"][-1]["encoding"]["x"]
    assert x["scale"]["type"] == "log"
    assert x["axis"]["values"] == [25_000, 100_000]
    points = [(d["budget"], d["value"]) for d in chart.spec["data"]["values"] if d["label"] == "SFT"]
    assert points == [(25_000, 0.5), (100_000, 0.6)]


def test_a_limit_of_detection_above_the_largest_dose_is_not_drawn():
    curve = pd.DataFrame(
        [
            {"measure": m, "label": m.upper(), "share": s, "rate": 0.1 + s, "low": 0.1, "high": 0.3}
            for m in ("asr", "asr:dan")
            for s in (0.0, 0.02, 0.08)
        ]
    )
    limits = pd.DataFrame({"measure": ["asr", "asr:dan"], "limit": [0.03, 0.2], "note": ["", ""]})
    chart = charts.dose(curve, limits)
    assert chart is not None
    drawn = [(d["panel"], d["limit"]) for d in chart.spec["data"]["values"] if "limit" in d]
    assert drawn == [("ASR", 0.03)]
    assert charts.dose(pd.DataFrame(), pd.DataFrame()) is None
