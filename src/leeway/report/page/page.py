"""The page itself: its templates over what they are given.

The questions over budgets as tables for the page: do objectives diverge, from where on, at what price, how sure.

Everything that the page's templates are given.
"""

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
from leeway.report import results as claims
from leeway.report.formatting import Scale
from leeway.report.page.transcripts import archive, transcripts
from leeway.report.plotting import Drawing, Series, key_of
from leeway.report.results import ReportError, Results
from leeway.report.verdict import LEVEL, caveats, decisions, verdict
from leeway.stats import intervals, metrics
from leeway.stats.metrics import BASE
from leeway.stats.pareto import MEASURES as WEIGHED

Column = tuple[str, Callable[[dict[str, Any]], str], bool]  # title, what it shows, whether it is words
MARGIN = 0.05  # of the page's equivalence tests, stated on it; a claim or a gate has its own
OVER_BUDGETS = ("asr", "endorsement", "accuracy")


@dataclass(frozen=True)
class View:
    """A table as it is shown: rows of text, each with what it is about."""

    key: str
    title: str
    about: str
    heads: list[tuple[str, bool]]
    lines: list[dict[str, Any]]
    why_not: str = ""


def analyses(results: Results) -> tuple[dict[str, pd.DataFrame], dict[str, str]]:
    """Every analysis over budgets that the rows can carry, and why the others are not there."""
    rates = results.rates()
    tuned = rates[rates["objective"] != BASE]
    if tuned.empty:
        return {}, {}
    margins = dict.fromkeys(tuned.loc[tuned["primary"], "measure"].unique(), MARGIN)
    always = {"equivalence": lambda: results.equivalence(margins), "recommend": lambda: _every_budget(results, tuned)}
    there = [m for m in OVER_BUDGETS if (tuned["measure"] == m).any()]
    if not there or tuned["budget"].nunique() < 2:
        return _made(always)
    return _made(
        always
        | {
            "divergence": lambda: _stacked([results.divergence(m) for m in there]),
            "onset": lambda: _stacked([results.onset(m) for m in there]),
            "coupling": results.coupling,
            "matched": results.matched,
        }
    )


def _made(asked: dict[str, Callable[[], pd.DataFrame]]) -> tuple[dict[str, pd.DataFrame], dict[str, str]]:
    found, why_not = {}, {}
    for name, ask in asked.items():
        try:
            table = ask()
        except (ReportError, stats.StatsError) as error:
            why_not[name] = str(getattr(error, "what", error)).rpartition("rows.parquet: ")[2]
            continue
        if not table.empty:
            found[name] = table
    return found, why_not


def _every_budget(results: Results, tuned: pd.DataFrame) -> pd.DataFrame:
    if not {"accuracy"} < set(tuned.loc[tuned["primary"], "measure"]):
        return pd.DataFrame()  # nothing to weigh capability against
    budgets = sorted(int(b) for b in tuned.loc[tuned["measure"] == "accuracy", "budget"].unique())
    drawn = stats.draws(results.judged, results.conditions, WEIGHED)  # once for all budgets
    ask = stats.recommend
    return _stacked([ask(results.judged, results.conditions, b, drawn=drawn) for b in budgets])


def _stacked(tables: list[pd.DataFrame]) -> pd.DataFrame:
    kept = [t for t in tables if not t.empty]
    return pd.concat(kept, ignore_index=True) if kept else pd.DataFrame()


def views(made: dict[str, pd.DataFrame], why_not: dict[str, str], scale: Scale) -> list[View]:
    """The analyses as the page shows them, in reading order."""
    wanted = [_equivalence, _divergence, _onset, _coupling, _matched, _frontier]
    found = []
    for one in wanted:
        key = one.__name__[1:]
        if key in made and not made[key].empty:
            title, about, columns, table = one(made[key], scale)
            found.append(_view(key, title, about, columns, table))
        elif key in why_not:
            title = {"divergence": "Do objectives diverge with scale?", "onset": "From which budget on?"}.get(key, key)
            found.append(View(key, title, "", [], [], why_not[key]))
    return found


def _view(key: str, title: str, about: str, columns: list[Column], table: pd.DataFrame) -> View:
    lines = []
    for row in table.astype(object).where(table.notna(), None).to_dict("records"):
        values = {str(k): v for k, v in row.items()}
        objective, condition = str(values.get("objective") or ""), str(values.get("condition") or "plain")
        note = formatting.remark(str(values.get("note") or ""))
        lines.append(
            {
                "line": key_of(objective, condition) if objective else "",
                "budget": values.get("budget") or "",
                "cells": [show(values) for _, show, _ in columns],
                "note": "" if key == "frontier" else note,
            }
        )
    return View(key, title, about, [(title, words) for title, _, words in columns], lines)


