"""The questions over budgets as tables for the page: do objectives diverge, from where on, at what price, how sure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from leeway import stats
from leeway.report import wording
from leeway.report.marks import key_of
from leeway.report.results import ReportError, Results
from leeway.report.scale import Scale
from leeway.stats.measures import BASE
from leeway.stats.recommend import MEASURES as WEIGHED

Column = tuple[str, Callable[[dict[str, Any]], str], bool]  # title, what it shows, whether it is words
MARGIN = 0.05  # of the page's equivalence tests, stated on it; a claim or a gate has its own
OVER_BUDGETS = ("asr", "endorsement", "accuracy")


@dataclass(frozen=True)
class View:
    """A table as it is shown: rows of text, each with what it is about."""

    key: str
    title: str
    about: str
    heads: list[tuple[str, bool]]
    lines: list[dict[str, Any]]
    why_not: str = ""


def analyses(results: Results) -> tuple[dict[str, pd.DataFrame], dict[str, str]]:
    """Every analysis over budgets that the rows can carry, and why the others are not there."""
    rates = results.rates()
    tuned = rates[rates["objective"] != BASE]
    if tuned.empty:
        return {}, {}
    margins = dict.fromkeys(tuned.loc[tuned["primary"], "measure"].unique(), MARGIN)
    always = {"equivalence": lambda: results.equivalence(margins), "recommend": lambda: _every_budget(results, tuned)}
    there = [m for m in OVER_BUDGETS if (tuned["measure"] == m).any()]
    if not there or tuned["budget"].nunique() < 2:
        return _made(always)
    return _made(
        always
        | {
            "divergence": lambda: _stacked([results.divergence(m) for m in there]),
            "onset": lambda: _stacked([results.onset(m) for m in there]),
            "coupling": results.coupling,
            "matched": results.matched,
        }
    )


def _made(asked: dict[str, Callable[[], pd.DataFrame]]) -> tuple[dict[str, pd.DataFrame], dict[str, str]]:
    found, why_not = {}, {}
    for name, ask in asked.items():
        try:
            table = ask()
        except (ReportError, stats.StatsError) as error:
            why_not[name] = str(getattr(error, "what", error)).rpartition("rows.parquet: ")[2]
            continue
        if not table.empty:
            found[name] = table
    return found, why_not


def _every_budget(results: Results, tuned: pd.DataFrame) -> pd.DataFrame:
    if not {"accuracy"} < set(tuned.loc[tuned["primary"], "measure"]):
        return pd.DataFrame()  # nothing to weigh capability against
    budgets = sorted(int(b) for b in tuned.loc[tuned["measure"] == "accuracy", "budget"].unique())
    drawn = stats.draws(results.judged, results.conditions, WEIGHED)  # once for all budgets
    ask = stats.recommend
    return _stacked([ask(results.judged, results.conditions, b, drawn=drawn) for b in budgets])


def _stacked(tables: list[pd.DataFrame]) -> pd.DataFrame:
    kept = [t for t in tables if not t.empty]
    return pd.concat(kept, ignore_index=True) if kept else pd.DataFrame()


def views(made: dict[str, pd.DataFrame], why_not: dict[str, str], scale: Scale) -> list[View]:
    """The analyses as the page shows them, in reading order."""
    wanted = [_equivalence, _divergence, _onset, _coupling, _matched, _frontier]
    found = []
    for one in wanted:
        key = one.__name__[1:]
        if key in made and not made[key].empty:
            title, about, columns, table = one(made[key], scale)
            found.append(_view(key, title, about, columns, table))
        elif key in why_not:
            title = {"divergence": "Do objectives diverge with scale?", "onset": "From which budget on?"}.get(key, key)
            found.append(View(key, title, "", [], [], why_not[key]))
    return found


def _view(key: str, title: str, about: str, columns: list[Column], table: pd.DataFrame) -> View:
    lines = []
    for row in table.astype(object).where(table.notna(), None).to_dict("records"):
        values = {str(k): v for k, v in row.items()}
        objective, condition = str(values.get("objective") or ""), str(values.get("condition") or "plain")
        note = wording.remark(str(values.get("note") or ""))
        lines.append(
            {
                "line": key_of(objective, condition) if objective else "",
                "budget": values.get("budget") or "",
                "cells": [show(values) for _, show, _ in columns],
                "note": "" if key == "frontier" else note,
            }
        )
    return View(key, title, about, [(title, words) for title, _, words in columns], lines)


def _who(row: dict[str, Any]) -> str:
    return wording.name(str(row["objective"]), str(row["condition"])) if row.get("objective") else "all together"


def _against(row: dict[str, Any]) -> str:
    other = row.get("against")
    return wording.name(str(other), str(row.get("against_condition") or "plain")) if other else ""


def _number(row: dict[str, Any], key: str, digits: int = 3) -> str:
    value = row.get(key)
    return "–" if value is None else f"{value:+.{digits}f}".replace("-", wording.MINUS)


def _range(row: dict[str, Any], *, scaled: bool) -> str:
    low, high = row.get("low"), row.get("high")
    if low is None or high is None:
        return "–"
    if scaled:
        return f"{wording.points(low)} to {wording.points(high)}"
    return f"{_number(row, 'low')} to {_number(row, 'high')}"


def _in_points(row: dict[str, Any]) -> bool:
    return not str(row.get("unit") or "").startswith("log")


def _equivalence(table: pd.DataFrame, scale: Scale) -> tuple[str, str, list[Column], pd.DataFrame]:
    columns: list[Column] = [
        ("Objective", _who, True),
        ("Budget", lambda r: scale.tick(int(r["budget"])), False),
        ("Measure", lambda r: str(r["label"]), True),
        ("Difference", lambda r: wording.points(_nan(r["difference"])), False),
        ("90% interval", lambda r: f"{wording.points(_nan(r['low90']))} to {wording.points(_nan(r['high90']))}", False),
        ("Margin", lambda r: f"±{100 * r['margin']:g}", False),
        ("p", lambda r: wording.p_value(_nan(r["p"])), False),
        ("p, Holm", lambda r: wording.p_value(_nan(r["p_holm"])), False),
        ("Equivalent", lambda r: "shown" if r["equivalent"] else "not shown", True),
    ]
    about = (
        f"Two one-sided tests against a margin of {100 * MARGIN:g} points, the same for every study: not chosen by "
        "what was found. "
        "Not shown to be equivalent is not shown to differ."
    )
    return "Is it shown that nothing moved?", about, columns, table


def _divergence(table: pd.DataFrame, _: Scale) -> tuple[str, str, list[Column], pd.DataFrame]:
    about = (
        "The slope of each measure on log2 of the budget, per objective and between pairs; joint: whether the slopes "
        "differ at all. Logistic GEE clustered by prompt (log-odds per doubling, Wald test), and as a check the slope "
        "of a cluster bootstrap (points per doubling)."
    )
    columns: list[Column] = [
        ("Question", lambda r: str(r["kind"]), True),
        ("Method", lambda r: str(r["method"]), True),
        ("Measure", lambda r: str(r["measure"]), True),
        ("Objective", _who, True),
        ("Against", _against, True),
        ("Estimate", lambda r: _estimate(r, scaled=_in_points(r)), False),
        ("95% interval", lambda r: _range(r, scaled=_in_points(r)), False),
        ("p", lambda r: wording.p_value(_nan(r["p"])), False),
        ("p, Holm", lambda r: wording.p_value(_nan(r["p_holm"])), False),
        ("Unit", lambda r: ("points " if _in_points(r) else "") + str(r["unit"]), True),
    ]
    return "Do objectives diverge with scale?", about, columns, table


def _onset(table: pd.DataFrame, scale: Scale) -> tuple[str, str, list[Column], pd.DataFrame]:
    def place(row: dict[str, Any], key: str) -> str:
        value = row[key]
        return "–" if value is None else "never" if value == float("inf") else scale.tick(int(value))

    columns: list[Column] = [
        ("Objective", _who, True),
        ("Measure", lambda r: str(r["measure"]), True),
        ("Direction", lambda r: str(r["move"]), True),
        ("From", lambda r: place(r, "estimate"), False),
        ("95% interval", lambda r: f"{place(r, 'low')} to {place(r, 'high')}", False),
        ("By the tests", lambda r: place(r, "tested"), False),
        ("Never, in draws", lambda r: wording.percent(_nan(r["p_never"]), 0), False),
    ]
    about = (
        "The first budget from which a difference from the base beyond the threshold holds at every later budget too; "
        "the interval is over joint draws of prompts. By the tests: the first from which every contrast is significant."
    )
    return "From which budget on?", about, columns, table


def _coupling(table: pd.DataFrame, _: Scale) -> tuple[str, str, list[Column], pd.DataFrame]:
    columns: list[Column] = [
        ("Objective", _who, True),
        ("Measure", lambda r: str(r["measure"]), True),
        ("Slope", lambda r: _number(r, "estimate"), False),
        ("95% interval", lambda r: _range(r, scaled=False), False),
        ("p", lambda r: wording.p_value(_nan(r["p"])), False),
        ("Uncorrected", lambda r: _number(r, "uncorrected"), False),
        ("Reliability", lambda r: "–" if r["reliability"] is None else f"{r['reliability']:.2f}", False),
        ("Points", lambda r: str(r["n_points"]), False),
    ]
    about = (
        "Points of ASR for each point of capability along an objective’s way from the base, corrected for the noise "
        "in capability."
    )
    return "What a point of capability cost", about, columns, table


def _matched(table: pd.DataFrame, _: Scale) -> tuple[str, str, list[Column], pd.DataFrame]:
    columns: list[Column] = [
        ("Measure", lambda r: str(r["measure"]), True),
        ("Objective", _who, True),
        ("Against", _against, True),
        ("Capability", lambda r: wording.percent(_nan(r["capability"])), False),
        (
            "Estimate",
            lambda r: (
                _estimate(r, scaled=r["kind"] == "pair")
                if r["kind"] == "pair"
                else wording.percent(_nan(r["estimate"]))
            ),
            False,
        ),
        ("95% interval", _matched_range, False),
        ("p", lambda r: wording.p_value(_nan(r["p"])), False),
        ("p, Holm", lambda r: wording.p_value(_nan(r["p_holm"])), False),
    ]
    about = (
        "Each objective by the time it has bought the same capability, interpolated along its trajectory and "
        "never beyond it; "
        "with a name under Against, the difference between two in points."
    )
    return "At equal capability", about, columns, table


def _matched_range(row: dict[str, Any]) -> str:
    if row["kind"] == "pair" or row["low"] is None:
        return _range(row, scaled=True)
    return f"{wording.percent(row['low'])} to {wording.percent(row['high'])}"


def _frontier(table: pd.DataFrame, scale: Scale) -> tuple[str, str, list[Column], pd.DataFrame]:
    known = table.sort_values(
        "p_on_frontier" if "p_on_frontier" in table else "on_frontier", ascending=False, kind="stable"
    )
    drawn = "p_on_frontier" in table
    known = (
        known[known["on_frontier"].astype(bool) | (known["p_on_frontier"] >= 0.01)]
        if drawn
        else known[known["on_frontier"]]
    )
    columns: list[Column] = [
        ("Objective", _who, True),
        ("Budget", lambda r: scale.tick(int(r["budget"])) if r["budget"] else "–", False),
        ("Seed", lambda r: str(r["seed"]) if r["budget"] else "–", False),
        ("Accuracy", lambda r: wording.percent(_nan(r["capability"])), False),
        ("ASR", lambda r: wording.percent(_nan(r["asr"])), False),
        ("On the frontier", lambda r: "yes" if r["on_frontier"] else "no", True),
        ("in draws", lambda r: wording.percent(_nan(r.get("p_on_frontier"))), False),
    ]
    about = (
        "A checkpoint is on the frontier if no other is as good on accuracy and ASR and better on one; "
        "the share of draws of "
        "prompts in which that holds. Those on it, or in at least 1% of draws; all: tables/frontier.csv."
    )
    return "Which checkpoints nothing beats on both", about, columns, known


def _estimate(row: dict[str, Any], *, scaled: bool) -> str:
    return wording.points(_nan(row["estimate"])) if scaled else _number(row, "estimate")


def _nan(value: Any) -> float:
    return float("nan") if value is None else float(value)
