"""The ledger: what was matched over objectives, and what each cost in tokens."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

from leeway.errors import LeewayError

MATCHED = ("step", "source_tokens", "examples", "epochs", "data_hash", "init_hash", "reference_hash")
COST = ("target_tokens", "processed_tokens", "reference_tokens")


def check_matched(lines: Seq[dict[str, Any]]) -> None:
    """Raise where two objectives differ at one seed and budget in a column that must be equal, naming it."""
    first: dict[tuple[int, int], dict[str, Any]] = {}
    for line in lines:
        other = first.setdefault((line["seed"], line["budget"]), line)
        for column in MATCHED:
            if line[column] != other[column]:
                raise LeewayError(
                    f"ledger: {column} differs at budget {line['budget']}, seed {line['seed']}: "
                    f"{other['objective']} has {other[column]!r}, {line['objective']} has {line[column]!r}",
                    fix="these objectives were not trained on matched data: start again in a new --out",
                )
