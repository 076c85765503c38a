"""What is made beside the page: LaTeX tables, BibTeX, and a card in every checkpoint's folder."""

from __future__ import annotations

import pandas as pd

from leeway.report import tables
from leeway.report.files import cards, cite, latex
from leeway.report.results import Results
from leeway.report.series import Series


def write(results: Results, made: dict[str, pd.DataFrame], lines: list[Series]) -> None:
    """Write `tables/*.tex`, `citation.bib` and the model cards; remove a .tex that is not made any more."""
    folder = results.folder
    written = latex.paper_tables(results, made, lines)
    for old in sorted((folder / "tables").glob("*.tex")):
        if old.stem not in written:
            old.unlink()
    for name, text in written.items():
        tables.write_atomically(folder / "tables" / f"{name}.tex", text)
    tables.write_atomically(folder / "citation.bib", cite.of_run(results))
    for path, text in cards.cards(results, made).items():
        tables.write_atomically(path, text)
