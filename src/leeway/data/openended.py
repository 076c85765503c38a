"""Open-ended questions with reference answers, from files or hub data sets; none of them are in this source tree.

Records have `prompt` or `question`, and `reference` or `answer`. An `instruction` precedes the question (LawBench);
`fields` (LegalBench) become paragraphs, each after its name.
"""

from __future__ import annotations

from typing import Any

from leeway.data.formats import question_and_answer
from leeway.data.readers import Record, Source, field, load, read
from leeway.data.types import CapabilityItem
from leeway.errors import LeewayError
from leeway.io import expand

NAMED = {
    # Fei et al. 2023, arXiv 2309.16289 (github.com/open-compass/LawBench): 500 consultations in Chinese, with answers
    "lawbench": Source(("lawbench/3-8_legal_consultation_zh.json",)),
    # Guha et al. 2023, arXiv 2308.11462: its open-ended task, questions on rules of law
    "rule-qa": Source(("legalbench/rule_qa.jsonl", "legalbench/rule_qa.json"), "nguha/legalbench", "rule_qa", "test"),
}
KINDS = (".jsonl", ".json", ".csv", ".tsv", ".gz")


def held_out_items(task: str, source: str) -> tuple[list[CapabilityItem], str]:
    """Return the items of a source (`id` is `<task>/<n>`), in its order, and their origin.

    `source` is `lawbench`, `rule-qa`, the path of a file (.jsonl, .json, .csv, .tsv, .gz of them) or a hub id (its rows
    are read from `<hub id>.jsonl` under LEEWAY_DATA if that is set).
    """
    if source.endswith(KINDS):
        records, origin = list(read(expand(source))), source
    else:
        records, origin = load(_source(source))
    items = []
    for n, record in enumerate(records, 1):
        prompt, reference = _question(record, f"{task} ({origin}), record {n}")
        items.append(CapabilityItem(f"{task}/{n}", prompt, reference))
    if not items:
        raise LeewayError(f"evals.capability: {task} has no items ({origin})", fix="check the source")
    return items, origin


def _source(name: str) -> Source:
    if name in NAMED:
        return NAMED[name]
    if name.count("/") != 1:
        what = f"evals.capability: {name!r} is not a source of open-ended questions"
        raise LeewayError(what, fix=f"give {', '.join(NAMED)}, a file ({', '.join(KINDS)}) or a hub id (owner/name)")
    return Source((f"{name}.jsonl", f"{name}.json"), name, split="test")


def _question(record: Record, where: str) -> tuple[str, str]:
    fields: Any = record.get("fields")
    if isinstance(fields, dict):
        question = "\n\n".join(f"{name}: {str(text).strip()}" for name, text in fields.items() if str(text).strip())
        if not question:
            raise LeewayError(f"{where}: its fields are empty", fix="correct that record")
        return question, field(record, ("answer", "reference"), where)
    if "text" in record and not {"prompt", "question"} & set(record):
        return field(record, ("text",), where), field(record, ("answer", "reference"), where)
    prompt, reference = question_and_answer(record, where)
    instruction = str(record.get("instruction") or "").strip()
    return (f"{instruction}\n\n{prompt}" if instruction else prompt), reference
