"""Render `report.html`: one self-contained page from the finished tables and figures."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence as Seq
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from leeway.report import formatting, narrative, plotting
from leeway.report.formatting import BudgetUnit
from leeway.report.page.analyses import views
from leeway.report.page.transcripts import embed_rows, transcripts
from leeway.report.plotting import Drawing, Series, key_of
from leeway.report.results import Results, declared_set
from leeway.report.verdict import LEVEL, limitations, recommendations, verdict
from leeway.stats import intervals, metrics
from leeway.stats.metrics import BASE

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
