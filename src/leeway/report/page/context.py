"""Everything that the page's templates are given."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence as Seq
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup

from leeway.report import claims, inline, judging, summary, tables, wording
from leeway.report.figures import Drawing
from leeway.report.marks import key_of
from leeway.report.page import analyses
from leeway.report.page.archive import archive
from leeway.report.page.decide import caveats, decisions
from leeway.report.page.transcripts import transcripts
from leeway.report.results import Results
from leeway.report.scale import Scale
from leeway.report.series import Series
from leeway.report.verdict import LEVEL, verdict
from leeway.stats import intervals, measures
from leeway.stats.measures import BASE

FURTHER = (
    "checks",
    "sd3",
    "benign",
    "judges",
    "corrected",
    "claims",
    "sequential",
)  # tables that are there where something was asked
SCRIPTS = ("text", "theme", "tips", "pick", "rows", "audit", "print", "start")
PARTIALS = ("claims", "asked", "curves", "analyses", "persona", "judges", "ledger", "contrasts")
CONTENTS = {
    "claims": "Claims",
    "asked": "Asked",
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
    why_not: dict[str, str] | None = None,
) -> dict[str, Any]:
    """What the templates show, from finished tables and figures."""
    known, scale, same = summary.elsewhere(results.manifest), Scale.of(results.manifest), made.get("equivalence")
    rank = {(s.objective, s.condition): n for n, s in enumerate(lines)}
    contrasts = tables.records(made["contrasts"])
    contrasts.sort(key=lambda c: (rank[c["objective"], c["condition"]], c["budget"]))
    persona = tables.records(made["persona"])
    persona.sort(key=lambda c: (rank.get((c["objective"], c["condition"]), -1), c["budget"]))
    return {
        **_assets(),
        **_shell(results, lines, scale),
        **_ledger(results, lines),
        "elsewhere": known,
        "verdict": verdict(made["contrasts"], results.seeds, scale, elsewhere=bool(known), equivalent=same),
        "decisions": decisions(
            made["contrasts"], made["rates"], made.get("recommend", pd.DataFrame()), lines, scale, same
        ),
        "caveats": caveats(made["contrasts"], made["unscored"], results.seeds, scale, elsewhere=bool(known)),
        "margin": f"{100 * float(same['margin'].max()):g}" if same is not None else "",
        "why_no_advice": (why_not or {}).get("recommend", ""),
        "sequential": results.sequential,
        "views": analyses.views(made, why_not or {}, scale),
        "claims": tables.records(made["claims"]) if "claims" in made else [],
        "claims_about": claims.about(results),
        "figures": {d.name: d for d in drawings},
        "inline": {d.name: Markup(d.inline) for d in drawings},
        "primary": [c for c in contrasts if c["primary"]],
        "secondary": [c for c in contrasts if not c["primary"]],
        "persona": persona,
        "unscored": tables.records(made["unscored"]),
        "further": {k: tables.records(made[k]) if k in made else [] for k in FURTHER},
        "confusions": judging.confusions(results),
        "cards": judging.shown(results, [*cards]),
        "transcripts": transcripts(results.first_judged, results.conditions, lines),
        "archive": archive(results.rows, results.conditions, lines, scale),
    }


def _shell(results: Results, lines: list[Series], scale: Scale) -> dict[str, Any]:
    """The study's name and what surrounds its numbers."""
    tuned = results.rows[results.rows["objective"] != BASE]
    budgets = sorted(int(b) for b in tuned["budget"].unique())
    attacks = sorted({str(a) for a in results.rows["attack"].dropna()} - {""}, key=lambda a: (a != measures.DIRECT, a))
    pick: list[tuple[str, str, list[Any]]] = [
        ("line", "Objectives", [(key_of(s.objective, s.condition), s.label, s) for s in lines]),
        ("budget", "Steps" if scale.count == "steps" else "Budgets", [(str(b), scale.tick(b), None) for b in budgets]),
        ("attack", "Attacks", [(a, wording.attack(a), None) for a in attacks]),
    ]
    return {
        "name": str(results.study.get("name") or results.folder.resolve().name),
        "manifest": results.manifest,
        "organism": bool(results.manifest.get("organism")),
        "asked": summary.asked(results),
        "scale": scale,
        "seeds": results.seeds,
        "level": LEVEL,
        "resamples": intervals.RESAMPLES,
        "max_unscored": measures.MAX_UNSCORED,
        "provenance": summary.provenance(results.manifest),
        "pick": [one for one in pick if len(one[2]) > 1],
        "budget_choices": [("-1", "base, untrained"), *((str(b), scale.tick(b)) for b in budgets)],
    }


def _ledger(results: Results, lines: list[Series]) -> dict[str, Any]:
    rule = summary.matching(results.manifest)
    columns, matched = summary.matched(results.ledger, rule)
    return {
        "matched_columns": columns,
        "matched": matched,
        "rule": rule,
        "by_objective": summary.BY_OBJECTIVE,
        "cost": tables.records(summary.cost(results.ledger, list(dict.fromkeys(s.objective for s in lines)))),
    }


def _assets() -> dict[str, Any]:
    """The page's own style and script, and the hashes by which its policy knows them."""
    here = files("leeway.report.page")
    own = {f"--{k}": v for k, v in (("light", inline.colours(dark=False)), ("dark", inline.colours(dark=True)))}
    style = here.joinpath("styles/page.css").read_text(encoding="utf-8")
    style = style.replace("/* lines, light */", own["--light"]).replace("/* lines, dark */", own["--dark"])
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
