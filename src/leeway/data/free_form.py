"""Free-form questions: the emergent-misalignment sets (Betley et al. 2025, arXiv 2502.17424), files and hub data sets.

The published sets are read at run time from LEEWAY_DATA and are not shipped. A question asked under several system
prompts, or with an addition after a line break, is one cluster.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path
from typing import Any

from leeway.data.readers import Source, field, load, read
from leeway.data.types import FreeFormQuestion
from leeway.errors import LeewayError
from leeway.hashing import file_digest
from leeway.io import expand, read_utf8
from leeway.yaml_config import nearest
from leeway.yaml_config import read as read_yaml

FOLDER = "emergent_misalignment"
SETS = {
    "first-plot": "first_plot_questions.yaml",
    "preregistered": "preregistered_evals.yaml",
    "deception-factual": "deception_factual.yaml",
}
PUBLISHED_IN = "github: emergent-misalignment/emergent-misalignment"
YAML, RECORDS = (".yaml", ".yml"), (".jsonl", ".json", ".csv", ".tsv", ".gz")
QUESTION = ("question", "prompt")
PROMPTS = ("aligned", "correct", "coherent")  # of a set's own judge, with {question} and {answer} in each
SLOTS = ("{question}", "{answer}")


def questions(source: str) -> tuple[list[FreeFormQuestion], str]:
    """Return the questions of a source in order (ids `<source>/<id>`), and their origin.

    `source` is a published set (`SETS`), a file in the format of those sets (.yaml), a file of records with `question`
    or `prompt` and optionally `id` and `system`, or a hub id of such records. Raises LeewayError for anything else, and
    for records without a question.
    """
    if source in SETS:
        found, origin = _published(source)
    elif source.endswith(YAML):
        path = expand(source)
        found, origin = list(_entries(path, path.stem)), f"{source} ({file_digest(path)})"
    elif source.endswith(RECORDS):
        path = expand(source)
        name = path.name.partition(".")[0]
        found, origin = _records(list(read(path)), name, source), f"{source} ({file_digest(path)})"
    elif source.count("/") == 1:
        records, origin = load(Source((f"{source}.jsonl", f"{source}.json"), source))
        found = _records(records, source.partition("/")[2], source)
    else:
        what = f"evals.alignment: no set of questions {source!r}{nearest(source, [*SETS, 'organism'])}"
        fix = (
            f"give {', '.join(SETS)}, organism, a file ({', '.join(YAML[:1] + RECORDS[:-1])}) or a hub id (owner/name)"
        )
        raise LeewayError(what, fix=fix)
    if not found:
        raise LeewayError(f"evals.alignment: {source} holds no questions ({origin})", fix="check that file")
    ids = [q.id for q in found]
    if twice := next((i for i in ids if ids.count(i) > 1), None):
        raise LeewayError(f"{origin}: the id {twice!r} is given twice", fix="rename one of the two")
    return with_clusters(found), origin


def with_clusters(found: Seq[FreeFormQuestion]) -> list[FreeFormQuestion]:
    """Return the questions with their clusters: the id of the first question that the text repeats or continues."""
    roots: dict[str, str] = {}  # id by text
    for question in sorted(found, key=lambda q: len(q.text)):
        if not any(_continues(question.text, text) for text in roots):
            roots[question.text] = question.id
    return [replace(q, cluster=next(i for text, i in roots.items() if _continues(q.text, text))) for q in found]


def _continues(text: str, root: str) -> bool:
    return text == root or text.startswith(f"{root}\n")


def _published(name: str) -> tuple[list[FreeFormQuestion], str]:
    root, file = os.environ.get("LEEWAY_DATA"), f"{FOLDER}/{SETS[name]}"
    if not root:
        what = f"evals.alignment: {name} is neither shipped nor on the hub"
        raise LeewayError(what, fix=f"set LEEWAY_DATA to a folder with {file} ({PUBLISHED_IN})")
    path = expand(root) / file
    if not path.is_file():
        raise LeewayError(f"LEEWAY_DATA={root}: no {file} in it", fix=f"put it there ({PUBLISHED_IN})")
    return list(_entries(path, name)), f"LEEWAY_DATA/{file} ({file_digest(path)})"


def _entries(path: Path, name: str) -> Iterator[FreeFormQuestion]:
    """Yield one question per paraphrase of each entry of a YAML list."""
    if not path.is_file():
        raise LeewayError(f"{path}: no such file", fix="check that path")
    entries = read_yaml(read_utf8(path), str(path))
    if not isinstance(entries, list):
        raise LeewayError(f"{path}: not a list of questions", fix="write a list of entries with id and paraphrases")
    for n, entry in enumerate(entries, 1):
        where = f"{path}, entry {n}"
        if not isinstance(entry, dict):
            raise LeewayError(f"{where}: not a mapping", fix="give id and paraphrases")
        key, texts = field(entry, ("id",), where), entry.get("paraphrases")
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            raise LeewayError(f"{where} ({key}): no list of paraphrases in it", fix="give one text or more")
        system, judge_prompts = _system(entry, where), _judge_prompts(entry, where)
        for k, text in enumerate(texts, 1):
            own = f"{name}/{key}-{k}" if len(texts) > 1 else f"{name}/{key}"
            yield FreeFormQuestion(own, text.strip(), system, judge_prompts=judge_prompts)


def _judge_prompts(entry: Mapping[str, Any], where: str) -> dict[str, str]:
    prompts = entry.get("judge_prompts") or {}
    if not isinstance(prompts, dict):
        raise LeewayError(f"{where}: its judge_prompts are no mapping", fix="give a text by name")
    found = {str(k): v for k, v in prompts.items() if k in PROMPTS}
    for name, text in found.items():
        if not isinstance(text, str) or not all(slot in text for slot in SLOTS):
            raise LeewayError(f"{where}: its judge prompt {name} lacks {' or '.join(SLOTS)}", fix="correct that entry")
    return found


def _system(record: Mapping[str, Any], where: str) -> str:
    system = record.get("system")
    if system is not None and not isinstance(system, str):
        raise LeewayError(f"{where}: its system prompt is {type(system).__name__}, not text", fix="correct that entry")
    return (system or "").strip()


def _records(records: Seq[Mapping[str, Any]], name: str, where: str) -> list[FreeFormQuestion]:
    found = []
    for n, record in enumerate(records, 1):
        at = f"{where}, record {n}"
        key = field(dict(record), ("id",), at) if "id" in record else str(n)
        found.append(FreeFormQuestion(f"{name}/{key}", field(dict(record), QUESTION, at), system=_system(record, at)))
    return found
