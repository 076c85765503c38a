"""Rebuild everything in a run directory that is made for readers, and replace only files that the report itself wrote.

The report records the path and digest of each file that it writes in `.report-files.json`. A later report replaces a
file only if its content is the recorded one (or already the new one), and removes a recorded file that it no longer
makes only if its content is unchanged. Any other file at a target path is a user's: LeewayError, nothing is written.
Symbolic links below the run directory are never followed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd

from leeway.errors import LeewayError
from leeway.hashing import file_digest
from leeway.io import write_file, write_json
from leeway.report import charts, figures, formatting, mechanism, mechanism_figures, narrative, tries
from leeway.report.charts import Chart
from leeway.report.exports import latex
from leeway.report.exports.model_card import model_cards, run_bibliography
from leeway.report.formatting import BudgetUnit
from leeway.report.page.analyses import analyses
from leeway.report.page.page import OPTIONAL_TABLES, context, page, responses
from leeway.report.plotting import Drawing, Series, order_objectives, series_of, style
from leeway.report.results import Results, declared_set
from leeway.report.verdict import LEVEL
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
        "verdict": narrative.verdict_sentences(results, made),
        "columns": {name: column_types(lines, [str(c) for c in made[name].columns]) for name, lines in records.items()},
    }
    if claims_hash := declared_set(results).get("hash"):
        content["claims_hash"] = claims_hash
    return content | records


def column_types(lines: list[dict[str, Any]], columns: list[str]) -> dict[str, str]:
    """Return the JSON type of each column's non-null cells, or `null` if all are null."""
    found = {}
    for c in columns:
        types = {JSON_TYPES.get(type(line[c]), "string") for line in lines if line[c] is not None}
        types = {"number"} if types == {"integer", "number"} else types or {"null"}
        found[c] = types.pop() if len(types) == 1 else "string"
    return found


def schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of `results.json`."""
    text = files("leeway.report.exports").joinpath("results.schema.json").read_text("utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


RECORD = ".report-files.json"
REMOVABLE = ("tables/*.csv", "tables/*.tex", "figures/*.svg", "figures/*.png", "figures/*.pdf")
MOVE = "move it away, and run the report again"


def rebuild(
    folder: Path, cards: Seq[Path] = (), claims: str | Path | None = None, redacted_page: Path | None = None
) -> Path:
    """Write `results.json`, `tables/`, `figures/`, `citation.bib`, model cards and `report.html`, deterministically.

    `cards` are judge cards, for refusal rates corrected for judge error; `claims` are further claims, written after the
    run; `redacted_page` is a file for the page without forbidden prompts and the answers to them. Returns the page's
    path. Raises LeewayError, with nothing changed, if a user's file or a symbolic link is at a target path.
    """
    results = Results.load(folder)
    if narrative.external(results.manifest).get("kind") == "logs":
        raise LeewayError(
            f"{folder} holds a comparison of logs", fix="open its compare.html, or compare the logs again"
        )
    made, unavailable = _tables(results, [*cards], claims)
    lines = _lines(results, made)
    drawings = draw(results, made, lines)
    files: dict[str, str | bytes] = {f"tables/{n}.tex": t for n, t in latex.paper_tables(results, made, lines).items()}
    files["citation.bib"] = run_bibliography(results)
    files |= {str(path.relative_to(folder)): text for path, text in model_cards(results, made).items()}
    files |= {f"tables/{name}.csv": formatting.to_csv(table) for name, table in made.items()}
    for d in drawings:
        files |= {f"figures/{d.name}.{end}": getattr(d, end) for end in ("svg", "png", "pdf")}
    files["results.json"] = formatting.to_json(results_json(results, made))
    values = context(results, made, lines, drawings, charts_of(results, made, lines), cards, unavailable)
    files["report.html"] = page(values)
    replace_files(folder, files)
    if redacted_page:
        write_file(redacted_page, page(values | responses(results.redacted(), lines, linked=False)))
    if not (folder / "rows.parquet").is_file():
        raise LeewayError(f"{folder} was removed while its report was made", fix="run the study again")
    return folder / "report.html"


def page_alone(results: Results, *, no_prompts: bool = False, full: bool = False) -> str:
    """Return the page of a run for another place, without links to files of the run directory.

    Without forbidden prompts and the answers to them, unless `full`; `no_prompts`: without any prompt.
    """
    made, unavailable = _tables(results, [], None)
    lines = _lines(results, made)
    values = context(results, made, lines, [], charts_of(results, made, lines), [], unavailable)
    shown = results if full else results.redacted(no_prompts=no_prompts)
    return page(values | responses(shown, lines, linked=False))


def draw(results: Results, made: dict[str, pd.DataFrame], lines: list[Series]) -> list[Drawing]:
    """Draw every figure that the rows allow, in the page's order."""
    pooled, unit = results.pooled_rates(), BudgetUnit.of(results.manifest)
    one_checkpoint = narrative.external(results.manifest).get("kind") == "audit"  # a curve needs two
    with style():
        drawings = [
            figures.forest(made["contrasts"], lines, unit),
            figures.tradeoff(pooled, lines, unit),
            None if one_checkpoint else figures.by_budget(pooled, lines, unit),
            figures.by_attack(pooled, lines, unit),
            tries.figure(made.get("asr-at-k"), lines),
            figures.outcomes(made["outcomes"], lines, unit),
            figures.traits(pooled, lines, unit),
            figures.loss(results.training_steps(), lines),
            figures.learning(results.learning(pool_seeds=True), lines, unit),
            *mechanism_figures.drawings(mechanism.Probe.of(results), made["contrasts"], lines),
        ]
    return [drawing for drawing in drawings if drawing is not None]


