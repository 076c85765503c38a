"""The user's own files: training records and test records, one JSON object a line (or .json, .csv, .tsv, .gz of them).

train: `prompt` and `completion`, with `rejected` where a pair exists; or `prompt`, `chosen`, `rejected`.
test: `prompt` and `answer`.
"""

from __future__ import annotations

from pathlib import Path

from leeway.data.items import CapabilityItem, Example
from leeway.data.read import field, read


def train_examples(path: Path) -> tuple[list[Example], str]:
    examples = []
    for n, record in enumerate(read(path), 1):
        where = f"{path}, record {n}"
        rejected = str(record.get("rejected") or "").strip()
        examples.append(
            Example(
                f"{path.name}/{n}",
                field(record, ("prompt",), where),
                field(record, ("completion", "chosen"), where),
                rejected or None,
            )
        )
    return examples, str(path)


def held_out_items(path: Path) -> tuple[list[CapabilityItem], str]:
    items = []
    for n, record in enumerate(read(path), 1):
        where = f"{path}, record {n}"
        items.append(CapabilityItem(f"files/{n}", field(record, ("prompt",), where), field(record, ("answer",), where)))
    return items, str(path)
