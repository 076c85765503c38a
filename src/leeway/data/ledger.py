"""The ledger: the data that must match across objectives, and what each objective cost in tokens."""

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
    """Which columns must be equal between which lines.

    `count: source`: the data columns are equal at equal seed and budget. `count: processed`: objectives reach a budget
    after different numbers of steps, so they are equal at equal seed and step. `starts` is where an objective starts
    and its reference, if not the base model: start hashes are equal among objectives with an equal entry.
    """

    count: str = "source"
    starts: Mapping[str, str] = field(default_factory=dict)

    def groups(self, line: Line) -> Iterator[tuple[Hashable, tuple[str, ...]]]:
        """Yield the groups of a line, each with the columns that must be equal inside it."""
        at = "budget" if self.count == "source" else "step"
        yield ("data", line["seed"], line[at]), DATA
        yield ("start", line["seed"], self.starts.get(line["objective"], "base")), START

    def to_json(self) -> dict[str, Any]:
        return {"count": self.count, "starts": dict(self.starts)}


@dataclass(frozen=True)
class Difference:
    """Two lines that differ in a column that must be equal."""

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
    """Return each difference of a line from the first line of its group."""
    first: dict[Hashable, Line] = {}
    result = []
    for line in lines:
        for group, columns in matching.groups(line):
            other = first.setdefault(group, line)
            result += [Difference(c, other, line) for c in columns if line[c] != other[c]]
    return result


def check_matched(lines: Seq[Line], matching: Matching) -> None:
    """Raise LeewayError for the first two lines that differ in a column that must be equal."""
    if found := differences(lines, matching):
        raise LeewayError(
            f"ledger: {found[0]}",
            fix="these objectives were not trained on matched data: start again in a new --out",
        )
