"""Charts hold the numbers of their tables, at their true places."""

import numpy as np
import pandas as pd

from leeway.report import charts
from leeway.report.charts import comparison
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


def test_one_budget_is_a_dot_plot_with_intervals_of_the_base_too():
    one = RATES[RATES["budget"] != 100_000]
    chart = charts.by_budget(one, LINES)[0]
    rule, points = chart.spec["layer"]
    assert [layer["mark"]["type"] for layer in (rule, points)] == ["rule", "point"]
    assert points["encoding"]["y"]["field"] == "label"
    ends = {d["label"]: (d["low"], d["value"], d["high"]) for d in chart.spec["data"]["values"]}
    assert ends == {
        "base": (0.25, 0.3, 0.35),
        "SFT": (0.45, 0.5, 0.55),
        "KL": (0.4, 0.45, 0.5),
        "DPO": (0.35, 0.4, 0.45),
    }


def test_a_line_of_one_budget_has_an_interval_where_a_band_cannot_be_drawn():
    chart = charts.by_budget(RATES, LINES)[0]
    alone = {d["label"] for d in chart.spec["data"]["values"] if d.get("alone")}
    assert alone == {"KL", "DPO"}
    rules = [layer for layer in chart.spec["layer"] if "y2" in layer["encoding"] and layer["mark"]["type"] == "rule"]
    assert len(rules) == 1
    assert "datum.alone" in rules[0]["transform"][1]["filter"]


def test_every_point_of_a_training_curve_has_a_tooltip_of_its_own():
    steps = pd.DataFrame({"objective": "sft", "step": [1, 2, 3], "tokens": [10, 20, 30], "loss": [3.0, 2.0, 1.0]})
    chart = charts.training(steps, LINES)
    assert chart is not None
    tips = [layer for layer in chart.spec["spec"]["layer"] if "tooltip" in layer["encoding"]]
    assert [layer["mark"]["type"] for layer in tips] == ["point"]  # a line has one tooltip, of its first point


def luminance(colour: tuple[float, ...]) -> float:
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_on_every_cell_of_a_heat_map_has_enough_contrast():
    for key, scale in (("value", comparison.LEVELS), ("change", comparison.MOVES)):
        low = scale["domain"][0]
        stops = [[int(c[n : n + 2], 16) / 255 for n in (1, 3, 5)] for c in scale["range"]]
        places = np.linspace(low, 1, len(stops))
        for value in np.linspace(low, 1, 201):
            background = luminance(tuple(np.interp(value, places, channel) for channel in zip(*stops, strict=True)))
            white = not comparison.DARK[key][0] <= value <= comparison.DARK[key][1]
            contrast = 1.05 / (background + 0.05) if white else (background + 0.05) / 0.05
            assert contrast >= 4.5, (value, contrast)
