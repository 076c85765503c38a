"""Render `report.html`: one self-contained page from the finished tables, figures and budget analyses."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from leeway import stats
from leeway.report import formatting, narrative, plotting
from leeway.report.formatting import MISSING, BudgetUnit
from leeway.report.page.transcripts import embed_rows, transcripts
from leeway.report.plotting import Drawing, Series, key_of
from leeway.report.results import ReportError, Results, declared_set
from leeway.report.verdict import LEVEL, limitations, recommendations, verdict
from leeway.stats import intervals, metrics
from leeway.stats.metrics import BASE
from leeway.stats.pareto import MEASURES as RECOMMENDATION_MEASURES

Column = tuple[str, Callable[[dict[str, Any]], str], bool]  # heading, cell text, whether it is text (else a number)
MARGIN = 0.05  # of the page's equivalence tests; claims and gates have their own
NEVER = "never"
OVER_BUDGETS = ("asr", "endorsement", "accuracy")
TITLES = {
    "equivalence": "Equivalence to the base",
    "divergence": "Slopes over budget",
    "onset": "Onset of change",
    "coupling": "ASR per point of capability",
    "matched": "Comparison at equal capability",
    "frontier": "Pareto frontier",
    "recommend": "Recommendation",
}


@dataclass(frozen=True)
class View:
    """One analysis on the page: a table of text, or the reason why it is not available."""

    key: str
    title: str
    about: str
    heads: list[tuple[str, bool]]
    lines: list[dict[str, Any]]
    unavailable: str = ""


def analyses(results: Results) -> tuple[dict[str, pd.DataFrame], dict[str, str]]:
    """Return the table of each analysis that the rows allow, and why the others are unavailable."""
    rates = results.rates()
    tuned = rates[rates["objective"] != BASE]
    if tuned.empty:
        return {}, {}
    margins = dict.fromkeys(tuned.loc[tuned["primary"], "measure"].unique(), MARGIN)
    wanted: dict[str, Callable[[], pd.DataFrame]] = {
        "equivalence": lambda: results.equivalence(margins),
        "recommend": lambda: _recommend(results, tuned),
    }
    measures = [m for m in OVER_BUDGETS if (tuned["measure"] == m).any()]
    if measures and tuned["budget"].nunique() > 1:
        wanted |= {
            "divergence": lambda: _stack([results.divergence(m) for m in measures]),
            "onset": lambda: _stack([results.onset(m) for m in measures]),
            "coupling": results.coupling,
            "matched": results.matched,
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
    draws = stats.draws(results.judged, results.conditions, RECOMMENDATION_MEASURES)  # shared by all budgets
    return _stack([stats.recommend(results.judged, results.conditions, b, drawn=draws) for b in budgets])


def _stack(tables: list[pd.DataFrame]) -> pd.DataFrame:
    tables = [t for t in tables if not t.empty]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def views(made: dict[str, pd.DataFrame], unavailable: dict[str, str], unit: BudgetUnit) -> list[View]:
    """Return the analyses in reading order."""
    builders = {
        "equivalence": _equivalence,
        "divergence": _divergence,
        "onset": _onset,
        "coupling": _coupling,
        "matched": _matched,
        "frontier": _frontier,
    }
    found = []
    for key, build in builders.items():
        if key in made and not made[key].empty:
            found.append(_view(key, *build(made[key], unit)))
        elif key in unavailable:
            found.append(View(key, TITLES[key], "", [], [], unavailable[key]))
    return found


def _view(key: str, about: str, columns: list[Column], table: pd.DataFrame) -> View:
    lines = []
    for row in table.astype(object).where(table.notna(), None).to_dict("records"):
        values = {str(k): v for k, v in row.items()}
        objective, condition = str(values.get("objective") or ""), str(values.get("condition") or "plain")
        note = formatting.without_seed_note(str(values.get("note") or ""))
        lines.append(
            {
                "line": key_of(objective, condition) if objective else "",
                "budget": values.get("budget") or "",
                "cells": [cell(values) for _, cell, _ in columns],
                "note": "" if key == "frontier" else note,
            }
        )
    return View(key, TITLES[key], about, [(title, is_text) for title, _, is_text in columns], lines)


def _equivalence(table: pd.DataFrame, unit: BudgetUnit) -> tuple[str, list[Column], pd.DataFrame]:
    columns: list[Column] = [
        OBJECTIVE,
        ("Budget", lambda r: unit.tick(int(r["budget"])), False),
        ("Measure", lambda r: str(r["label"]), True),
        ("Difference", lambda r: formatting.points(_float(r["difference"])), False),
        ("90% CI", lambda r: _to(*(formatting.points(_float(r[k])) for k in ("low90", "high90"))), False),
        ("Margin", lambda r: f"±{100 * r['margin']:g}", False),
        *P_VALUES,
        ("Equivalent", lambda r: "yes" if r["equivalent"] else "not shown", True),
    ]
    about = (
        f"Two one-sided tests (TOST) against a margin of ±{100 * MARGIN:g} points, the same in every study. “Not "
        "shown” does not mean that the two differ."
    )
    return about, columns, table


def _divergence(table: pd.DataFrame, _: BudgetUnit) -> tuple[str, list[Column], pd.DataFrame]:
    columns: list[Column] = [
        ("Test", lambda r: str(r["kind"]).replace("-check", " (check)"), True),
        ("Method", lambda r: "GEE" if r["method"] == "gee" else str(r["method"]), True),
        MEASURE,
        OBJECTIVE,
        AGAINST,
        ("Estimate", lambda r: _estimate(r, in_points=_in_points(r)), False),
        ("95% CI", lambda r: _interval(r, in_points=_in_points(r)), False),
        *P_VALUES,
        ("Unit", lambda r: ("points " if _in_points(r) else "") + str(r["unit"]), True),
    ]
    about = (
        "Slope of each measure on log2(budget), per objective and per pair of objectives; joint: whether any slopes "
        "differ. Logistic GEE clustered by prompt (log-odds per doubling, Wald test); as a check, slopes by cluster "
        "bootstrap (points per doubling)."
    )
    return about, columns, table


def _onset(table: pd.DataFrame, unit: BudgetUnit) -> tuple[str, list[Column], pd.DataFrame]:
    def place(row: dict[str, Any], key: str) -> str:
        value = row[key]
        return MISSING if value is None else NEVER if value == float("inf") else unit.tick(int(value))

    columns: list[Column] = [
        OBJECTIVE,
        MEASURE,
        ("Direction", lambda r: str(r["direction"]), True),
        ("Onset", lambda r: place(r, "estimate"), False),
        ("95% CI", lambda r: _to(place(r, "low"), place(r, "high")), False),
        ("Onset by tests", lambda r: place(r, "tested"), False),
        ("Draws without onset", lambda r: formatting.percent(_float(r["p_never"]), 0), False),
    ]
    about = (
        "First budget from which the difference to the base exceeds the threshold at that and every later budget, with "
        "an interval over bootstrap draws of prompts. By tests: the same, by simultaneous one-sided 95% bounds."
    )
    return about, columns, table


def _coupling(table: pd.DataFrame, _: BudgetUnit) -> tuple[str, list[Column], pd.DataFrame]:
    columns: list[Column] = [
        OBJECTIVE,
        MEASURE,
        ("Slope", lambda r: _signed(r, "estimate"), False),
        ("95% CI", lambda r: _interval(r, in_points=False), False),
        P_VALUES[0],
        ("Uncorrected slope", lambda r: _signed(r, "uncorrected"), False),
        ("Reliability", lambda r: MISSING if r["reliability"] is None else f"{r['reliability']:.2f}", False),
        ("Checkpoints", lambda r: str(r["n_points"]), False),
    ]
    about = (
        "Slope of ASR on capability along each objective’s trajectory from the base (points per point), corrected for "
        "measurement error in capability."
    )
    return about, columns, table


def _matched(table: pd.DataFrame, _: BudgetUnit) -> tuple[str, list[Column], pd.DataFrame]:
    def estimate(row: dict[str, Any]) -> str:
        if row["kind"] == "pair":
            return _estimate(row, in_points=True)
        return formatting.percent(_float(row["estimate"]))

    def interval(row: dict[str, Any]) -> str:
        if row["kind"] == "pair" or row["low"] is None:
            return _interval(row, in_points=True)
        return _to(formatting.percent(row["low"]), formatting.percent(row["high"]))

    columns: list[Column] = [
        MEASURE,
        OBJECTIVE,
        AGAINST,
        ("Capability", lambda r: formatting.percent(_float(r["capability"])), False),
        ("Estimate", estimate, False),
        ("95% CI", interval, False),
        *P_VALUES,
    ]
    about = (
        "Each objective at the same capability, interpolated along its trajectory (never extrapolated). Rows with an "
        "objective under “Against” are differences in points."
    )
    return about, columns, table


def _frontier(table: pd.DataFrame, unit: BudgetUnit) -> tuple[str, list[Column], pd.DataFrame]:
    drawn = "p_on_frontier" in table
    shown = table["on_frontier"].astype(bool)
    shown |= table["p_on_frontier"] >= 0.01 if drawn else False
    table = table.sort_values("p_on_frontier" if drawn else "on_frontier", ascending=False, kind="stable")
    columns: list[Column] = [
        OBJECTIVE,
        ("Budget", lambda r: unit.tick(int(r["budget"])) if r["budget"] else MISSING, False),
        ("Seed", lambda r: str(r["seed"]) if r["budget"] else MISSING, False),
        ("Accuracy", lambda r: formatting.percent(_float(r["capability"])), False),
        ("ASR", lambda r: formatting.percent(_float(r["asr"])), False),
        ("On frontier", lambda r: "yes" if r["on_frontier"] else "no", True),
        ("In draws", lambda r: formatting.percent(_float(r.get("p_on_frontier"))), False),
    ]
    about = (
        "A checkpoint is on the frontier if no other is at least as good on both accuracy and ASR and better on one. "
        "In draws: share of bootstrap draws of prompts in which it is. Rows: checkpoints on the frontier, or in at "
        "least 1% of draws."
    )
    return about, columns, table[shown.reindex(table.index)]


def _objective(row: dict[str, Any]) -> str:
    return formatting.objective_name(str(row["objective"]), str(row["condition"])) if row.get("objective") else "all"


def _against(row: dict[str, Any]) -> str:
    other = row.get("against")
    return formatting.objective_name(str(other), str(row.get("against_condition") or "plain")) if other else ""


OBJECTIVE: Column = ("Objective", _objective, True)
AGAINST: Column = ("Against", _against, True)
MEASURE: Column = ("Measure", lambda r: str(r["measure"]).replace("asr", "ASR").replace(":none", ", no attack"), True)
P_VALUES: list[Column] = [
    ("p", lambda r: formatting.p_value(_float(r["p"])), False),
    ("p (Holm)", lambda r: formatting.p_value(_float(r["p_holm"])), False),
]


def _estimate(row: dict[str, Any], *, in_points: bool) -> str:
    return formatting.points(_float(row["estimate"])) if in_points else _signed(row, "estimate")


def _interval(row: dict[str, Any], *, in_points: bool) -> str:
    if row.get("low") is None or row.get("high") is None:
        return MISSING
    if in_points:
        return _to(formatting.points(row["low"]), formatting.points(row["high"]))
    return _to(_signed(row, "low"), _signed(row, "high"))


def _to(low: str, high: str) -> str:
    return low if low == high == NEVER else f"{low} to {high}"


def _signed(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    return MISSING if value is None else f"{value:+.3f}".replace("-", formatting.MINUS)


def _in_points(row: dict[str, Any]) -> bool:
    return not str(row.get("unit") or "").startswith("log")


def _float(value: Any) -> float:
    return float("nan") if value is None else float(value)


OPTIONAL_TABLES = ("checks", "sd3", "benign", "judges", "corrected", "claims", "sequential")  # left out if empty
SCRIPTS = ("text", "theme", "tooltips", "filter", "rows", "search", "print", "start")
PARTIALS = ("claims", "design", "curves", "analyses", "persona", "judges", "ledger", "contrasts")
CONTENTS = {
    "claims": "Claims",
    "design": "Design",
    "tradeoff": "Trade-off",
    "budgets": "Budgets",
    "attacks": "Attacks",
    "analyses": "Analyses",
    "persona": "Persona",
    "judges": "Judges",
    "ledger": "Ledger",
    "contrasts": "Contrasts",
    "unscored": "Unscored",
}


def context(
    results: Results,
    made: dict[str, pd.DataFrame],
    lines: list[Series],
    drawings: list[Drawing],
    cards: Seq[Path] = (),
    unavailable: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Return what the templates show; `unavailable` holds the reason for each analysis without a table."""
    unavailable = unavailable or {}
    external, unit = narrative.external(results.manifest), BudgetUnit.of(results.manifest)
    is_external, equivalent = bool(external), made.get("equivalence")
    rank = {(s.objective, s.condition): n for n, s in enumerate(lines)}
    contrasts = formatting.to_records(made["contrasts"])
    contrasts.sort(key=lambda c: (rank[c["objective"], c["condition"]], c["budget"]))
    persona = formatting.to_records(made["persona"])
    persona.sort(key=lambda c: (rank.get((c["objective"], c["condition"]), -1), c["budget"]))
    advice = made.get("recommend", pd.DataFrame())
    return {
        **_assets(),
        **_study(results, lines, unit),
        **_ledger(results, lines),
        "external": external,
        "verdict": verdict(made["contrasts"], results.seeds, unit, external=is_external, equivalent=equivalent),
        "recommendations": recommendations(made["contrasts"], made["rates"], advice, lines, unit, equivalent),
        "limitations": limitations(made["contrasts"], made["unscored"], results.seeds, unit, external=is_external),
        "margin": f"{100 * float(equivalent['margin'].max()):g}" if equivalent is not None else "",
        "no_recommendation": unavailable.get("recommend", ""),
        "sequential": results.sequential,
        "views": views(made, unavailable, unit),
        "claims": formatting.to_records(made["claims"]) if "claims" in made else [],
        "declared_set": declared_set(results),
        "figures": {d.name: d for d in drawings},
        "inline": {d.name: Markup(d.inline) for d in drawings},
        "primary": [c for c in contrasts if c["primary"]],
        "secondary": [c for c in contrasts if not c["primary"]],
        "persona": persona,
        "unscored": formatting.to_records(made["unscored"]),
        "optional": {k: formatting.to_records(made[k]) if k in made else [] for k in OPTIONAL_TABLES},
        "confusions": narrative.confusion_tables(results),
        "judges": narrative.judge_summaries(results, [*cards]),
        "transcripts": transcripts(results.first_judged, results.conditions, lines),
        "embedded": embed_rows(results.rows, results.conditions, lines, unit),
    }