def charts_of(results: Results, made: dict[str, pd.DataFrame], lines: list[Series]) -> list[Chart]:
    """Return every chart of the page that the rows allow."""
    pooled, unit = results.pooled_rates(), BudgetUnit.of(results.manifest)
    found = [
        charts.tradeoff(pooled, lines, unit),
        *charts.by_budget(pooled, lines, unit),
        *charts.attacks(pooled, made["contrasts"], lines, unit),
        charts.tries(tries.shown(made["asr-at-k"]), lines, unit) if "asr-at-k" in made else None,
        charts.outcomes(made["outcomes"], lines, unit),
        charts.traits(pooled, lines, unit),
        charts.training(results.training_steps(), lines),
        charts.learning(results.learning(pool_seeds=True), lines, unit),
        charts.forest(made["contrasts"], lines, unit),
        charts.dose(*results.dose),
        *charts.mechanism(mechanism.Probe.of(results), made["contrasts"], lines),
    ]
    return [chart for chart in found if chart is not None]


def _tables(
    results: Results, cards: list[Path], claims: str | Path | None
) -> tuple[dict[str, pd.DataFrame], dict[str, str]]:
    """Return every table by name, and the reason for each analysis that is unavailable."""
    order = _order(results)
    tables = {
        "rates": results.rates(),
        "contrasts": results.contrasts(),
        "frontier": results.frontier(),
        "outcomes": results.outcomes(),
        "persona": results.persona(),
        "asr-at-k": results.asr_at_k(),
        "thinking": results.thinking(),
        "unscored": _unscored(results.all_judged),
        "identity": results.identity(),
        "ledger": results.ledger,
        "checks": results.checks(),
        "sd3": results.likert(),
        "alignment": results.alignment(),
        "sycophancy": results.sycophancy(),
        "benign": results.outcomes("overrefusal"),
        "judges": results.judge_agreement[0],
        "judge_pairs": results.judge_pairs(),
        "worst_case": results.worst_case(),
        "corrected": narrative.corrected_rates(results, cards),
        "claims": results.claims(claims),
        "sequential": results.stopping(),
        "learning": results.learning(),
        "learned": results.learned().sort_values("objective", kind="stable", key=lambda o: o.map(order.index)),
        "triggers": results.triggers(),
        "controls": results.controls(),
        "dose": results.dose[0],
        "detection": results.dose[1],
    }
    tables = {k: t for k, t in tables.items() if k not in OPTIONAL_TABLES or not t.empty}
    more, unavailable = analyses(results)
    return tables | more | mechanism.tables(results), unavailable


