"""A table as LaTeX: booktabs rules, any text made safe, ready for `\\input`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from leeway.report import wording

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
    return DASH if wording.percent(value) == "–" else f"{100 * value:.1f}"


def signed(value: float, unit: float = 100) -> str:
    """+3.1 or $-$0.4; a difference of rates in points."""
    text = wording.points(value * unit / 100) if value is not None else "–"
    return DASH if text == "–" else text.replace(wording.MINUS, "$-$").replace("+", "$+$")


def between(low: str, high: str) -> str:
    return "" if DASH in (low, high) else f"[{low}, {high}]"


def p_value(value: float) -> str:
    text = wording.p_value(value)
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
