"""The ledger: the data that must match across objectives, and what each objective cost in tokens."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
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


def differences(lines: Sequence[Line], matching: Matching) -> list[str]:
    """Return each difference of a line from the first line of its group."""
    first: dict[Hashable, Line] = {}
    result = []
    for line in lines:
        for group, columns in matching.groups(line):
            other = first.setdefault(group, line)
            for c in (c for c in columns if line[c] != other[c]):
                values = ", ".join(f"{one['objective']} has {one[c]!r}" for one in (other, line))
                result.append(f"{c} differs at budget {line['budget']}, seed {line['seed']}: {values}")
    return result


def check_matched(lines: Sequence[Line], matching: Matching) -> None:
    """Raise LeewayError for the first two lines that differ in a column that must be equal."""
    if found := differences(lines, matching):
        fix = "these objectives were not trained on matched data: start again in a new --out"
        raise LeewayError(f"ledger: {found[0]}", fix=fix)
