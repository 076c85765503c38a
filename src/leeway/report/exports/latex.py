"""The tables that a paper prints, as LaTeX: main results, contrasts at the largest budget, claims, ledger.

A table as LaTeX: booktabs rules, any text made safe, ready for `\\input`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from leeway.report import formatting
from leeway.report.formatting import Scale
from leeway.report.plotting import Series
from leeway.report.results import Results
from leeway.report.verdict import LEVEL
from leeway.stats.metrics import BASE, PLAIN

LONGEST = 50  # lines that fit on a page at \footnotesize; a longer table becomes a longtable
SPECIAL = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "`": r"\textasciigrave{}",
    "[": "{[}",  # after \\ a bare bracket would be read as its argument, and a star too
    "]": "{]}",
    "*": "{*}",
    "\u2013": "--",
    "\u2014": "---",
    "\u2018": "`",
    "\u2019": "'",
    "\u201c": "``",
    "\u201d": "''",
    "\u2026": r"\ldots{}",
    "\u2212": "$-$",
    "×": r"$\times$",
    "±": r"$\pm$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "→": r"$\to$",
    "κ": r"$\kappa$",
    "\u00a0": "~",
}
SIGN = r"$^{\ast}$"
DASH = "--"


@dataclass(frozen=True)
class Table:
    """One float: cells are LaTeX already, `rules` are the lines that a thin rule stands before."""

    name: str
    caption: str
    columns: list[tuple[str, str]]  # title, alignment
    lines: list[list[str]]
    notes: list[str] = field(default_factory=list)
    rules: frozenset[int] = frozenset()


def escape(text: str) -> str:
    """Any text as it would be read, for LaTeX: what pdfLaTeX has no letter for is spelled by its number."""
    flat = re.sub(r"[\t\r\n]+", " ", text)
    return "".join(_letter(c) + ("{}" if flat[n : n + 2] == "--" else "") for n, c in enumerate(flat))  # no dash of two


def _letter(c: str) -> str:
    if c in SPECIAL:
        return SPECIAL[c]
    printable = " " <= c <= "~" or ("\u00c0" <= c <= "\u017f")
    return c if printable else f"{{[}}U+{ord(c):04X}{{]}}"


def percent(value: float) -> str:
    """31.4, of a hundred; a dash for what is missing."""
    return DASH if formatting.percent(value) == "–" else f"{100 * value:.1f}"


def signed(value: float, unit: float = 100) -> str:
    """+3.1 or $-$0.4; a difference of rates in points."""
    text = formatting.points(value * unit / 100) if value is not None else "–"
    return DASH if text == "–" else text.replace(formatting.MINUS, "$-$").replace("+", "$+$")


def between(low: str, high: str) -> str:
    return "" if DASH in (low, high) else f"[{low}, {high}]"


def p_value(value: float) -> str:
    text = formatting.p_value(value)
    return DASH if text == "–" else text.replace("<", "$<$")


def render(table: Table) -> str:
    """The float's source, one line of the table per line of the file."""
    long = len(table.lines) > LONGEST
    spec = "@{}" + "".join(align for _, align in table.columns) + "@{}"
    head = " & ".join(title for title, _ in table.columns) + r" \\"
    needs = r"\usepackage{booktabs,longtable}" if long else r"\usepackage{booktabs}"
    caption = rf"\caption{{{table.caption}}}\label{{tab:leeway-{table.name}}}"
    notes = r"\par\smallskip" + "\n" + "\n".join(table.notes) if table.notes else ""
    top = [f"% made by leeway report; in the preamble: {needs} and \\usepackage[T1]{{fontenc}}"]
    if long:
        top += [r"{\footnotesize\setlength{\tabcolsep}{3pt}", rf"\begin{{longtable}}{{{spec}}}", rf"{caption}\\"]
        top += [r"\toprule", head, r"\midrule", r"\endhead", r"\bottomrule", r"\endfoot"]
        end = [r"\end{longtable}", *([notes] if notes else []), "}"]
    else:
        top += [r"\begin{table}[tp]", r"\centering\footnotesize\setlength{\tabcolsep}{3pt}", caption]
        top += [rf"\begin{{tabular}}{{{spec}}}", r"\toprule", head, r"\midrule"]
        end = [r"\bottomrule", r"\end{tabular}", *([notes] if notes else []), r"\end{table}"]
    body: list[str] = []
    for n, line in enumerate(table.lines):
        body += [r"\addlinespace"] if n in table.rules else []
        body.append(" & ".join(line) + r" \\")
    return "\n".join([*top, *body, *end]) + "\n"