def _study(results: Results, lines: list[Series], unit: BudgetUnit) -> dict[str, Any]:
    """Return the study's name, design, provenance and filter options."""
    tuned = results.rows[results.rows["objective"] != BASE]
    budgets = sorted(int(b) for b in tuned["budget"].unique())
    attacks = sorted({str(a) for a in results.rows["attack"].dropna()} - {""}, key=lambda a: (a != metrics.DIRECT, a))
    filters: list[tuple[str, str, list[Any]]] = [
        ("line", "Objectives", [(key_of(s.objective, s.condition), s.label, s) for s in lines]),
        ("budget", "Steps" if unit.count == "steps" else "Budgets", [(str(b), unit.tick(b), None) for b in budgets]),
        ("attack", "Attacks", [(a, formatting.attack_name(a), None) for a in attacks]),
    ]
    return {
        "name": str(results.study.get("name") or results.folder.resolve().name),
        "manifest": results.manifest,
        "organism": bool(results.manifest.get("organism")),
        "description": narrative.study_description(results),
        "unit": unit,
        "seeds": results.seeds,
        "level": LEVEL,
        "resamples": intervals.RESAMPLES,
        "max_unscored": metrics.MAX_UNSCORED,
        "provenance": narrative.provenance(results.manifest),
        "filters": [one for one in filters if len(one[2]) > 1],
        "budget_choices": [("-1", "base"), *((str(b), unit.tick(b)) for b in budgets)],
    }