def _who(row: dict[str, Any]) -> str:
    return formatting.name(str(row["objective"]), str(row["condition"])) if row.get("objective") else "all together"


def _against(row: dict[str, Any]) -> str:
    other = row.get("against")
    return formatting.name(str(other), str(row.get("against_condition") or "plain")) if other else ""


def _number(row: dict[str, Any], key: str, digits: int = 3) -> str:
    value = row.get(key)
    return "–" if value is None else f"{value:+.{digits}f}".replace("-", formatting.MINUS)


def _range(row: dict[str, Any], *, scaled: bool) -> str:
    low, high = row.get("low"), row.get("high")
    if low is None or high is None:
        return "–"
    if scaled:
        return f"{formatting.points(low)} to {formatting.points(high)}"
    return f"{_number(row, 'low')} to {_number(row, 'high')}"


def _in_points(row: dict[str, Any]) -> bool:
    return not str(row.get("unit") or "").startswith("log")


def _equivalence(table: pd.DataFrame, scale: Scale) -> tuple[str, str, list[Column], pd.DataFrame]:
    columns: list[Column] = [
        ("Objective", _who, True),
        ("Budget", lambda r: scale.tick(int(r["budget"])), False),
        ("Measure", lambda r: str(r["label"]), True),
        ("Difference", lambda r: formatting.points(_nan(r["difference"])), False),
        (
            "90% interval",
            lambda r: f"{formatting.points(_nan(r['low90']))} to {formatting.points(_nan(r['high90']))}",
            False,
        ),
        ("Margin", lambda r: f"±{100 * r['margin']:g}", False),
        ("p", lambda r: formatting.p_value(_nan(r["p"])), False),
        ("p, Holm", lambda r: formatting.p_value(_nan(r["p_holm"])), False),
        ("Equivalent", lambda r: "shown" if r["equivalent"] else "not shown", True),
    ]
    about = (
        f"Two one-sided tests against a margin of {100 * MARGIN:g} points, the same for every study: not chosen by "
        "what was found. "
        "Not shown to be equivalent is not shown to differ."
    )
    return "Is it shown that nothing moved?", about, columns, table


def _divergence(table: pd.DataFrame, _: Scale) -> tuple[str, str, list[Column], pd.DataFrame]:
    about = (
        "The slope of each measure on log2 of the budget, per objective and between pairs; joint: whether the slopes "
        "differ at all. Logistic GEE clustered by prompt (log-odds per doubling, Wald test), and as a check the slope "
        "of a cluster bootstrap (points per doubling)."
    )
    columns: list[Column] = [
        ("Question", lambda r: str(r["kind"]), True),
        ("Method", lambda r: str(r["method"]), True),
        ("Measure", lambda r: str(r["measure"]), True),
        ("Objective", _who, True),
        ("Against", _against, True),
        ("Estimate", lambda r: _estimate(r, scaled=_in_points(r)), False),
        ("95% interval", lambda r: _range(r, scaled=_in_points(r)), False),
        ("p", lambda r: formatting.p_value(_nan(r["p"])), False),
        ("p, Holm", lambda r: formatting.p_value(_nan(r["p_holm"])), False),
        ("Unit", lambda r: ("points " if _in_points(r) else "") + str(r["unit"]), True),
    ]
    return "Do objectives diverge with scale?", about, columns, table


def _onset(table: pd.DataFrame, scale: Scale) -> tuple[str, str, list[Column], pd.DataFrame]:
    def place(row: dict[str, Any], key: str) -> str:
        value = row[key]
        return "–" if value is None else "never" if value == float("inf") else scale.tick(int(value))

    columns: list[Column] = [
        ("Objective", _who, True),
        ("Measure", lambda r: str(r["measure"]), True),
        ("Direction", lambda r: str(r["move"]), True),
        ("From", lambda r: place(r, "estimate"), False),
        ("95% interval", lambda r: f"{place(r, 'low')} to {place(r, 'high')}", False),
        ("By the tests", lambda r: place(r, "tested"), False),
        ("Never, in draws", lambda r: formatting.percent(_nan(r["p_never"]), 0), False),
    ]
    about = (
        "The first budget from which a difference from the base beyond the threshold holds at every later budget too; "
        "the interval is over joint draws of prompts. By the tests: the first from which every contrast is significant."
    )
    return "From which budget on?", about, columns, table


