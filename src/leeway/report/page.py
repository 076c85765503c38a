"""The page: everything in a run directory that is made for readers, rebuilt from its rows."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from leeway.report import curves, judging, panels, summary, tables, wording
from leeway.report.figures import Drawing, style
from leeway.report.results import Results
from leeway.report.scale import Scale
from leeway.report.series import Series, series_of
from leeway.report.transcripts import transcripts
from leeway.report.verdict import LEVEL, verdict
from leeway.stats import intervals, measures

FURTHER = ("checks", "sd3", "benign", "judges", "corrected")  # tables that are there where something was asked
FORMAT = 1  # of results.json: raised when a reader of it would have to change


def build(folder: Path, cards: Seq[Path] = ()) -> Path:
    """Write `results.json`, `tables/`, `figures/`, `report.html`; the same rows give the same bytes.

    With judges' `cards`, refusal rates corrected for their errors stand beside the raw ones.
    """
    results = Results.load(folder)
    made = _tables(results, [*cards])
    lines = series_of(made["rates"], summary.ordered(_objectives(results), results.study))
    drawings = draw(results, made, lines)
    page = _page(results, made, lines, drawings)
    _clear(folder, set(made), {d.name for d in drawings})
    for name, table in made.items():
        tables.write_atomically(folder / "tables" / f"{name}.csv", tables.csv(table))
    for drawing in drawings:
        tables.write_atomically(folder / "figures" / f"{drawing.name}.svg", drawing.svg)
        tables.write_atomically(folder / "figures" / f"{drawing.name}.png", drawing.png)
    tables.write_atomically(folder / "results.json", tables.dump(_machine(results, made)))
    tables.write_atomically(folder / "report.html", page)
    return folder / "report.html"


def draw(results: Results, made: dict[str, pd.DataFrame], lines: list[Series]) -> list[Drawing]:
    """Every figure that the rows can carry, in the page's order."""
    pooled, scale = results.pooled_rates(), Scale.of(results.manifest)
    one_checkpoint = summary.elsewhere(results.manifest).get("kind") == "audit"  # a curve needs two
    with style():
        found = [
            panels.forest(made["contrasts"], lines, scale),
            curves.tradeoff(pooled, lines, scale),
            None if one_checkpoint else curves.by_budget(pooled, lines, scale),
            panels.by_attack(pooled, lines, scale),
            panels.outcomes(made["outcomes"], lines, scale),
            curves.traits(pooled, lines, scale),
        ]
    return [drawing for drawing in found if drawing is not None]


def _tables(results: Results, cards: list[Path]) -> dict[str, pd.DataFrame]:
    found = {
        "rates": results.rates(),
        "contrasts": results.contrasts(),
        "frontier": results.frontier(),
        "outcomes": results.outcomes(),
        "persona": results.persona(),
        "unscored": tables.unscored(results.rows),
        "ledger": results.ledger,
        "checks": results.checks(),
        "sd3": results.likert(),
        "benign": results.outcomes("overrefusal"),
        "judges": judging.agreement(results),
        "corrected": judging.corrected(results, cards),
    }
    return {k: t for k, t in found.items() if k not in FURTHER or not t.empty}


def _page(results: Results, made: dict[str, pd.DataFrame], lines: list[Series], drawings: list[Drawing]) -> str:
    environment = Environment(
        loader=PackageLoader("leeway.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for words in (
        wording.name,
        wording.attack,
        wording.percent,
        wording.points,
        wording.count,
    ):
        environment.filters[words.__name__] = words
    scale, elsewhere = Scale.of(results.manifest), summary.elsewhere(results.manifest)
    environment.filters |= {"p": wording.p_value, "budget": scale.tick}
    rule = summary.matching(results.manifest)
    columns, matched = summary.matched(results.ledger, rule)
    rank = {(s.objective, s.condition): n for n, s in enumerate(lines)}
    contrasts = tables.records(made["contrasts"])
    contrasts.sort(key=lambda c: (rank[c["objective"], c["condition"]], c["budget"]))
    persona = tables.records(made["persona"])
    persona.sort(key=lambda c: (rank.get((c["objective"], c["condition"]), -1), c["budget"]))
    context: dict[str, Any] = {
        "style": Markup(files("leeway.report").joinpath("page.css").read_text(encoding="utf-8")),
        "name": str(results.study.get("name") or results.folder.resolve().name),
        "manifest": results.manifest,
        "organism": bool(results.manifest.get("organism")),
        "asked": summary.asked(results),
        "scale": scale,
        "elsewhere": elsewhere,
        "verdict": verdict(made["contrasts"], results.seeds, scale, elsewhere=bool(elsewhere)),
        "figures": {d.name: d for d in drawings},
        "inline": {d.name: Markup(d.inline) for d in drawings},
        "primary": [c for c in contrasts if c["primary"]],
        "secondary": [c for c in contrasts if not c["primary"]],
        "frontier": [f for f in tables.records(made["frontier"]) if f["on_frontier"]],
        "persona": persona,
        "unscored": tables.records(made["unscored"]),
        "matched_columns": columns,
        "matched": matched,
        "rule": rule,
        "by_objective": summary.BY_OBJECTIVE,
        "cost": tables.records(summary.cost(results.ledger, [s.objective for s in lines])),
        "further": {k: tables.records(made[k]) if k in made else [] for k in FURTHER},
        "confusions": judging.confusions(results),
        "transcripts": transcripts(results.first_judged, results.conditions, lines),
        "provenance": summary.provenance(results.manifest),
        "seeds": results.seeds,
        "level": LEVEL,
        "resamples": intervals.RESAMPLES,
        "max_unscored": measures.MAX_UNSCORED,
    }
    return environment.get_template("page.html.j2").render(context)


def _machine(results: Results, made: dict[str, pd.DataFrame]) -> dict[str, Any]:
    elsewhere = summary.elsewhere(results.manifest)
    found: dict[str, Any] = {
        "format": FORMAT,
        "leeway": results.manifest.get("leeway"),
        "study": results.study.get("name"),
        "study_hash": results.manifest.get("study_hash"),
        "organism": bool(results.manifest.get("organism")),
        "seeds": results.seeds,
        "conditions": results.conditions,
        "level": LEVEL,
        "resamples": intervals.RESAMPLES,
        "verdict": verdict(made["contrasts"], results.seeds, Scale.of(results.manifest), elsewhere=bool(elsewhere)),
    }
    return found | {name: tables.records(table) for name, table in made.items()}


def _objectives(results: Results) -> list[str]:
    return [str(o) for o in results.rows["objective"].unique()]


def _clear(folder: Path, tables_made: set[str], figures_made: set[str]) -> None:
    """Remove what an earlier report left and this one does not make: a stale figure would look current."""
    for kind, made, ends in (("tables", tables_made, {".csv"}), ("figures", figures_made, {".svg", ".png"})):
        for old in sorted((folder / kind).glob("*")) if (folder / kind).is_dir() else []:
            if old.suffix in ends and old.stem not in made:
                old.unlink()
