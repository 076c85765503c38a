"""For papers and for machines: LaTeX, BibTeX, model cards, and results.json with its schema."""
