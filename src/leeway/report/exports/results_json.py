"""`results.json`: everything on the page for programs to read, in a form that its published schema describes.

What is made beside the page: LaTeX tables, BibTeX, and a card in every checkpoint's folder.
"""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

import pandas as pd

from leeway.report import formatting, narrative
from leeway.report import results as claims
from leeway.report.exports import latex, model_card
from leeway.report.formatting import Scale
from leeway.report.plotting import Series
from leeway.report.results import Results
from leeway.report.verdict import LEVEL, verdict
from leeway.stats import intervals

FORMAT = 1  # raised when a reader of the file would have to change: new tables and columns are no such change
SCHEMA = f"urn:leeway:results:{FORMAT}"
KINDS = {bool: "boolean", int: "integer", float: "number", str: "string"}


def results_json(results: Results, made: dict[str, pd.DataFrame]) -> dict[str, Any]:
    """What was asked in brief, then every table as a list of records, and the type of each column."""
    external = narrative.external(results.manifest)
    records = {name: formatting.records(table) for name, table in made.items()}
    found: dict[str, Any] = {
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
            Scale.of(results.manifest),
            external=bool(external),
            equivalent=made.get("equivalence"),
        ),
        "columns": {name: column_types(lines, [str(c) for c in made[name].columns]) for name, lines in records.items()},
    }
    if declared := claims.about(results).get("hash"):
        found["claims_hash"] = declared
    return found | records


def column_types(lines: list[dict[str, Any]], columns: list[str]) -> dict[str, str]:
    """What a column's cells are where they are not null; `null` where all are."""
    return {c: _kind([line[c] for line in lines if line[c] is not None]) for c in columns}


def _kind(values: list[Any]) -> str:
    kinds = {KINDS.get(type(v), "string") for v in values}
    if kinds == {"integer", "number"}:
        return "number"
    return kinds.pop() if len(kinds) == 1 else "string" if kinds else "null"


def schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of `results.json`."""
    found: dict[str, Any] = json.loads(
        files("leeway.report.exports").joinpath("results.schema.json").read_text("utf-8")
    )
    return found


def export_files(results: Results, made: dict[str, pd.DataFrame], lines: list[Series]) -> dict[str, str]:
    """`tables/*.tex`, `citation.bib` and the model cards: text by path relative to the run directory."""
    found = {f"tables/{name}.tex": text for name, text in latex.paper_tables(results, made, lines).items()}
    found["citation.bib"] = model_card.of_run(results)
    return found | {
        str(path.relative_to(results.folder)): text for path, text in model_card.cards(results, made).items()
    }
