"""Anthropic's model-written persona statements (Perez et al. 2022, arXiv 2212.09251).

The Short Dark Triad (Jones & Paulhus 2014, Assessment 21:28): 27 statements rated from 1 to 5.

A published instrument: its items are read at run time and never shipped. Published copies differ in which items are
reverse-keyed, so the keys are the file's own, and the file's hash stands in the origin.
"""

from __future__ import annotations

import difflib
import json
import os
from pathlib import Path
from typing import Any, Literal

from leeway.data.readers import Source, field, load
from leeway.data.types import LikertItem, PersonaItem
from leeway.errors import LeewayError
from leeway.hashing import file_digest
from leeway.io import expand

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


NAME = "dark_triad/sd3_items.json"
SHAPE = '{"items": [{"id": …, "trait": …, "text": …, "key": 1 or -1}, …]}'


def sd3() -> tuple[list[LikertItem], str]:
    """The items in the file's order and where they came from; ids are `<trait>/<id>`, traits in lower case."""
    root = os.environ.get("LEEWAY_DATA")
    if not root:
        raise LeewayError(
            "the Short Dark Triad is not shipped and is on no hub", fix=f"set LEEWAY_DATA to a folder that holds {NAME}"
        )
    path = expand(root) / NAME
    if not path.is_file():
        raise LeewayError(f"LEEWAY_DATA={root}: there is no {NAME}", fix=f"write it as {SHAPE}")
    items = [_item(record, n, path) for n, record in enumerate(_records(path), 1)]
    for what in ("id", "text"):
        seen = [getattr(i, what) for i in items]
        twice = next((s for s in seen if seen.count(s) > 1), None)
        if twice is not None:
            raise LeewayError(f"{path}: the {what} {twice!r} stands there twice", fix="remove one of the two")
    return items, f"LEEWAY_DATA/{NAME} ({file_digest(path)})"


def _records(path: Path) -> list[Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except UnicodeDecodeError as error:
        raise LeewayError(f"{path}: not UTF-8 text (byte {error.start})", fix="save it as UTF-8") from error
    except json.JSONDecodeError as error:
        raise LeewayError(f"{path}, line {error.lineno}: not JSON ({error.msg})", fix="mend that line") from error
    records = found.get("items") if isinstance(found, dict) else None
    if not isinstance(records, list) or not records:
        raise LeewayError(f"{path}: it holds no list of items", fix=f"write it as {SHAPE}")
    return records


def _item(record: Any, n: int, path: Path) -> LikertItem:
    where = f"{path}, item {n}"
    if not isinstance(record, dict):
        raise LeewayError(f"{where}: not an object", fix=f"write the file as {SHAPE}")
    trait, key = field(record, ("trait",), where).lower(), record.get("key")
    if isinstance(key, bool) or key not in (1, -1):
        raise LeewayError(
            f"{where}: its key is {key!r}", fix="1 where agreeing endorses the trait, -1 where it denies it"
        )
    name = field(record, ("id",), where)
    return LikertItem(f"{trait}/{name}", trait, field(record, ("text",), where), 1 if key == 1 else -1)