def _coupling(table: pd.DataFrame, _: Scale) -> tuple[str, str, list[Column], pd.DataFrame]:
    columns: list[Column] = [
        ("Objective", _who, True),
        ("Measure", lambda r: str(r["measure"]), True),
        ("Slope", lambda r: _number(r, "estimate"), False),
        ("95% interval", lambda r: _range(r, scaled=False), False),
        ("p", lambda r: formatting.p_value(_nan(r["p"])), False),
        ("Uncorrected", lambda r: _number(r, "uncorrected"), False),
        ("Reliability", lambda r: "–" if r["reliability"] is None else f"{r['reliability']:.2f}", False),
        ("Points", lambda r: str(r["n_points"]), False),
    ]
    about = (
        "Points of ASR for each point of capability along an objective’s way from the base, corrected for the noise "
        "in capability."
    )
    return "What a point of capability cost", about, columns, table


def _matched(table: pd.DataFrame, _: Scale) -> tuple[str, str, list[Column], pd.DataFrame]:
    columns: list[Column] = [
        ("Measure", lambda r: str(r["measure"]), True),
        ("Objective", _who, True),
        ("Against", _against, True),
        ("Capability", lambda r: formatting.percent(_nan(r["capability"])), False),
        (
            "Estimate",
            lambda r: (
                _estimate(r, scaled=r["kind"] == "pair")
                if r["kind"] == "pair"
                else formatting.percent(_nan(r["estimate"]))
            ),
            False,
        ),
        ("95% interval", _matched_range, False),
        ("p", lambda r: formatting.p_value(_nan(r["p"])), False),
        ("p, Holm", lambda r: formatting.p_value(_nan(r["p_holm"])), False),
    ]
    about = (
        "Each objective by the time it has bought the same capability, interpolated along its trajectory and "
        "never beyond it; "
        "with a name under Against, the difference between two in points."
    )
    return "At equal capability", about, columns, table


def _matched_range(row: dict[str, Any]) -> str:
    if row["kind"] == "pair" or row["low"] is None:
        return _range(row, scaled=True)
    return f"{formatting.percent(row['low'])} to {formatting.percent(row['high'])}"


def _frontier(table: pd.DataFrame, scale: Scale) -> tuple[str, str, list[Column], pd.DataFrame]:
    known = table.sort_values(
        "p_on_frontier" if "p_on_frontier" in table else "on_frontier", ascending=False, kind="stable"
    )
    drawn = "p_on_frontier" in table
    known = (
        known[known["on_frontier"].astype(bool) | (known["p_on_frontier"] >= 0.01)]
        if drawn
        else known[known["on_frontier"]]
    )
    columns: list[Column] = [
        ("Objective", _who, True),
        ("Budget", lambda r: scale.tick(int(r["budget"])) if r["budget"] else "–", False),
        ("Seed", lambda r: str(r["seed"]) if r["budget"] else "–", False),
        ("Accuracy", lambda r: formatting.percent(_nan(r["capability"])), False),
        ("ASR", lambda r: formatting.percent(_nan(r["asr"])), False),
        ("On the frontier", lambda r: "yes" if r["on_frontier"] else "no", True),
        ("in draws", lambda r: formatting.percent(_nan(r.get("p_on_frontier"))), False),
    ]
    about = (
        "A checkpoint is on the frontier if no other is as good on accuracy and ASR and better on one; "
        "the share of draws of "
        "prompts in which that holds. Those on it, or in at least 1% of draws; all: tables/frontier.csv."
    )
    return "Which checkpoints nothing beats on both", about, columns, known


def _estimate(row: dict[str, Any], *, scaled: bool) -> str:
    return formatting.points(_nan(row["estimate"])) if scaled else _number(row, "estimate")


