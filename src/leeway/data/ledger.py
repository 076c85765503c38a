"""The ledger: what was matched over objectives, and what each cost in tokens."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

from leeway.errors import LeewayError

DATA = ("step", "source_tokens", "examples", "epochs", "data_hash")
START = ("init_hash", "reference_hash")
MATCHED = (*DATA, *START)
COST = ("target_tokens", "processed_tokens", "reference_tokens", "tuning_tokens")
Line = Mapping[str, Any]


@dataclass(frozen=True)
class Matching:
    """What has to be equal between which lines.

    `count: source`: at one seed and budget all data columns are equal. `count: processed`: objectives reach a budget
    after different steps, and the data columns are equal wherever seed and step are. `starts` says what each objective
    starts from and is held against where that is not the base model: only those alike have equal hashes.
    """

    count: str = "source"
    starts: Mapping[str, str] = field(default_factory=dict)

    def groups(self, line: Line) -> Iterator[tuple[Hashable, tuple[str, ...]]]:
        """The groups that a line belongs to, each with the columns that are equal inside it."""
        at = "budget" if self.count == "source" else "step"
        yield ("data", line["seed"], line[at]), DATA
        yield ("start", line["seed"], self.starts.get(line["objective"], "base")), START

    def to_json(self) -> dict[str, Any]:
        return {"count": self.count, "starts": dict(self.starts)}


@dataclass(frozen=True)
class Difference:
    """Two lines that differ in a column that has to be equal."""

    column: str
    one: Line
    other: Line

    def __str__(self) -> str:
        one, other = self.one, self.other
        return (
            f"{self.column} differs at budget {other['budget']}, seed {other['seed']}: {one['objective']} has "
            f"{one[self.column]!r}, {other['objective']} has {other[self.column]!r}"
        )


def differences(lines: Seq[Line], matching: Matching) -> list[Difference]:
    """Every line that differs from the first of its group, column by column."""
    first: dict[Hashable, Line] = {}
    found = []
    for line in lines:
        for group, columns in matching.groups(line):
            other = first.setdefault(group, line)
            found += [Difference(c, other, line) for c in columns if line[c] != other[c]]
    return found


def check_matched(lines: Seq[Line], matching: Matching) -> None:
    """Raise where two lines differ in a column that must be equal, naming it."""
    found = differences(lines, matching)
    if found:
        raise LeewayError(
            f"ledger: {found[0]}",
            fix="these objectives were not trained on matched data: start again in a new --out",
        )
