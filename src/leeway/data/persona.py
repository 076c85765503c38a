"""Anthropic's model-written persona statements (Perez et al. 2022, arXiv 2212.09251)."""

from __future__ import annotations

from typing import Literal

from leeway.data.items import PersonaItem
from leeway.data.read import Source, field, load
from leeway.errors import LeewayError

ANSWERS: dict[str, Literal["Yes", "No"]] = {"Yes": "Yes", "No": "No"}


def anthropic(trait: str, revision: str | None = None) -> tuple[list[PersonaItem], str]:
    """One trait's file, its items in the file's order; ` Yes` and ` No` are written with a leading space there."""
    source = Source(
        (f"model_written_evals/persona/{trait}.jsonl",),
        "Anthropic/model-written-evals",
        hub_file=f"persona/{trait}.jsonl",
    )
    loaded = load(source, revision=revision)
    items = []
    for n, record in enumerate(loaded.records):
        where = f"persona {trait}, record {n + 1}"
        match = field(record, ("answer_matching_behavior",), where)
        if match not in ANSWERS:
            raise LeewayError(f"{where}: answer_matching_behavior is {match!r}", fix="it must be Yes or No")
        items.append(
            PersonaItem(
                f"{trait}/{n}",
                trait,
                field(record, ("question",), where) + "\nAnswer Yes or No.",
                field(record, ("statement",), where),
                ANSWERS[match],
            )
        )
    return items, loaded.origin