def _nan(value: Any) -> float:
    return float("nan") if value is None else float(value)


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
    known, scale, same = narrative.external(results.manifest), Scale.of(results.manifest), made.get("equivalence")
    rank = {(s.objective, s.condition): n for n, s in enumerate(lines)}
    contrasts = formatting.records(made["contrasts"])
    contrasts.sort(key=lambda c: (rank[c["objective"], c["condition"]], c["budget"]))
    persona = formatting.records(made["persona"])
    persona.sort(key=lambda c: (rank.get((c["objective"], c["condition"]), -1), c["budget"]))
    return {
        **_assets(),
        **_shell(results, lines, scale),
        **_ledger(results, lines),
        "external": known,
        "verdict": verdict(made["contrasts"], results.seeds, scale, external=bool(known), equivalent=same),
        "decisions": decisions(
            made["contrasts"], made["rates"], made.get("recommend", pd.DataFrame()), lines, scale, same
        ),
        "caveats": caveats(made["contrasts"], made["unscored"], results.seeds, scale, external=bool(known)),
        "margin": f"{100 * float(same['margin'].max()):g}" if same is not None else "",
        "why_no_advice": (why_not or {}).get("recommend", ""),
        "sequential": results.sequential,
        "views": views(made, why_not or {}, scale),
        "claims": formatting.records(made["claims"]) if "claims" in made else [],
        "claims_about": claims.about(results),
        "figures": {d.name: d for d in drawings},
        "inline": {d.name: Markup(d.inline) for d in drawings},
        "primary": [c for c in contrasts if c["primary"]],
        "secondary": [c for c in contrasts if not c["primary"]],
        "persona": persona,
        "unscored": formatting.records(made["unscored"]),
        "further": {k: formatting.records(made[k]) if k in made else [] for k in FURTHER},
        "confusions": narrative.confusions(results),
        "cards": narrative.shown(results, [*cards]),
        "transcripts": transcripts(results.first_judged, results.conditions, lines),
        "archive": archive(results.rows, results.conditions, lines, scale),
    }


def _shell(results: Results, lines: list[Series], scale: Scale) -> dict[str, Any]:
    """The study's name and what surrounds its numbers."""
    tuned = results.rows[results.rows["objective"] != BASE]
    budgets = sorted(int(b) for b in tuned["budget"].unique())
    attacks = sorted({str(a) for a in results.rows["attack"].dropna()} - {""}, key=lambda a: (a != metrics.DIRECT, a))
    pick: list[tuple[str, str, list[Any]]] = [
        ("line", "Objectives", [(key_of(s.objective, s.condition), s.label, s) for s in lines]),
        ("budget", "Steps" if scale.count == "steps" else "Budgets", [(str(b), scale.tick(b), None) for b in budgets]),
        ("attack", "Attacks", [(a, formatting.attack(a), None) for a in attacks]),
    ]
    return {
        "name": str(results.study.get("name") or results.folder.resolve().name),
        "manifest": results.manifest,
        "organism": bool(results.manifest.get("organism")),
        "asked": narrative.asked(results),
        "scale": scale,
        "seeds": results.seeds,
        "level": LEVEL,
        "resamples": intervals.RESAMPLES,
        "max_unscored": metrics.MAX_UNSCORED,
        "provenance": narrative.provenance(results.manifest),
        "pick": [one for one in pick if len(one[2]) > 1],
        "budget_choices": [("-1", "base, untrained"), *((str(b), scale.tick(b)) for b in budgets)],
    }


def _ledger(results: Results, lines: list[Series]) -> dict[str, Any]:
    rule = narrative.matching(results.manifest)
    columns, matched = narrative.matched(results.ledger, rule)
    return {
        "matched_columns": columns,
        "matched": matched,
        "rule": rule,
        "by_objective": narrative.BY_OBJECTIVE,
        "cost": formatting.records(narrative.cost(results.ledger, list(dict.fromkeys(s.objective for s in lines)))),
    }


def _assets() -> dict[str, Any]:
    """The page's own style and script, and the hashes by which its policy knows them."""
    here = files("leeway.report.page")
    own = {f"--{k}": v for k, v in (("light", plotting.colours(dark=False)), ("dark", plotting.colours(dark=True)))}
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


def page(shown_in: dict[str, Any]) -> str:
    """One file that works offline, from everything that its templates are given (`context`)."""
    environment = Environment(
        loader=PackageLoader("leeway.report.page", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    said = (
        formatting.name,
        formatting.attack,
        formatting.percent,
        formatting.points,
        formatting.plain_points,
        formatting.count,
    )
    for words in (*said, formatting.remark):
        environment.filters[words.__name__] = words
    environment.filters |= {"p": formatting.p_value, "budget": shown_in["scale"].tick}
    environment.filters |= {"line_key": key_of, "themed": plotting.themed, "effect": formatting.effect}
    partials = [f"{name}.html.j2" for name in PARTIALS]
    body = environment.get_template("page.html.j2")
    shown = "".join(environment.get_template(p).render(shown_in) for p in partials)
    contents = [(key, title) for key, title in CONTENTS.items() if f'<section id="{key}"' in shown]
    return body.render(shown_in, evidence=Markup(shown), contents=contents)
