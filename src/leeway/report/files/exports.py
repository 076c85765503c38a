"""What is made beside the page: LaTeX tables, BibTeX, and a card in every checkpoint's folder."""

from __future__ import annotations

import pandas as pd

from leeway.report.files import cards, cite, latex
from leeway.report.results import Results
from leeway.report.series import Series


def files(results: Results, made: dict[str, pd.DataFrame], lines: list[Series]) -> dict[str, str]:
    """`tables/*.tex`, `citation.bib` and the model cards: text by path relative to the run directory."""
    found = {f"tables/{name}.tex": text for name, text in latex.paper_tables(results, made, lines).items()}
    found["citation.bib"] = cite.of_run(results)
    return found | {str(path.relative_to(results.folder)): text for path, text in cards.cards(results, made).items()}
