"""The tables that a paper prints, as LaTeX: main results, contrasts at the largest budget, claims, ledger."""

from __future__ import annotations

from typing import Any

import pandas as pd

from leeway.report import tables, wording
from leeway.report.files import tex
from leeway.report.results import Results
from leeway.report.scale import Scale
from leeway.report.series import Series
from leeway.report.verdict import LEVEL
from leeway.stats.measures import BASE, PLAIN

MAIN = {"capability": "Accuracy", "jailbreak": "ASR", "persona": "Endorsement", "overrefusal": "Over-refusal"}
SIGNIFICANT = (
    rf"{tex.SIGN} differs from the base (paired by item, wild cluster bootstrap over prompts, $p < {LEVEL}$ after "
    "Holm's correction in the family of one axis at one budget). Without it, nothing is said to be the same."
)
WITHHELD = (
    "Unscored answers are left out of every number and counted; a dash stands where too many are unscored or no "
    "pair is there."
)


def paper_tables(results: Results, made: dict[str, pd.DataFrame], lines: list[Series]) -> dict[str, str]:
    """The source of each table by its file's name; a table without lines is not made."""
    scale = Scale.of(results.manifest)
    found = [
        main(results.pooled_rates(), made["contrasts"], lines, scale, results.seeds),
        contrasts(made["contrasts"], lines, scale),
        claims(made.get("claims", pd.DataFrame())),
        ledger(made["ledger"], [s.objective for s in lines], scale),
    ]
    return {t.name: tex.render(t) for t in found if t is not None}


def main(
    rates: pd.DataFrame, contrasts: pd.DataFrame, lines: list[Series], scale: Scale, seeds: list[int]
) -> tex.Table | None:
    """Each checkpoint's primary rates with their intervals, the base first."""
    primary = rates[rates["primary"] & rates["axis"].isin(MAIN)]
    axes = [a for a in MAIN if a in set(primary["axis"])]
    if not axes:
        return None
    moved = contrasts[contrasts["primary"] & (contrasts["p_holm"] < LEVEL)]
    signs = set(moved[["objective", "budget", "condition", "axis"]].itertuples(index=False, name=None))
    cells = {(r["objective"], r["budget"], r["condition"], r["axis"]): r for r in tables.records(primary)}
    bases = [c for o, b, c, _ in cells if o == BASE]
    keys = [(BASE, 0, c) for c in sorted(set(bases), key=lambda c: (c != PLAIN, c))]
    for one in lines:
        keys += [(one.objective, int(b), one.condition) for b in dict.fromkeys(one.of(primary)["budget"])]
    body, rules, before = [], set(), ""
    for n, key in enumerate(keys):
        rules |= {n} if n and key[0] != before else set()
        before = key[0]
        body.append(_main_line(key, axes, cells, signs, scale))
    columns = [("Objective", "l"), (_budget_title(scale), "r")]
    columns += [part for a in axes for part in ((MAIN[a], "r"), ("", "l"))] + [("Unscored", "r")]
    pooled = "" if len(seeds) < 2 else f" The {len(seeds)} training seeds are pooled."
    caption = f"Rates in percent, with 95\\% intervals over prompts in brackets.{pooled}"
    return tex.Table("main", caption, columns, body, [SIGNIFICANT, WITHHELD], frozenset(rules))


def _main_line(
    key: tuple[str, int, str], axes: list[str], cells: dict[Any, Any], signs: set[Any], scale: Scale
) -> list[str]:
    objective, budget, condition = key
    line = [tex.escape(wording.name(objective, condition)), _budget(budget, scale)]
    lost = 0
    for axis in axes:
        cell = cells.get((*key, axis))
        if cell is None:
            line += [tex.DASH, ""]
            continue
        lost += cell["n_unscored"]
        line.append(tex.percent(cell["rate"]) + (tex.SIGN if (*key, axis) in signs else ""))
        line.append(tex.between(tex.percent(cell["low"]), tex.percent(cell["high"])))
    return [*line, wording.count(lost)]


