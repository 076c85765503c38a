"""Forbidden prompts, always from public data or a user's file at run time, never from this source tree."""

from __future__ import annotations

import os
from collections.abc import Sequence as Seq
from pathlib import Path

from leeway.data.items import ForbiddenPrompt
from leeway.data.read import Record, Source, field, load, read
from leeway.errors import LeewayError
from leeway.hashing import file_digest

Prompts = tuple[list[ForbiddenPrompt], str]

# Souly et al. 2024, arXiv 2402.10260: 313 prompts, and the published subset of 60.
STRONGREJECT = Source(("strongreject/strongreject_dataset.csv",), "walledai/StrongREJECT")
STRONGREJECT_SMALL = "strongreject/strongreject_small_dataset.csv"
# Chao et al. 2024, arXiv 2404.01318: 100 behaviours.
JAILBREAKBENCH = Source(
    ("jailbreakbench/harmful-behaviors.csv",), "JailbreakBench/JBB-Behaviors", "behaviors", "harmful"
)
COLUMNS = ("forbidden_prompt", "prompt", "goal")


def strongreject(revision: str | None = None) -> Prompts:
    """All 313, ids `strongreject/<n>` from 0; (prompts, where they came from)."""
    loaded = load(STRONGREJECT, revision=revision)
    return _published("strongreject", loaded.records, loaded.origin, 313), loaded.origin


def strongreject_small() -> Prompts:
    """The published 60, ids `strongreject-small/<n>`: from LEEWAY_DATA alone, since they are no data set of the hub."""
    if not os.environ.get("LEEWAY_DATA"):
        raise LeewayError(
            "strongreject-small: it is not on the hub",
            fix=f"set LEEWAY_DATA to a folder that holds {STRONGREJECT_SMALL} (from the benchmark's repository)",
        )
    loaded = load(Source((STRONGREJECT_SMALL,), "strongreject-small"))
    return _published("strongreject-small", loaded.records, loaded.origin, 60), loaded.origin


def jailbreakbench(revision: str | None = None) -> Prompts:
    """The 100 harmful behaviours (column Goal), ids `jailbreakbench/<n>` by their order, whatever the index column."""
    loaded = load(JAILBREAKBENCH, revision=revision)
    return _published("jailbreakbench", loaded.records, loaded.origin, 100), loaded.origin


def from_file(path: Path) -> Prompts:
    """A user's .jsonl, .json, .csv or .tsv with a column `prompt`, `forbidden_prompt` or `Goal`; ids `file/<n>`."""
    prompts = _prompts("file", list(read(path)), str(path))
    if not prompts:
        raise LeewayError(f"{path}: no prompt in it", fix="write a record for each prompt")
    return prompts, f"{path} ({len(prompts)} prompts, {file_digest(path)})"


def _published(name: str, records: Seq[Record], origin: str, count: int) -> list[ForbiddenPrompt]:
    """As many as were published: a file cut short would pass for the benchmark."""
    if len(records) != count:
        raise LeewayError(
            f"{name}: {len(records)} prompts ({origin}), and {count} were published",
            fix="fetch it again, or give another set of prompts as a file",
        )
    return _prompts(name, records, name)


def _prompts(name: str, records: Seq[Record], where: str) -> list[ForbiddenPrompt]:
    """Columns whatever their case; a prompt that occurs twice is an error, since a prompt is a cluster of its own."""
    first: dict[str, int] = {}
    prompts = []
    for n, record in enumerate(records):
        columns = {str(k).strip().lower().replace(" ", "_"): v for k, v in record.items()}
        text = field(columns, COLUMNS, f"{where}, record {n + 1}")
        if text in first:
            raise LeewayError(
                f"{where}, record {n + 1}: the same prompt as record {first[text]}", fix="keep one of the two"
            )
        first[text] = n + 1
        prompts.append(ForbiddenPrompt(f"{name}/{n}", text))
    return prompts