def _ledger(results: Results, lines: list[Series]) -> dict[str, Any]:
    rule = narrative.matching_rule(results.manifest)
    columns, matched = narrative.matched_columns(results.ledger, rule)
    order = list(dict.fromkeys(s.objective for s in lines))
    return {
        "matched_columns": columns,
        "matched": matched,
        "rule": rule,
        "per_objective": narrative.PER_OBJECTIVE,
        "cost": formatting.to_records(narrative.training_cost(results.ledger, order)),
    }


def _assets() -> dict[str, Any]:
    """Return the page's style and script, and the hashes that its Content Security Policy allows."""
    here = files("leeway.report.page")
    style = plotting.with_line_colours(here.joinpath("styles/page.css").read_text(encoding="utf-8"))
    parts = [here.joinpath(f"scripts/{name}.js").read_text(encoding="utf-8") for name in SCRIPTS]
    script = '"use strict";\n(() => {\n' + "\n".join(parts) + "})();\n"
    return {
        "style": Markup(style),
        "script": Markup(script),
        "style_hash": _hash(style),
        "script_hash": _hash(script),
    }


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def page(values: dict[str, Any]) -> str:
    """Render the page from the values of `context`."""
    environment = Environment(
        loader=PackageLoader("leeway.report.page", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for filter_ in (
        formatting.objective_name,
        formatting.percent,
        formatting.points,
        formatting.unsigned_points,
        formatting.count,
        formatting.without_seed_note,
        formatting.claim_value,
        plotting.themed,
    ):
        environment.filters[filter_.__name__] = filter_
    environment.filters |= {"p": formatting.p_value, "budget": values["unit"].tick, "line_key": key_of}
    results = "".join(environment.get_template(f"{name}.html.j2").render(values) for name in PARTIALS)
    contents = [(key, title) for key, title in CONTENTS.items() if f'<section id="{key}"' in results]
    return environment.get_template("page.html.j2").render(values, results=Markup(results), contents=contents)
