"""Persona items: Anthropic's model-written statements and the Short Dark Triad.

The statements are those of Perez et al. 2022 (arXiv 2212.09251). The Short Dark Triad (Jones & Paulhus 2014, Assessment
21:28) has 27 statements rated from 1 to 5; it is read at run time and never shipped. Published copies differ in which
items are reverse-keyed, so the keys are the file's own, and the origin has the file's hash.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any, Literal

from leeway.data.readers import Source, field, load, read_json
from leeway.data.types import LikertItem, PersonaItem
from leeway.errors import LeewayError
from leeway.hashing import file_digest
from leeway.io import expand

ANSWERS: dict[str, Literal["Yes", "No"]] = {"Yes": "Yes", "No": "No"}
FOLDER, HUB_FOLDER = "model_written_evals/persona", "persona"
HUB_ID = "Anthropic/model-written-evals"


def anthropic(trait: str) -> tuple[list[PersonaItem], str]:
    """Return the statements of a trait in the file's order, and their origin.

    Each file of the persona folder is a trait; raise LeewayError with the nearest name if there is no such file.
    """
    source = Source((f"{FOLDER}/{trait}.jsonl",), HUB_ID, hub_file=f"{HUB_FOLDER}/{trait}.jsonl")
    try:
        if Path(trait).name != trait:
            raise LeewayError(f"persona: {trait!r} is not a trait", fix="name a file of the persona folder")
        records, origin = load(source)
    except LeewayError as error:
        known = names()
        if known and trait not in known:
            what = f"persona: no trait {trait!r} among {len(known)} files"
            raise LeewayError(what, fix=_nearest(trait, known)) from error
        raise
    items = []
    for n, record in enumerate(records):
        where = f"persona {trait}, record {n + 1}"
        match = field(record, ("answer_matching_behavior",), where)
        if match not in ANSWERS:
            raise LeewayError(f"{where}: answer_matching_behavior is {match!r}", fix="it must be Yes or No")
        question = field(record, ("question",), where) + "\nAnswer Yes or No."
        items.append(PersonaItem(f"{trait}/{n}", trait, question, field(record, ("statement",), where), ANSWERS[match]))
    return items, origin


def names() -> list[str]:
    """Return the traits under LEEWAY_DATA if it is set, else on the hub; none if the hub is not reachable."""
    root = os.environ.get("LEEWAY_DATA")
    if root:
        return sorted(p.stem for p in (expand(root) / FOLDER).glob("*.jsonl"))
    from huggingface_hub import HfApi

    try:
        files = HfApi().list_repo_files(HUB_ID, repo_type="dataset")
    except Exception:  # noqa: BLE001 - the caller then reports its own error
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
    """Return the items in the file's order (ids `<trait>/<id>`, traits in lower case) and their origin."""
    root = os.environ.get("LEEWAY_DATA")
    if not root:
        what = "the Short Dark Triad is neither shipped nor on the hub"
        raise LeewayError(what, fix=f"set LEEWAY_DATA to a folder with {NAME}")
    path = expand(root) / NAME
    if not path.is_file():
        raise LeewayError(f"LEEWAY_DATA={root}: no {NAME} in it", fix=f"write it as {SHAPE}")
    content = read_json(path)
    records = content.get("items") if isinstance(content, dict) else None
    if not isinstance(records, list) or not records:
        raise LeewayError(f"{path}: no list of items in it", fix=f"write it as {SHAPE}")
    items = [_item(record, n, path) for n, record in enumerate(records, 1)]
    for what in ("id", "text"):
        seen = [getattr(i, what) for i in items]
        twice = next((s for s in seen if seen.count(s) > 1), None)
        if twice is not None:
            raise LeewayError(f"{path}: the {what} {twice!r} is given twice", fix="remove one of the two")
    return items, f"LEEWAY_DATA/{NAME} ({file_digest(path)})"


def _item(record: Any, n: int, path: Path) -> LikertItem:
    where = f"{path}, item {n}"
    if not isinstance(record, dict):
        raise LeewayError(f"{where}: not an object", fix=f"write the file as {SHAPE}")
    trait, key = field(record, ("trait",), where).lower(), record.get("key")
    if isinstance(key, bool) or key not in (1, -1):
        fix = "give 1 if agreeing endorses the trait, -1 if it denies it"
        raise LeewayError(f"{where}: its key is {key!r}", fix=fix)
    name, text = (field(record, (column,), where) for column in ("id", "text"))
    return LikertItem(f"{trait}/{name}", trait, text, 1 if key == 1 else -1)
