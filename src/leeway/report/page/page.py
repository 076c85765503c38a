"""Render `report.html`: one self-contained page from the finished tables, figures and budget analyses."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence as Seq
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup

from leeway.report import formatting, judges, learning, mechanism, narrative, plotting
from leeway.report.charts import Chart
from leeway.report.controls import page_values
from leeway.report.finding import finding
from leeway.report.formatting import BudgetUnit, show_invisible
from leeway.report.objective_table import notes_of
from leeway.report.page.analyses import MARGIN, views
from leeway.report.page.mechanism import section
from leeway.report.page.transcripts import embed_rows, transcripts
from leeway.report.plotting import Drawing, Series, key_of
from leeway.report.results import Results, declared_set
from leeway.report.verdict import LEVEL, headline, limitations, recommendations
from leeway.stats import intervals, metrics
from leeway.stats.metrics import BASE, LOG_ODDS

DARK_INK = {
    "#1c1e21": "#e6e7e9",
    "#ffffff": "#1a1d21",
    "#9aa0a6": "#7d848b",
    "#6b6b6b": "#8a8f95",
}  # of charts in the dark theme
OPTIONAL_TABLES = (
    "asr-at-k",
    "thinking",
    "checks",
    "sd3",
    "alignment",
    "sycophancy",
    "benign",
    "judges",
    "judge_pairs",
    "worst_case",
    "corrected",
    "claims",
    "sequential",
    "learning",
    "learned",
    "triggers",
    "controls",
    "dose",
    "detection",
)  # left out if empty
SCRIPTS = ("text", "theme", "tooltips", "charts", "filter", "rows", "search", "print", "start")
VENDORED = ("vega", "vega-lite", "vega-interpreter")  # page/vendor/README.md
EVIDENCE = ("claims", "curves", "persona", "behaviour", "mechanism", "controls")
AUDIT = ("contrasts", "analyses", "judges", "ledger", "design")
CONTENTS = {
    "claims": "Claims",
    "capability": "Capability",
    "attacks": "Attack success",
    "overrefusal": "Over-refusal",
    "persona": "Persona",
    "behaviour": "Behaviour",
    "mechanism": "Mechanism",
    "controls": "Controls",
    "contrasts": "Contrasts",
    "analyses": "Analyses",
    "judges": "Judges",
    "ledger": "Ledger",
    "design": "Design",
    "unscored": "Unscored",
}
FILES = {"by-attack-change": "by-attack", "training": "loss"}  # a chart's figure file, where the names differ


def context(
    results: Results,
    made: dict[str, pd.DataFrame],
    lines: list[Series],
    drawings: list[Drawing],
    charts: list[Chart],
    cards: Seq[Path],
    unavailable: dict[str, str],
) -> dict[str, Any]:
    """Return what the templates show; `unavailable` holds the reason for each analysis without a table.

    `drawings` are the figure files that the charts' captions link to.
    """
    unit = BudgetUnit.of(results.manifest)
    return {
        **_assets(),
        **_study(results, lines, unit),
        **_ledger(results, lines),
        **_conclusions(results, made, lines, unit),
        **_analyses(results, made, lines, unit, unavailable),
        **_charts(charts, drawings),
        **_contrasts(made, lines),
        **_judges(results, made, unit, cards),
        **responses(results, lines, linked=True),
    }


def responses(results: Results, lines: list[Series], *, linked: bool) -> dict[str, Any]:
    """Return the values of `context` that hold prompts and answers; of `Results.redacted()` for a page without them.

    `linked`: whether the page lies in the run directory, whose figures and tables it can link to.
    """
    unit = BudgetUnit.of(results.manifest)
    return {
        "linked": linked,
        "redacted": bool(results.manifest.get("redacted")),
        "transcripts": transcripts(results.first_judged, results.conditions, lines),
        "embedded": embed_rows(results.rows, results.conditions, lines, unit),
    }


def _conclusions(
    results: Results, made: dict[str, pd.DataFrame], lines: list[Series], unit: BudgetUnit
) -> dict[str, Any]:
    """Return the findings, the verdict in full, the recommendations and the limitations."""
    external, void = narrative.external(results.manifest), learning.void_arms(made.get("learned"), made["contrasts"])
    known = (made.get("recommend", pd.DataFrame()), lines, unit, made.get("equivalence"), made.get("identity"), void)
    caveats = limitations(made["contrasts"], made["unscored"], results.seeds, unit, external=bool(external))
    return {
        "external": external,
        "findings": _findings(results, made, unit, void),
        "verdict": narrative.verdict_sentences(results, made),
        "recommendations": recommendations(made["contrasts"], made["rates"], *known),
        "limitations": caveats + notes_of(results.ledger, results.study),
        "margin": f"{100 * MARGIN:g}" if "equivalence" in made else "",
    }


def _analyses(
    results: Results, made: dict[str, pd.DataFrame], lines: list[Series], unit: BudgetUnit, unavailable: dict[str, str]
) -> dict[str, Any]:
    """Return what was declared, probed, controlled and computed beyond the contrasts."""
    return {
        "mechanism": section(mechanism.Probe.of(results), lines),
        "controls": page_values(results),
        "no_recommendation": unavailable.get("recommend", ""),
        "sequential": results.sequential,
        "learning_sentences": learning.sentences(made.get("learned"), made["contrasts"], results.manifest, unit),
        "learning_rule": learning.RULE,
        "views": views(made, unavailable, unit),
        "claims": formatting.to_records(made["claims"]) if "claims" in made else [],
        "declared_set": declared_set(results),
        "unscored": formatting.to_records(made["unscored"]),
        "optional": {k: formatting.to_records(made[k]) if k in made else [] for k in OPTIONAL_TABLES},
    }


def _contrasts(made: dict[str, pd.DataFrame], lines: list[Series]) -> dict[str, Any]:
    """Return the tables of contrasts and of persona traits, by objective and budget."""
    rank = {(s.objective, s.condition): n for n, s in enumerate(lines)}

    def place(line: dict[str, Any]) -> tuple[int, int]:
        return rank.get((line["objective"], line["condition"]), -1), line["budget"]

    contrasts = sorted(formatting.to_records(made["contrasts"]), key=place)
    first = [bool(headline(c, made["contrasts"])) or c["measure"] in LOG_ODDS for c in contrasts]
    return {
        "primary": [c for c, is_primary in zip(contrasts, first, strict=True) if is_primary],
        "secondary": [c for c, is_primary in zip(contrasts, first, strict=True) if not is_primary],
        "persona": sorted(formatting.to_records(made["persona"]), key=place),
    }


def _judges(results: Results, made: dict[str, pd.DataFrame], unit: BudgetUnit, cards: Seq[Path]) -> dict[str, Any]:
    return {
        "judge_sentences": judges.sentences(made.get("judge_pairs"), made.get("worst_case"), unit),
        "judge_rule": judges.RULE,
        "confusions": results.judge_agreement[1],
        "judges": narrative.judge_summaries(results, [*cards]),
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


def _findings(results: Results, made: dict[str, pd.DataFrame], unit: BudgetUnit, void: Any) -> list[dict[str, Any]]:
    """Return the finding at each budget, the largest last."""
    contrasts, known = made["contrasts"], made.get("recommend", pd.DataFrame())
    budgets = sorted(int(b) for b in contrasts["budget"].unique()) if len(contrasts) else [None]
    found = []
    for budget in budgets:
        own = contrasts if budget is None else contrasts[contrasts["budget"] == budget]
        text = finding(
            own,
            made["rates"],
            known,
            unit,
            results.seeds,
            equivalent=made.get("equivalence"),
            identity=made.get("identity"),
            void=void,
            external=bool(narrative.external(results.manifest)),
        )
        found.append({"budget": budget, "text": text})
    return found


def _charts(charts: list[Chart], drawings: list[Drawing]) -> dict[str, Any]:
    """Return the charts by name, their specifications as JSON that is safe inside a script element, and their files."""
    drawn = {d.name for d in drawings}
    named = {c.name: FILES.get(c.name, "by-budget" if c.name.startswith("by-budget") else c.name) for c in charts}
    as_json = {c.name: json.dumps(c.spec, ensure_ascii=False, allow_nan=False, separators=(",", ":")) for c in charts}
    return {
        "charts": {c.name: c for c in charts},
        "specs": {name: Markup(show_invisible(text).replace("<", "\\u003c")) for name, text in as_json.items()},
        "files": {name: file if file in drawn else "" for name, file in named.items()},
        "dark_colours": Markup(json.dumps({**plotting.ON_DARK, **DARK_INK})),
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
    own = "\n".join(here.joinpath(f"scripts/{name}.js").read_text(encoding="utf-8") for name in SCRIPTS)
    vendored = [here.joinpath(f"vendor/{name}.min.js").read_text(encoding="utf-8") for name in VENDORED]
    scripts = [*vendored, f'"use strict";\n(() => {{\n{own}}})();\n']
    return {
        "style": Markup(style),
        "style_hash": _sha256(style),
        "scripts": [Markup(text) for text in scripts],
        "script_hashes": [_sha256(text) for text in scripts],
    }


def _sha256(text: str) -> str:
    """Return a hash in the form of a Content Security Policy."""
    return base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def page(values: dict[str, Any]) -> str:
    """Render the page from the values of `context`."""
    filters = {"themed": plotting.themed, "budget": values["unit"].tick, "line_key": key_of}
    environment = formatting.templates("leeway.report.page", "templates", html=True, **filters)
    parts = {}
    for name, partials in (("evidence", EVIDENCE), ("audit", AUDIT)):
        parts[name] = "".join(environment.get_template(f"{p}.html.j2").render(values) for p in partials)
    found = {n: [(k, t) for k, t in CONTENTS.items() if f'<section id="{k}"' in text] for n, text in parts.items()}
    html = {name: Markup(text) for name, text in parts.items()}
    return environment.get_template("page.html.j2").render(values, **html, contents=found)
