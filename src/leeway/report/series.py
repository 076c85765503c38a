"""The lines of the figures: an objective under a test condition, always in the same colour and marker."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from leeway.report import wording
from leeway.stats.measures import BASE, PLAIN

# Okabe & Ito (2008), told apart by people of every colour vision; its yellow is too pale for a line on white
COLOURS = {
    "sft": "#D55E00",
    "dpo": "#E69F00",
    "cft": "#56B4E9",
    "ip": "#CC79A7",
    "orpo": "#009E73",
    "kl": "#0072B2",
}
SPARE = ["#8C6D1F", "#6A3D9A", "#666666", "#B2182B", "#1B7837", "#35978F", "#D55E00", "#0072B2"]
MARKERS = {"sft": "o", "dpo": "s", "cft": "D", "ip": "^", "orpo": "v", "kl": "P"}
SPARE_MARKERS = ["X", "h", "<", ">", "p", "*", "d", "H"]


@dataclass(frozen=True)
class Series:
    """One line: what it shows and how it is drawn."""

    objective: str
    condition: str
    colour: str
    marker: str
    filled: bool

    @property
    def label(self) -> str:
        return wording.name(self.objective, self.condition)

    def of(self, table: pd.DataFrame) -> pd.DataFrame:
        """This line's rows of a table, by budget."""
        chosen = (table["objective"] == self.objective) & (table["condition"] == self.condition)
        return table[chosen].sort_values("budget")

    def base_of(self, table: pd.DataFrame) -> pd.DataFrame:
        """The base under this line's own test condition."""
        chosen = (table["objective"] == BASE) & (table["condition"] == self.condition)
        return table[chosen]


def series_of(table: pd.DataFrame, order: list[str]) -> list[Series]:
    """One per objective and condition: the study's order of objectives, plain prompts first."""
    pairs = table.loc[table["objective"] != BASE, ["objective", "condition"]].drop_duplicates()
    present = [str(o) for o in pairs["objective"].unique()]
    objectives = [o for o in order if o in present] + sorted(set(present) - set(order))
    strangers = [o for o in objectives if o not in COLOURS]
    found = []
    for objective in objectives:
        spare = strangers.index(objective) % len(SPARE) if objective in strangers else 0
        conditions = sorted(pairs.loc[pairs["objective"] == objective, "condition"], key=lambda c: (c != PLAIN, c))
        for n, condition in enumerate(conditions):
            colour = COLOURS.get(objective, SPARE[spare])
            marker = MARKERS.get(objective, SPARE_MARKERS[spare])
            found.append(Series(objective, str(condition), colour, marker, filled=n == 0))
    return found