def _order(results: Results) -> list[str]:
    return order_objectives([str(o) for o in results.rows["objective"].unique()], results.study)


def _lines(results: Results, made: dict[str, pd.DataFrame]) -> list[Series]:
    return series_of(made["rates"], _order(results))


def _unscored(rows: pd.DataFrame) -> pd.DataFrame:
    """Count the unscored responses of each evaluation (and further judge) by reason; one line with 0 without any."""
    reasons = rows["unscored_reason"].fillna("no reason given")
    missing = rows.assign(reason=reasons)[rows["score"].isna()]
    answers = rows.groupby("eval").size().rename("answers")
    counts = missing.groupby(["eval", "reason"]).size().rename("unscored").reset_index()
    scored = pd.DataFrame({"eval": [e for e in answers.index if e not in set(counts["eval"])]})
    table = pd.concat([counts, scored.assign(reason="", unscored=0)], ignore_index=True)
    table = table.join(answers, on="eval").sort_values(["eval", "reason"])
    return table[["eval", "answers", "unscored", "reason"]].reset_index(drop=True)


def replace_files(folder: Path, files: Mapping[str, str | bytes]) -> None:
    """Write `files` (content by path relative to `folder`), and remove what only an earlier report wrote.

    Raises LeewayError, with nothing changed, if a path is or leads through a symbolic link, or holds a user's file.
    """
    contents = {name: text.encode("utf-8") if isinstance(text, str) else text for name, text in files.items()}
    digests = {name: hashlib.sha256(content).hexdigest()[:16] for name, content in contents.items()}  # = file_digest
    before = _read_record(folder)
    if outside := next((n for n in contents if ".." in Path(n).parts or Path(n).is_absolute()), None):
        raise LeewayError(f"{folder}: {outside} lies outside it", fix="run the study again")
    for name in [RECORD, *contents]:
        path, own = folder / name, {*before.get(name, []), digests.get(name, "")}
        if link := _symlink(folder, path):
            raise LeewayError(f"{link} is a symbolic link", fix=MOVE)
        above = [p for p in path.parents if p.is_relative_to(folder)]
        if blocked := next((p for p in above if p.exists() and not p.is_dir()), None):
            raise LeewayError(f"{blocked} is a file, and a folder of the report", fix=MOVE)
        if name != RECORD and path.exists() and not (path.is_file() and file_digest(path) in own):
            raise LeewayError(f"{path} is not a file that the report wrote", fix=MOVE)
    # until all files are written both contents are the report's own: it may be killed in between
    either = {n: sorted({*before.get(n, []), *([digests[n]] if n in digests else [])}) for n in {*before, *digests}}
    write_json(folder / RECORD, either)
    for name in sorted(before.keys() - contents.keys()):  # of an earlier report, unless edited since
        path = folder / name
        removable = any(Path(name).match(pattern) for pattern in REMOVABLE) and len(Path(name).parts) == 2
        if removable and not _symlink(folder, path) and path.is_file() and file_digest(path) in before[name]:
            path.unlink()
    for name, content in contents.items():
        write_file(folder / name, content)
    write_json(folder / RECORD, {name: [digest] for name, digest in digests.items()})


def _read_record(folder: Path) -> dict[str, list[str]]:
    """Return digests by path; empty without a readable record, so that no file counts as the report's."""
    path = folder / RECORD
    try:
        record = {} if path.is_symlink() else json.loads(path.read_text("utf-8"))
        return {str(name): [str(d) for d in digests] for name, digests in record.items()}
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return {}


def _symlink(folder: Path, path: Path) -> Path | None:
    """Return the first symbolic link on the way from `folder` to `path`, or None."""
    way = [path, *path.parents]
    below = way[: way.index(folder)] if folder in way else way
    return next((p for p in reversed(below) if p.is_symlink()), None)
