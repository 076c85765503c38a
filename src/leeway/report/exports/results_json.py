"""Write `results.json` and its schema, and collect the other exported files: LaTeX, BibTeX and model cards."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

import pandas as pd

from leeway.report import formatting, narrative
from leeway.report.exports import latex
from leeway.report.exports.model_card import model_cards, run_bibliography
from leeway.report.formatting import BudgetUnit
from leeway.report.plotting import Series
from leeway.report.results import Results, declared_set
from leeway.report.verdict import LEVEL, verdict
from leeway.stats import intervals

FORMAT = 1  # raised by a breaking change; new tables and columns are not one
SCHEMA = f"urn:leeway:results:{FORMAT}"
JSON_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}


def results_json(results: Results, made: dict[str, pd.DataFrame]) -> dict[str, Any]:
    """Return the study in brief, every table as a list of records, and the type of each column."""
    records = {name: formatting.to_records(table) for name, table in made.items()}
    content: dict[str, Any] = {
        "$schema": SCHEMA,
        "format": FORMAT,
        "leeway": results.manifest.get("leeway"),
        "study": results.study.get("name"),
        "study_hash": results.manifest.get("study_hash"),
        "organism": bool(results.manifest.get("organism")),
        "seeds": results.seeds,
        "conditions": results.conditions,
        "level": LEVEL,
        "resamples": intervals.RESAMPLES,
        "verdict": verdict(
            made["contrasts"],
            results.seeds,
            BudgetUnit.of(results.manifest),
            external=bool(narrative.external(results.manifest)),
            equivalent=made.get("equivalence"),
        ),
        "columns": {name: column_types(lines, [str(c) for c in made[name].columns]) for name, lines in records.items()},
    }
    if claims_hash := declared_set(results).get("hash"):
        content["claims_hash"] = claims_hash
    return content | records


def column_types(lines: list[dict[str, Any]], columns: list[str]) -> dict[str, str]:
    """Return the JSON type of each column's non-null cells, or `null` if all are null."""
    return {c: _json_type([line[c] for line in lines if line[c] is not None]) for c in columns}


def _json_type(values: list[Any]) -> str:
    types = {JSON_TYPES.get(type(v), "string") for v in values}
    if types == {"integer", "number"}:
        return "number"
    return types.pop() if len(types) == 1 else "string" if types else "null"


def schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of `results.json`."""
    text = files("leeway.report.exports").joinpath("results.schema.json").read_text("utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def export_files(results: Results, made: dict[str, pd.DataFrame], lines: list[Series]) -> dict[str, str]:
    """Return `tables/*.tex`, `citation.bib` and model cards as text by path relative to the run directory."""
    texts = {f"tables/{name}.tex": text for name, text in latex.paper_tables(results, made, lines).items()}
    texts["citation.bib"] = run_bibliography(results)
    cards = model_cards(results, made)
    return texts | {str(path.relative_to(results.folder)): text for path, text in cards.items()}
