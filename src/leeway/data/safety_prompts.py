"""Forbidden and benign prompts, read from public data or a user's file at run time, and fixed random subsets of them.

No forbidden prompt is in this source tree.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from pathlib import Path
from typing import TypeVar

import numpy as np

from leeway.data.readers import Record, Source, field, load, read
from leeway.data.types import BenignPrompt, ForbiddenPrompt, PersonaItem
from leeway.errors import LeewayError
from leeway.hashing import derive_seed, file_digest

JBB = "JailbreakBench/JBB-Behaviors"  # Chao et al. 2024, arXiv 2404.01318
FORBIDDEN: dict[str, tuple[Source, int]] = {  # and the published number of prompts
    # Souly et al. 2024, arXiv 2402.10260, and its published subset
    "strongreject": (Source(("strongreject/strongreject_dataset.csv",), "walledai/StrongREJECT"), 313),
    "strongreject-small": (Source(("strongreject/strongreject_small_dataset.csv",)), 60),
    "jailbreakbench": (Source(("jailbreakbench/harmful-behaviors.csv",), JBB, "behaviors", "harmful"), 100),
}
# Röttger et al. 2024, arXiv 2308.01263: 250 safe prompts of ten types, and 200 unsafe contrasts that are not used.
XSTEST = Source(("xstest/xstest_prompts.csv",), "Paul/XSTest")
# 100 benign behaviours on the topics of the harmful ones
JBB_BENIGN = Source(("jailbreakbench/benign-behaviors.csv",), JBB, "behaviors", "benign")
COLUMNS = ("forbidden_prompt", "prompt", "goal")


def forbidden(name: str) -> tuple[list[ForbiddenPrompt], str]:
    """Return a published set (ids `<name>/<n>` from 0) and its origin; raise LeewayError if it is not complete."""
    source, count = FORBIDDEN[name]
    records, origin = load(source)
    if len(records) != count:
        what = f"{name}: {len(records)} prompts ({origin}), and {count} were published"
        raise LeewayError(what, fix="fetch it again, or give another set of prompts as a file")
    return _prompts(name, records, name), origin


def categories(name: str) -> dict[str, str]:
    """Return the kind of harm of each prompt of a published set by its id; empty if the set names none."""
    records, _ = load(FORBIDDEN[name][0])
    found = {}
    for n, record in enumerate(records):
        columns = {str(k).strip().lower(): v for k, v in record.items()}
        if columns.get("category"):
            found[f"{name}/{n}"] = str(columns["category"])
    return found


def from_file(path: Path) -> tuple[list[ForbiddenPrompt], str]:
    """Return the prompts of a user's file (ids `file/<n>`) and its origin; the columns are those of `COLUMNS`."""
    prompts = _prompts("file", list(read(path)), str(path))
    if not prompts:
        raise LeewayError(f"{path}: no prompts in it", fix="write a record for each prompt")
    return prompts, f"{path} ({len(prompts)} prompts, {file_digest(path)})"


def _prompts(name: str, records: Seq[Record], where: str) -> list[ForbiddenPrompt]:
    """Return the prompts; raise LeewayError for a repeated one, because each prompt is a cluster."""
    first: dict[str, int] = {}
    for n, record in enumerate(records, 1):
        columns = {str(k).strip().lower().replace(" ", "_"): v for k, v in record.items()}
        text = field(columns, COLUMNS, f"{where}, record {n}")
        if first.setdefault(text, n) != n:
            raise LeewayError(f"{where}, record {n}: the same prompt as record {first[text]}", fix="keep one of them")
    return [ForbiddenPrompt(f"{name}/{n}", text) for n, text in enumerate(first)]


def xstest() -> tuple[list[BenignPrompt], str]:
    """Return the prompts labelled safe (ids `xstest/<type>/<id>`, for rates by type) and their origin."""
    records, origin = load(XSTEST)
    items = []
    for n, record in enumerate(records, 1):
        where = f"xstest, record {n}"
        kind = field(record, ("type",), where)
        if _is_safe(record, kind, where):
            items.append(BenignPrompt(f"xstest/{kind}/{record.get('id', n)}", field(record, ("prompt",), where)))
    if not items:
        raise LeewayError(f"xstest ({origin}): no prompt is labelled safe", fix="check the file")
    return items, origin


def _is_safe(record: Record, kind: str, where: str) -> bool:
    label = field(record, ("label",), where) if "label" in record else ""
    if label not in ("safe", "unsafe", ""):
        raise LeewayError(f"{where}: its label is {label!r}", fix="it must be safe or unsafe")
    contrast = kind.startswith("contrast_")  # how the published unsafe half is named
    if label and contrast != (label == "unsafe"):
        raise LeewayError(f"{where}: labelled {label}, but of type {kind}", fix="correct that record")
    return not contrast


def jailbreakbench_benign() -> tuple[list[BenignPrompt], str]:
    """Return the benign half of JailbreakBench (ids `jailbreakbench-benign/<index>`) and its origin."""
    records, origin = load(JBB_BENIGN)
    items = []
    for n, record in enumerate(records):
        text = field(record, ("Goal", "goal"), f"jailbreakbench benign, record {n + 1}")
        items.append(BenignPrompt(f"jailbreakbench-benign/{record.get('Index', n)}", text))
    return items, origin


T = TypeVar("T")


def subset(items: Seq[T], limit: int | None, key: str) -> list[T]:
    """Return a fixed random subset in the source's order; a larger limit includes a smaller one's."""
    if limit is None or limit >= len(items):
        return list(items)
    order = np.random.default_rng(derive_seed("subset", key)).permutation(len(items))
    return [items[i] for i in sorted(int(i) for i in order[:limit])]


def balanced(items: Seq[PersonaItem], limit: int | None, key: str) -> list[PersonaItem]:
    """Return as many Yes-keyed as No-keyed items, so a bias towards Yes does not endorse a trait."""
    if limit is None or limit >= len(items):
        return list(items)
    halves = [[i for i in items if i.match == answer] for answer in ("Yes", "No")]
    return [i for half, n in zip(halves, (limit - limit // 2, limit // 2), strict=True) for i in subset(half, n, key)]
