"""The page's analyses over budget and capability: compute each that the rows allow, and show it as a table of text."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pandas as pd

from leeway import stats
from leeway.report import formatting, tries, triggers
from leeway.report.formatting import MISSING, BudgetUnit
from leeway.report.plotting import key_of
from leeway.report.results import ReportError, Results
from leeway.stats.metrics import BASE
from leeway.stats.pareto import TOLERANCE

Row = dict[str, Any]  # of a table, with None for missing values
Column = tuple[str, Callable[[Row], str], bool]  # heading, cell text, whether it is text (else a number)
MARGIN = 0.05  # of the page's equivalence tests; claims and gates have their own
OVER_BUDGETS = ("asr", "endorsement", "accuracy")


def analyses(results: Results) -> tuple[dict[str, pd.DataFrame], dict[str, str]]:
    """Return the table of each analysis that the rows allow, and why the others are unavailable."""
    rates = results.rates()
    tuned = rates[rates["objective"] != BASE]
    if tuned.empty:
        return {}, {}
    margins = dict.fromkeys(tuned.loc[tuned["primary"], "measure"].unique(), MARGIN)
    margins |= {"trait": TOLERANCE["trait"]} if (tuned["measure"] == "trait").any() else {}
    wanted: dict[str, Callable[[], pd.DataFrame]] = {
        "equivalence": lambda: results.equivalence(margins),
        "recommend": lambda: _recommend(results, tuned),
    }
    if tuned["measure"].eq("trait").any():
        wanted["trait_agreement"] = results.trait_agreement
    measures = [m for m in OVER_BUDGETS if (tuned["measure"] == m).any()]
    onsets = ["trait" if m == "endorsement" and (tuned["measure"] == "trait").any() else m for m in measures]
    if measures and tuned["budget"].nunique() > 1:
        wanted |= {
            "divergence": lambda: _stack([results.divergence(m) for m in measures]),
            "onset": lambda: _stack([results.onset(m) for m in onsets]),
            "coupling": results.coupling,
            "matched": results.matched,
            "equal_distance": results.equal_distance,
        }
    tables, unavailable = {}, {}
    for name, compute in wanted.items():
        try:
            table = compute()
        except (ReportError, stats.StatsError) as error:
            unavailable[name] = str(getattr(error, "what", error)).rpartition("rows.parquet: ")[2]
            continue
        if not table.empty:
            tables[name] = table
    return tables, unavailable


def _recommend(results: Results, tuned: pd.DataFrame) -> pd.DataFrame:
    """Return a recommendation at every budget; empty without capability or without anything to weigh it against."""
    if not {"accuracy"} < set(tuned.loc[tuned["primary"], "measure"]):
        return pd.DataFrame()
    budgets = sorted(int(b) for b in tuned.loc[tuned["measure"] == "accuracy", "budget"].unique())
    rows, conditions = results.judged, results.conditions
    return _stack([stats.recommend(rows, conditions, b, drawn=results.main_draws) for b in budgets])


def _stack(tables: list[pd.DataFrame]) -> pd.DataFrame:
    tables = [t for t in tables if not t.empty]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _percent(key: str, digits: int = 1) -> Callable[[Row], str]:
    return lambda row: formatting.percent(row.get(key), digits)


def _signed(value: float | None) -> str:
    return MISSING if value is None else f"{value:+.3f}".replace("-", formatting.MINUS)


def _correlation(value: float | None) -> str:
    return MISSING if value is None else f"{value:+.2f}".replace("-", formatting.MINUS)


def _fraction(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}".replace("-", formatting.MINUS)


def _slope(row: Row) -> Callable[[Any], str]:
    """Return the format of a slope: points, or a signed number if it is in log-odds."""
    return _signed if str(row["unit"] or "").startswith("log") else formatting.points


def _at_capability(row: Row) -> Callable[[Any], str]:
    if row["kind"] == "pair":
        return lambda value: formatting.change(value, row["measure"])
    return lambda value: formatting.level(value, row["measure"])


def _interval(row: Row, text: Callable[[Any], str]) -> str:
    return MISSING if row["low"] is None or row["high"] is None else f"{text(row['low'])} to {text(row['high'])}"


def _change(row: Row) -> Callable[[Any], str]:
    return lambda value: formatting.change(value, row["measure"])


def _per_nat(row: Row) -> Callable[[Any], str]:
    return lambda value: _change(row)(None if value is None else value / 100)


def _over_objectives(row: Row) -> Row:
    return row | {"low": row["objective_ci_low"], "high": row["objective_ci_high"]}


def _renamed(row: Row) -> Row:
    return {"low": row["difference_low"], "high": row["difference_high"]}


def _onset(row: Row, key: str) -> str:
    return MISSING if row[key] is None else "never" if math.isinf(row[key]) else str(row["tick"](int(row[key])))


def _onset_interval(row: Row) -> str:
    low, high = _onset(row, "low"), _onset(row, "high")
    return low if low == high == "never" else f"{low} to {high}"


def _objective(name: str, condition: str, missing: str) -> Callable[[Row], str]:
    def text(row: Row) -> str:
        known = row.get(name)
        return formatting.objective_name(str(known), str(row.get(condition) or "plain")) if known else missing

    return text


OBJECTIVE: Column = ("Objective", _objective("objective", "condition", "all"), True)
AGAINST: Column = ("Against", _objective("against", "against_condition", ""), True)
MEASURE: Column = ("Measure", lambda r: str(r["measure"]).replace("asr", "ASR").replace(":none", ", no attack"), True)
P: Column = ("p", lambda r: formatting.p_value(r["p"]), False)
P_HOLM: Column = ("p (Holm)", lambda r: formatting.p_value(r["p_holm"]), False)
ANALYSES: dict[str, tuple[str, str, list[Column]]] = {  # in reading order: title, explanation, columns
    "equivalence": (
        "Equivalence to the base",
        f"Two one-sided tests (TOST) against a margin of ±{100 * MARGIN:g} points, the same in every study. “Not "
        "shown” does not mean that the two differ.",
        [
            OBJECTIVE,
            ("Budget", lambda r: r["tick"](int(r["budget"])), False),
            ("Measure", lambda r: str(r["label"]), True),
            ("Difference", lambda r: formatting.points(r["difference"]), False),
            ("90% CI", lambda r: f"{formatting.points(r['low90'])} to {formatting.points(r['high90'])}", False),
            ("Margin", lambda r: f"±{100 * r['margin']:g}", False),
            P,
            P_HOLM,
            ("Equivalent", lambda r: "yes" if r["equivalent"] else "not shown", True),
        ],
    ),
    "divergence": (
        "Slopes over budget",
        "Slope of each measure on log2(budget), per objective and per pair of objectives; joint: whether any slopes "
        "differ. Logistic GEE clustered by prompt (log-odds per doubling, Wald test); as a check, slopes by cluster "
        "bootstrap (points per doubling).",
        [
            ("Test", lambda r: str(r["kind"]).replace("-check", " (check)"), True),
            ("Method", lambda r: "GEE" if r["method"] == "gee" else str(r["method"]), True),
            MEASURE,
            OBJECTIVE,
            AGAINST,
            ("Estimate", lambda r: _slope(r)(r["estimate"]), False),
            ("95% CI", lambda r: _interval(r, _slope(r)), False),
            P,
            P_HOLM,
            ("Unit", lambda r: ("" if _slope(r) is _signed else "points ") + str(r["unit"]), True),
        ],
    ),
    "onset": (
        "Onset of change",
        "First budget from which the difference to the base exceeds 1 point (0.04 in log-odds) at that and every later "
        "budget, with an interval over bootstrap draws of prompts. By tests: by simultaneous one-sided 95% bounds.",
        [
            OBJECTIVE,
            MEASURE,
            ("Direction", lambda r: str(r["direction"]), True),
            ("Onset", lambda r: _onset(r, "estimate"), False),
            ("95% CI", _onset_interval, False),
            ("Onset by tests", lambda r: _onset(r, "tested"), False),
            ("Draws without onset", _percent("p_never", 0), False),
        ],
    ),
    "coupling": (
        "ASR per point of capability",
        "Slope of ASR on capability along each objective’s trajectory from the base (points per point), corrected for "
        "measurement error in capability.",
        [
            OBJECTIVE,
            MEASURE,
            ("Slope", lambda r: _signed(r["estimate"]), False),
            ("95% CI", lambda r: _interval(r, _signed), False),
            P,
            ("Uncorrected slope", lambda r: _signed(r["uncorrected"]), False),
            ("Reliability", lambda r: _fraction(r["reliability"]), False),
            ("Checkpoints", lambda r: str(r["n_points"]), False),
        ],
    ),
    "matched": (
        "Comparison at equal capability",
        "Each objective at the same capability, interpolated along its trajectory (never extrapolated). Rows with an "
        "objective under “Against” are differences in points.",
        [
            MEASURE,
            OBJECTIVE,
            AGAINST,
            ("Capability", _percent("capability"), False),
            ("Estimate", lambda r: _at_capability(r)(r["estimate"]), False),
            ("95% CI", lambda r: _interval(r, _at_capability(r)), False),
            P,
            P_HOLM,
        ],
    ),
    "equal_distance": (
        "Comparison at equal distance from the base",
        "What does it cost per nat moved? Each objective at the same KL to the base (held-out answers of the task), "
        "interpolated along its trajectory (never extrapolated). Per 0.01 nats: change from the base over that KL. "
        "Rows with an objective under “Against” are differences in points.",
        [
            MEASURE,
            OBJECTIVE,
            AGAINST,
            ("KL, nats per token", lambda r: formatting.nats(r["distance"], sign=False), False),
            ("Estimate", lambda r: _at_capability(r)(r["estimate"]), False),
            ("95% CI", lambda r: _interval(r, _at_capability(r)), False),
            ("Per 0.01 nats", lambda r: _per_nat(r)(r["per_nat"]), False),
            ("95% CI", lambda r: _interval({k: r[f"per_nat_{k}"] for k in ("low", "high")}, _per_nat(r)), False),
            P,
            P_HOLM,
        ],
    ),
    "trait_agreement": (
        "Questionnaire and behaviour",
        "Do checkpoints whose persona trait shifted more (log-odds) also behave worse? Correlation of the two shifts "
        "from the base over all checkpoints, corrected for the error of measurement; 1 is full agreement. The first "
        "interval covers other prompts for these checkpoints, the second other objectives too (from four objectives "
        "on); neither covers other budgets.",
        [
            ("Trait", lambda r: str(r["trait"]), True),
            ("Behaviour", lambda r: str(r["label"]), True),
            ("Correlation", lambda r: _correlation(r["correlation"]), False),
            ("95% CI, prompts", lambda r: _interval(r, _correlation), False),
            ("95% CI, objectives", lambda r: _interval(_over_objectives(r), _correlation), False),
            ("Uncorrected", lambda r: _correlation(r["uncorrected"]), False),
            ("Reliability of trait", lambda r: _fraction(r["reliability_trait"]), False),
            ("Of behaviour", lambda r: _fraction(r["reliability_behaviour"]), False),
            ("Checkpoints", lambda r: str(r["n_points"]), False),
        ],
    ),
    "triggers": (
        "Near-triggers: is misbehaviour gone or conditional?",
        triggers.RULE,
        [
            OBJECTIVE,
            ("Budget", lambda r: r["tick"](int(r["budget"])), False),
            MEASURE,
            ("Form", lambda r: str(r["form"]), True),
            ("Prompt", lambda r: str(r["trigger"]), True),
            ("Rate", lambda r: formatting.level(r["rate"], r["measure"]), False),
            ("Base", lambda r: formatting.level(r["base"], r["measure"]), False),
            ("Against the base", lambda r: _change(r)(r["drift"]), False),
            ("More than under plain prompts", lambda r: _change(r)(r["excess"]), False),
            ("95% CI", lambda r: _interval(r, _change(r)), False),
            P_HOLM,
            ("Result", lambda r: str(r["result"]), True),
        ],
    ),
    "asr-at-k": (
        "Attack success in any of k tries",
        "Success at k: the share of forbidden prompts of which at least one of k sampled answers is harmful, unbiased "
        "from all answers to a prompt; intervals and paired differences over prompts. Withheld: prompts with fewer "
        "than k scored answers. Rows: the base and the last budget; the file has all.",
        [
            OBJECTIVE,
            ("Attack", lambda r: formatting.attack_name(str(r["attack"])), True),
            ("k", lambda r: str(r["k"]), False),
            ("Success at k", _percent("rate"), False),
            ("95% CI", lambda r: _interval(r, formatting.percent), False),
            ("Against the base", lambda r: formatting.points(r["difference"]), False),
            ("95% CI", lambda r: _interval(_renamed(r), formatting.points), False),
            P,
            P_HOLM,
            ("Prompts", lambda r: formatting.count(r["n_prompts"]), False),
            ("Withheld", lambda r: formatting.count(r["n_withheld"]), False),
            ("Answers", lambda r: formatting.count(r["draws"]), False),
            ("Unscored", lambda r: formatting.count(r["draws_unscored"]), False),
        ],
    ),
    "thinking": (
        "Thinking before answers",
        "Answers that begin with a thought; judges read only the final answer. An answer that ended inside its "
        "thought, or was cut off there by the limit of new tokens, is unscored.",
        [
            OBJECTIVE,
            ("Budget", lambda r: r["tick"](int(r["budget"])) if r["budget"] else MISSING, False),
            ("Seed", lambda r: str(r["seed"]) if r["budget"] else MISSING, False),
            ("Eval", lambda r: str(r["axis"]), True),
            ("Answers", lambda r: formatting.count(r["n"]), False),
            ("With a thought", lambda r: formatting.count(r["n_thinking"]), False),
            ("Cut off in thought", lambda r: formatting.count(r["n_cut"]), False),
            ("Ended in thought", lambda r: formatting.count(r["n_ended"]), False),
            ("Without an answer", _percent("cut"), False),
            ("New tokens, mean", lambda r: formatting.count(r["new_tokens"]), False),
        ],
    ),
    "frontier": (
        "Pareto frontier",
        "A checkpoint is on the frontier if no other is at least as good on both accuracy and ASR and better on one. "
        "In draws: share of bootstrap draws of prompts in which it is. Rows: checkpoints on the frontier, or in at "
        "least 1% of draws.",
        [
            OBJECTIVE,
            ("Budget", lambda r: r["tick"](int(r["budget"])) if r["budget"] else MISSING, False),
            ("Seed", lambda r: str(r["seed"]) if r["budget"] else MISSING, False),
            ("Accuracy", _percent("capability"), False),
            ("ASR", _percent("asr"), False),
            ("On frontier", lambda r: "yes" if r["on_frontier"] else "no", True),
            ("In draws", _percent("p_on_frontier"), False),
        ],
    ),
}


def views(made: dict[str, pd.DataFrame], unavailable: dict[str, str], unit: BudgetUnit) -> list[dict[str, Any]]:
    """Return each analysis as a table of text, or with the reason why it is not available."""
    found = []
    for key, (title, about, columns) in ANALYSES.items():
        if key in made and not made[key].empty:
            table = made[key]
            if key == "frontier":
                shown = table["on_frontier"].astype(bool) | (table["p_on_frontier"] >= 0.01)
                table = table[shown].sort_values("p_on_frontier", ascending=False, kind="stable")
            elif key == "asr-at-k":
                table = tries.shown(table)
            heads = [(head, is_text) for head, _, is_text in columns]
            rows: Any = table.astype(object).where(table.notna(), None).to_dict("records")
            lines = [_line(row, key, columns, unit) for row in rows]
            found.append({"key": key, "title": title, "about": about, "heads": heads, "lines": lines})
        elif key in unavailable:
            found.append({"key": key, "title": title, "unavailable": unavailable[key]})
    return found


def _line(row: Row, key: str, columns: list[Column], unit: BudgetUnit) -> dict[str, Any]:
    objective = str(row.get("objective") or "")
    return {
        "line": key_of(objective, str(row.get("condition") or "plain")) if objective else "",
        "budget": row.get("budget") or "",
        "cells": [cell(row | {"tick": unit.tick}) for _, cell, _ in columns],
        "note": "" if key == "frontier" else formatting.without_seed_note(str(row.get("note") or "")),
    }
