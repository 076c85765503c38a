"""Everything in a run directory that is made for readers, rebuilt from its rows."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from pathlib import Path

import pandas as pd

from leeway.report import figures, formatting, narrative
from leeway.report.exports import results_json
from leeway.report.formatting import Scale
from leeway.report.page import page as analyses
from leeway.report.page.page import FURTHER, context, page
from leeway.report.plotting import Drawing, Series, series_of, style
from leeway.report.results import Results
from leeway.report.written import replace_files


def rebuild(folder: Path, cards: Seq[Path] = (), claims: str | Path | None = None) -> Path:
    """Write `results.json`, `tables/`, `figures/`, `citation.bib`, model cards, `report.html`; same rows, same bytes.

    With judges' `cards`, refusal rates corrected for their errors stand beside the raw ones; `claims` written after the
    run stand beside the study's own. Only files that an earlier report wrote are replaced or removed
    (`report.written`); raises LeewayError, with nothing changed, where a user's file or a symbolic link is in the way.
    """
    results = Results.load(folder)
    made, why_not = _tables(results, [*cards], claims)
    lines = series_of(made["rates"], narrative.ordered(_objectives(results), results.study))
    drawings = draw(results, made, lines)
    shown = page(context(results, made, lines, drawings, cards, why_not))
    files: dict[str, str | bytes] = {**results_json.export_files(results, made, lines)}
    files |= {f"tables/{name}.csv": formatting.csv(table) for name, table in made.items()}
    for d in drawings:
        files |= {f"figures/{d.name}.{end}": getattr(d, end) for end in ("svg", "png", "pdf")}
    files |= {"results.json": formatting.dump(results_json.results_json(results, made)), "report.html": shown}
    replace_files(folder, files)
    return folder / "report.html"


def draw(results: Results, made: dict[str, pd.DataFrame], lines: list[Series]) -> list[Drawing]:
    """Every figure that the rows can carry, in the page's order."""
    pooled, scale = results.pooled_rates(), Scale.of(results.manifest)
    one_checkpoint = narrative.external(results.manifest).get("kind") == "audit"  # a curve needs two
    with style():
        found = [
            figures.forest(made["contrasts"], lines, scale),
            figures.tradeoff(pooled, lines, scale),
            None if one_checkpoint else figures.by_budget(pooled, lines, scale),
            figures.by_attack(pooled, lines, scale),
            figures.outcomes(made["outcomes"], lines, scale),
            figures.traits(pooled, lines, scale),
        ]
    return [drawing for drawing in found if drawing is not None]


def _tables(
    results: Results, cards: list[Path], claims: str | Path | None
) -> tuple[dict[str, pd.DataFrame], dict[str, str]]:
    """Every table by name, and why an analysis that was asked for is not there."""
    found = {
        "rates": results.rates(),
        "contrasts": results.contrasts(),
        "frontier": results.frontier(),
        "outcomes": results.outcomes(),
        "persona": results.persona(),
        "unscored": formatting.unscored(results.rows),
        "ledger": results.ledger,
        "checks": results.checks(),
        "sd3": results.likert(),
        "benign": results.outcomes("overrefusal"),
        "judges": narrative.agreement(results),
        "corrected": narrative.corrected(results, cards),
        "claims": results.claims(claims),
        "sequential": results.asked(),
    }
    kept = {k: t for k, t in found.items() if k not in FURTHER or not t.empty}
    more, why_not = analyses.analyses(results)
    return kept | more, why_not


def _objectives(results: Results) -> list[str]:
    return [str(o) for o in results.rows["objective"].unique()]
