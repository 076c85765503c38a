"""What each mark of a figure stands for: the page names it, picks it out, and dims the others."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.artist import Artist

from leeway.report.series import Series
from leeway.stats.measures import BASE


@dataclass(frozen=True)
class Mark:
    """A drawn thing: whose it is, and what it says where a reader can stop at it."""

    line: str = ""  # the objective and its test prompt; empty: the base's, or everybody's
    budget: int | None = None
    attack: str = ""
    says: str = ""

    def attributes(self) -> dict[str, str]:
        """For the element of the page that shows it."""
        found = {"data-line": self.line, "data-attack": self.attack, "data-says": self.says}
        found["data-budget"] = "" if self.budget is None else str(self.budget)
        return {k: v for k, v in sorted(found.items()) if v}


class Marks:
    """The marks of one figure, by the id that each has in its SVG."""

    def __init__(self) -> None:
        self.found: dict[str, Mark] = {}

    def put(
        self, artist: Artist, one: Series | None = None, *, budget: int | None = None, attack: str = "", says: str = ""
    ) -> None:
        """Say what an artist stands for."""
        key = f"mark{len(self.found)}"
        artist.set_gid(key)
        self.found[key] = Mark(key_of(one.objective, one.condition) if one else "", budget, attack, says)


def key_of(objective: str, condition: str) -> str:
    """How the page calls a line; empty for the base, which no choice of objectives hides."""
    return "" if objective == BASE else f"{objective}|{condition}"