def contrasts(table: pd.DataFrame, lines: list[Series], scale: Scale) -> tex.Table | None:
    """Every objective against the base at the largest budget, on the primary measures."""
    if table.empty:
        return None
    largest = int(table["budget"].max())
    own = table[table["primary"] & (table["budget"] == largest)]
    rank = {(s.objective, s.condition): n for n, s in enumerate(lines)}
    found = sorted(tables.records(own), key=lambda c: rank[c["objective"], c["condition"]])
    columns = [("Objective", "l"), ("Measure", "l"), ("Base", "r"), ("Tuned", "r"), ("Difference", "r"), ("", "l")]
    columns += [("$p$", "r"), ("$p$, Holm", "r")] + ([("MDE", "r")] if "mde" in own else [])
    columns += [("Pairs", "r"), ("Prompts", "r"), ("Unscored", "r")]
    body, rules, before = [], set(), ""
    for n, c in enumerate(found):
        rules |= {n} if n and c["objective"] != before else set()
        before = c["objective"]
        body.append(_contrast_line(c))
    at = tex.escape(scale.at(largest))
    caption = f"Paired differences from the base {at}, in percentage points, with 95\\% intervals in brackets."
    smallest = ["MDE: the smallest true difference that this design detects with 80\\% power."] if "mde" in own else []
    return tex.Table("contrasts", caption, columns, body, [SIGNIFICANT, *smallest, WITHHELD], frozenset(rules))


def _contrast_line(c: dict[str, Any]) -> list[str]:
    sign = tex.SIGN if c["p_holm"] is not None and c["p_holm"] < LEVEL else ""
    found = [tex.escape(wording.name(c["objective"], c["condition"])), tex.escape(c["label"])]
    found += [tex.percent(c["base"]), tex.percent(c["rate"]), tex.signed(c["difference"]) + sign]
    found.append(tex.between(tex.signed(c["low"]), tex.signed(c["high"])))
    found += [tex.p_value(c["p"]), tex.p_value(c["p_holm"])]
    found += [tex.percent(c["mde"])] if "mde" in c else []
    return found + [wording.count(c[k]) for k in ("n", "n_clusters", "n_unscored")]


def claims(table: pd.DataFrame) -> tex.Table | None:
    """The claims written down before the run, and what became of each."""
    if table.empty:
        return None
    columns = [("Claim", r"p{0.34\linewidth}"), ("Estimate", "r"), ("", "l"), ("Unit", "l"), ("$p$, Holm", "r")]
    columns += [("MDE", "r"), ("Verdict", "l")]
    body = []
    for c in tables.records(table):
        line = [tex.escape(str(c["says"])), _number(c["estimate"])]
        line += [tex.between(_number(c["low"]), _number(c["high"])), tex.escape(str(c.get("unit") or ""))]
        body.append([*line, tex.p_value(c["p_holm"]), _number(c.get("mde")), tex.escape(str(c["verdict"]))])
    caption = "Claims written down before the run: effect with its interval in brackets, and the verdict on each."
    notes = ["Inconclusive: the rows speak neither for the claim nor against it. A dash stands for what is not there."]
    return tex.Table("claims", caption, columns, body, notes, frozenset(range(1, len(body))))


def ledger(table: pd.DataFrame, order: list[str], scale: Scale) -> tex.Table | None:
    """What was matched and what it cost, per checkpoint."""
    if table.empty:
        return None
    place = {o: n for n, o in enumerate(dict.fromkeys(order))}
    found = sorted(tables.records(table), key=lambda r: (place.get(r["objective"], len(place)), r["seed"], r["budget"]))
    several = table["seed"].nunique() > 1
    counted = ["step", "examples", "source_tokens", "target_tokens", "processed_tokens", "reference_tokens"]
    columns = [("Objective", "l"), (_budget_title(scale), "r"), *([("Seed", "r")] if several else [])]
    columns += [(c.removesuffix("_tokens").capitalize(), "r") for c in counted] + [("Epochs", "r")]
    body, rules, before = [], set(), ""
    for n, r in enumerate(found):
        rules |= {n} if n and r["objective"] != before else set()
        before = r["objective"]
        line = [tex.escape(wording.name(r["objective"])), _budget(r["budget"], scale)]
        line += [str(r["seed"])] if several else []
        body.append([*line, *(wording.count(r[c]).replace("–", tex.DASH) for c in counted), f"{r['epochs']:.2f}"])
    caption = "The ledger, in tokens: a budget counts source tokens unless the study says otherwise."
    return tex.Table("ledger", caption, columns, body, [], frozenset(rules))


def _number(value: float | None) -> str:
    if value is None:
        return tex.DASH
    return f"{value:.3g}".replace("-", "$-$")


def _budget(budget: int, scale: Scale) -> str:
    return tex.escape(scale.tick(budget)) if budget else tex.DASH


def _budget_title(scale: Scale) -> str:
    return "Step" if scale.count == "steps" else "Budget"
