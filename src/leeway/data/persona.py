"""Anthropic's model-written persona statements (Perez et al. 2022, arXiv 2212.09251)."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Literal

from leeway.data.items import PersonaItem
from leeway.data.read import Source, field, load
from leeway.errors import LeewayError
from leeway.paths import expand

ANSWERS: dict[str, Literal["Yes", "No"]] = {"Yes": "Yes", "No": "No"}
FOLDER, HUB_FOLDER = "model_written_evals/persona", "persona"
HUB_ID = "Anthropic/model-written-evals"


def anthropic(trait: str, revision: str | None = None) -> tuple[list[PersonaItem], str]:
    """One trait's file, its items in the file's order; ` Yes` and ` No` are written with a leading space there.

    Every file of the persona folder is a trait; a name without a file is a LeewayError with the nearest one.
    """
    source = Source((f"{FOLDER}/{trait}.jsonl",), HUB_ID, hub_file=f"{HUB_FOLDER}/{trait}.jsonl")
    try:
        if Path(trait).name != trait:
            raise LeewayError(
                f"persona: {trait!r} is no trait", fix="name a file of the persona folder, without .jsonl"
            )
        loaded = load(source, revision=revision)
    except LeewayError as error:
        known = names(revision)
        if known and trait not in known:
            raise LeewayError(
                f"persona: no trait {trait!r} among {len(known)} files", fix=_nearest(trait, known)
            ) from error
        raise
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


def names(revision: str | None = None) -> list[str]:
    """The traits there are, under LEEWAY_DATA where it is set, else on the hub; none where the hub does not answer."""
    root = os.environ.get("LEEWAY_DATA")
    if root:
        return sorted(p.stem for p in (expand(root) / FOLDER).glob("*.jsonl"))
    from huggingface_hub import HfApi

    try:
        files = HfApi().list_repo_files(HUB_ID, repo_type="dataset", revision=revision)
    except Exception:  # noqa: BLE001 - without a list of names, what failed before is what is told
        return []
    paths = [Path(f) for f in files]
    return sorted(p.stem for p in paths if str(p.parent) == HUB_FOLDER and p.suffix == ".jsonl")


def _nearest(trait: str, known: list[str]) -> str:
    by_folded = {k.casefold().replace("_", "-"): k for k in known}
    found = difflib.get_close_matches(trait.casefold().replace("_", "-"), by_folded, n=1, cutoff=0.5)
    return f"did you mean {by_folded[found[0]]!r}?" if found else f"one of: {', '.join(known[:20])}"