MAIN = {"capability": "Accuracy", "jailbreak": "ASR", "persona": "Endorsement", "overrefusal": "Over-refusal"}
SIGNIFICANT = (
    rf"{SIGN} differs from the base (paired by item, wild cluster bootstrap over prompts, $p < {LEVEL}$ after "
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
    return {t.name: render(t) for t in found if t is not None}


def main(
    rates: pd.DataFrame, contrasts: pd.DataFrame, lines: list[Series], scale: Scale, seeds: list[int]
) -> Table | None:
    """Each checkpoint's primary rates with their intervals, the base first."""
    primary = rates[rates["primary"] & rates["axis"].isin(MAIN)]
    axes = [a for a in MAIN if a in set(primary["axis"])]
    if not axes:
        return None
    moved = contrasts[contrasts["primary"] & (contrasts["p_holm"] < LEVEL)]
    signs = set(moved[["objective", "budget", "condition", "axis"]].itertuples(index=False, name=None))
    cells = {(r["objective"], r["budget"], r["condition"], r["axis"]): r for r in formatting.records(primary)}
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
    return Table("main", caption, columns, body, [SIGNIFICANT, WITHHELD], frozenset(rules))


def _main_line(
    key: tuple[str, int, str], axes: list[str], cells: dict[Any, Any], signs: set[Any], scale: Scale
) -> list[str]:
    objective, budget, condition = key
    line = [escape(formatting.name(objective, condition)), _budget(budget, scale)]
    lost = 0
    for axis in axes:
        cell = cells.get((*key, axis))
        if cell is None:
            line += [DASH, ""]
            continue
        lost += cell["n_unscored"]
        line.append(percent(cell["rate"]) + (SIGN if (*key, axis) in signs else ""))
        line.append(between(percent(cell["low"]), percent(cell["high"])))
    return [*line, formatting.count(lost)]


def contrasts(table: pd.DataFrame, lines: list[Series], scale: Scale) -> Table | None:
    """Every objective against the base at the largest budget, on the primary measures."""
    if table.empty:
        return None
    largest = int(table["budget"].max())
    own = table[table["primary"] & (table["budget"] == largest)]
    rank = {(s.objective, s.condition): n for n, s in enumerate(lines)}
    found = sorted(formatting.records(own), key=lambda c: rank[c["objective"], c["condition"]])
    columns = [("Objective", "l"), ("Measure", "l"), ("Base", "r"), ("Tuned", "r"), ("Difference", "r"), ("", "l")]
    columns += [("$p$", "r"), ("$p$, Holm", "r")] + ([("MDE", "r")] if "mde" in own else [])
    columns += [("Pairs", "r"), ("Prompts", "r"), ("Unscored", "r")]
    body, rules, before = [], set(), ""
    for n, c in enumerate(found):
        rules |= {n} if n and c["objective"] != before else set()
        before = c["objective"]
        body.append(_contrast_line(c))
    at = escape(scale.at(largest))
    caption = f"Paired differences from the base {at}, in percentage points, with 95\\% intervals in brackets."
    smallest = ["MDE: the smallest true difference that this design detects with 80\\% power."] if "mde" in own else []
    return Table("contrasts", caption, columns, body, [SIGNIFICANT, *smallest, WITHHELD], frozenset(rules))


def _contrast_line(c: dict[str, Any]) -> list[str]:
    sign = SIGN if c["p_holm"] is not None and c["p_holm"] < LEVEL else ""
    found = [escape(formatting.name(c["objective"], c["condition"])), escape(c["label"])]
    found += [percent(c["base"]), percent(c["rate"]), signed(c["difference"]) + sign]
    found.append(between(signed(c["low"]), signed(c["high"])))
    found += [p_value(c["p"]), p_value(c["p_holm"])]
    found += [percent(c["mde"])] if "mde" in c else []
    return found + [formatting.count(c[k]) for k in ("n", "n_clusters", "n_unscored")]


def claims(table: pd.DataFrame) -> Table | None:
    """The claims written down before the run, and what became of each."""
    if table.empty:
        return None
    columns = [("Claim", r"p{0.34\linewidth}"), ("Estimate", "r"), ("", "l"), ("Unit", "l"), ("$p$, Holm", "r")]
    columns += [("MDE", "r"), ("Verdict", "l")]
    body = []
    for c in formatting.records(table):
        line = [escape(str(c["says"])), _number(c["estimate"])]
        line += [between(_number(c["low"]), _number(c["high"])), escape(str(c.get("unit") or ""))]
        body.append([*line, p_value(c["p_holm"]), _number(c.get("mde")), escape(str(c["verdict"]))])
    caption = "Claims written down before the run: effect with its interval in brackets, and the verdict on each."
    notes = ["Inconclusive: the rows speak neither for the claim nor against it. A dash stands for what is not there."]
    return Table("claims", caption, columns, body, notes, frozenset(range(1, len(body))))


def ledger(table: pd.DataFrame, order: list[str], scale: Scale) -> Table | None:
    """What was matched and what it cost, per checkpoint."""
    if table.empty:
        return None
    place = {o: n for n, o in enumerate(dict.fromkeys(order))}
    found = sorted(
        formatting.records(table), key=lambda r: (place.get(r["objective"], len(place)), r["seed"], r["budget"])
    )
    several = table["seed"].nunique() > 1
    counted = ["step", "examples", "source_tokens", "target_tokens", "processed_tokens", "reference_tokens"]
    columns = [("Objective", "l"), (_budget_title(scale), "r"), *([("Seed", "r")] if several else [])]
    columns += [(c.removesuffix("_tokens").capitalize(), "r") for c in counted] + [("Epochs", "r")]
    body, rules, before = [], set(), ""
    for n, r in enumerate(found):
        rules |= {n} if n and r["objective"] != before else set()
        before = r["objective"]
        line = [escape(formatting.name(r["objective"])), _budget(r["budget"], scale)]
        line += [str(r["seed"])] if several else []
        body.append([*line, *(formatting.count(r[c]).replace("–", DASH) for c in counted), f"{r['epochs']:.2f}"])
    caption = "The ledger, in tokens: a budget counts source tokens unless the study says otherwise."
    return Table("ledger", caption, columns, body, [], frozenset(rules))


def _number(value: float | None) -> str:
    if value is None:
        return DASH
    return f"{value:.3g}".replace("-", "$-$")


def _budget(budget: int, scale: Scale) -> str:
    return escape(scale.tick(budget)) if budget else DASH


def _budget_title(scale: Scale) -> str:
    return "Step" if scale.count == "steps" else "Budget"
