"""How answers write a number in LaTeX: what dresses it, and what may stand in a box beside it."""

from __future__ import annotations

COMMAND = r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{"
# braces belong to a command, as in \text{…}, or to an index; a box in a box is the inner one
IN_BOX = r"(?:[^{}\\^_]|\\(?!boxed\{)[a-zA-Z]++(?:\{[^{}]*\})*+|\\[^a-zA-Z]|[\^_](?:\{[^{}]*\})?+)*"
