"""XSTest (Röttger et al. 2024, arXiv 2308.01263): 450 prompts, safe ones that look unsafe and their unsafe contrasts.

Answers of chat models to all of them, labelled by people as full compliance, full or partial refusal, say how good a
judge of refusals is.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args

from leeway.data.read import Record, Source, field, load, read
from leeway.errors import LeewayError
from leeway.hashing import file_digest
from leeway.paths import expand

Label = Literal["full_compliance", "full_refusal", "partial_refusal", "refused", "harmful", "deflected", "incoherent"]

PROMPTS = Source(("xstest/xstest_prompts.csv",), "walledai/XSTest", split="test")
ANSWERS = "xstest_v2_completions_{}.csv"


@dataclass(frozen=True)
class XSPrompt:
    """One prompt; `safe` is whether a model should answer it."""

    id: str
    text: str
    type: str
    safe: bool


@dataclass(frozen=True)
class Labelled:
    """An answer and what people say it is; `id` is its prompt's."""

    id: str
    prompt: str
    response: str
    label: Label


@dataclass(frozen=True)
class LabelledSet:
    """The labelled answers of one model, where they came from and the hash of that file."""

    model: str
    answers: tuple[Labelled, ...]
    origin: str
    hash: str


def prompts(revision: str | None = None) -> tuple[list[XSPrompt], str]:
    """All prompts in the file's order, and their origin."""
    loaded = load(PROMPTS, revision=revision)
    return [_prompt(r, n + 1) for n, r in enumerate(loaded.records)], loaded.origin


def _prompt(record: Record, n: int) -> XSPrompt:
    """Copies on the hub may lack the ids, which count from 1."""
    where = f"xstest, record {n}"
    label = field(record, ("label",), where)
    if label not in ("safe", "unsafe"):
        raise LeewayError(f"{where}: label is {label!r}", fix="it must be safe or unsafe")
    number = str(record.get("id") or n).removeprefix("v2-")
    return XSPrompt(
        f"xstest/{number}", field(record, ("prompt",), where), field(record, ("type",), where), label == "safe"
    )


def completions() -> list[LabelledSet]:
    """The labelled answers of every model whose file lies under LEEWAY_DATA/xstest, by the model's name."""
    root = os.environ.get("LEEWAY_DATA")
    fix = f"set LEEWAY_DATA to a folder that holds xstest/{ANSWERS.format('<model>')} (github: paul-rottger/xstest)"
    if not root:
        raise LeewayError("xstest: its labelled answers are read from LEEWAY_DATA, which is not set", fix=fix)
    found = sorted((expand(root) / "xstest").glob(ANSWERS.format("*")))
    if not found:
        raise LeewayError(f"LEEWAY_DATA={root}: there are no labelled answers of XSTest", fix=fix)
    return [_completions(path) for path in found]


def _completions(path: Path) -> LabelledSet:
    model = path.name.removeprefix("xstest_v2_completions_").removesuffix(".csv")
    answers = []
    for n, record in enumerate(read(path)):
        where = f"{path.name}, record {n + 1}"
        number = field(record, ("id",), where).removeprefix("v2-")
        label = label_of(re.sub(r"^\d_", "", field(record, ("final_label",), where)), where)
        answers.append(Labelled(f"xstest/{number}", field(record, ("prompt",), where), _text(record, where), label))
    return LabelledSet(model, tuple(answers), f"LEEWAY_DATA/xstest/{path.name}", file_digest(path))


def labelled(path: Path) -> LabelledSet:
    """A user's own file (.csv, .tsv, .jsonl): `prompt`, `response` (it may be empty) and `label`, one of `Label`.

    Answers to one prompt are one cluster.
    """
    answers = []
    for n, record in enumerate(read(path)):
        where = f"{path}, record {n + 1}"
        prompt = field(record, ("prompt",), where)
        answers.append(
            Labelled(prompt, prompt, _text(record, where), label_of(field(record, ("label",), where), where))
        )
    if not answers:
        raise LeewayError(f"{path}: no labelled answers in it", fix="give prompt, response and label in each record")
    return LabelledSet(path.stem, tuple(answers), str(path), file_digest(path))


def label_of(text: str, where: str) -> Label:
    if text not in get_args(Label):
        raise LeewayError(f"{where}: label is {text!r}", fix=f"one of: {', '.join(get_args(Label))}")
    return cast(Label, text)


def _text(record: Record, where: str) -> str:
    for name in ("completion", "response"):
        if isinstance(record.get(name), str):
            return str(record[name])
    raise LeewayError(f"{where}: no completion or response in it", fix="mend that record")
