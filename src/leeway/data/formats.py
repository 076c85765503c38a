"""Files of records: training records in any common format, detected by their columns, and test records.

| format | columns |
| --- | --- |
| prompt | `prompt`, and `completion` or `chosen`, with `rejected` where a pair exists; text, or lists of messages |
| turns-pair | `chosen` and `rejected`: whole conversations, each a list of messages, equal up to the last turn |
| hh | `chosen` and `rejected`: strings of turns, each opened by a blank line and `Human:` or `Assistant:` (HH-RLHF) |
| messages | `messages`: `role` and `content` (OpenAI) |
| sharegpt | `conversations`: `from` and `value`; with `chosen` and `rejected`, one turn each, a pair (LLaMA-Factory) |
| alpaca | `instruction`, `input`, and `output`, or `chosen` and `rejected` |

The first record decides, and all others must have the same format. An example is one user turn and its answer: the last
assistant turn is the answer, and a single user turn must precede it. Any other record (a system turn, several turns, no
answer) is an `UnsupportedRecord`; a record that lacks a column is an error that names it.

A test record has `prompt` or `question` and `answer` or `reference`; or `messages`, the last of which is the answer.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from leeway.data.readers import Record, Source, columns_of, field, load, read, refuse_not_finite
from leeway.data.types import CapabilityItem, Example
from leeway.errors import LeewayError
from leeway.io import expand

ROLES = {"user": "user", "human": "user", "system": "system"}
ROLES |= dict.fromkeys(("assistant", "gpt", "chatgpt", "model"), "assistant")
HH_TURN = re.compile(r"\n\n(Human|Assistant):")


class Turn(NamedTuple):
    role: str
    text: str


@dataclass(frozen=True)
class Parsed:
    """A prompt, its preferred answer and, if the record is a pair, the dispreferred one."""

    prompt: str
    preferred: str
    dispreferred: str | None = None


class UnsupportedRecord(Exception):
    """A well-formed record that is not one prompt and its answer; the message is what it has instead."""


Reader = Callable[[Record, str], Parsed]


def detect(record: Record) -> str | None:
    """Return the format that a record's columns match, or None."""
    has = set(record)
    pair = {"chosen", "rejected"} <= has
    if "messages" in has or "conversations" in has:
        return "messages" if "messages" in has else "sharegpt"
    if "instruction" in has and ("output" in has or pair):
        return "alpaca"
    if "prompt" in has and has & {"completion", "chosen"}:
        return "prompt"
    if pair:
        return "turns-pair" if isinstance(_listed(record["chosen"]), list) else "hh"
    return None


def reader(first: Record, path: object) -> Reader:
    """Return the reader of a file by its first record; raise LeewayError for unknown columns."""
    expected = detect(first) or ("prompt" if "prompt" in first else None)
    if expected is None:
        has = columns_of(first)
        fix = "give prompt and completion; or messages, conversations, instruction and output, chosen and rejected"
        raise LeewayError(f"{path}: unknown format of training file (its first record has: {has})", fix=fix)

    def read(record: Record, where: str) -> Parsed:
        if (detected := detect(record)) not in (None, expected):
            what = f"{where}: its columns are of format {detected}, and the first record's of {expected}"
            raise LeewayError(what, fix="keep one format to a file")
        if str(record.get("label")).lower() in ("true", "false"):  # a bad answer would be trained on as a good one
            fix = "keep the good answers and drop the label, or give pairs: prompt, chosen, rejected"
            raise LeewayError(f"{where}: it has a label of its answer (good or bad) and no second answer", fix=fix)
        for column in ("system", "history", "tools"):
            if record.get(column):
                raise UnsupportedRecord(f"a {column} column")
        return READERS[expected](record, where)

    return read


def _prompt(record: Record, where: str) -> Parsed:
    name = "completion" if "completion" in record else "chosen"
    prompt, preferred, rejected = (_listed(record.get(n)) for n in ("prompt", name, "rejected"))
    if not any(isinstance(v, (list, dict)) for v in (prompt, preferred, rejected)):
        refuse_not_finite(rejected, "rejected", where)
        prompt, preferred = (field(record, names, where) for names in (("prompt",), ("completion", "chosen")))
        return Parsed(prompt, preferred, str(rejected or "").strip() or None)
    if isinstance(prompt, list):
        context = _turns(prompt, f"{where}, prompt")
    else:
        context = [Turn("user", field(record, ("prompt",), where))]
    answers = [(preferred, name)] + ([(rejected, "rejected")] if rejected else [])
    return _parsed(context, *(_answer(value, where, column) for value, column in answers))


def _sharegpt(record: Record, where: str) -> Parsed:
    turns = _turns(_column(record, "conversations", where), where, "from", "value")
    if record.get("chosen") is None:
        return _parsed(*_split(turns))
    return _parsed(turns, *(_answer(record.get(n), where, n) for n in ("chosen", "rejected")))


def _alpaca(record: Record, where: str) -> Parsed:
    context = str(record.get("input") or "").strip()
    prompt = field(record, ("instruction",), where) + (f"\n{context}" if context else "")
    answers = ("chosen", "rejected") if record.get("output") is None else ("output",)
    return Parsed(prompt, *(field(record, (name,), where) for name in answers))


READERS: dict[str, Reader] = {
    "prompt": _prompt,
    "messages": lambda record, where: _parsed(*_split(_turns(_column(record, "messages", where), where))),
    "sharegpt": _sharegpt,
    "turns-pair": lambda record, where: _pair(lambda name: _turns(_column(record, name, where), where)),
    "hh": lambda record, where: _pair(lambda name: _hh_turns(field(record, (name,), where), where)),
    "alpaca": _alpaca,
}


def _parsed(context: Sequence[Turn], preferred: str, dispreferred: str | None = None) -> Parsed:
    if any(t.role == "system" for t in context):
        raise UnsupportedRecord("a system turn")
    if len(context) != 1 or context[0].role != "user":
        raise UnsupportedRecord("several turns" if len(context) > 1 else "no user turn")
    if not context[0].text or not preferred or dispreferred == "":
        raise UnsupportedRecord("an empty turn")
    return Parsed(context[0].text, preferred, dispreferred)


def _split(turns: list[Turn]) -> tuple[list[Turn], str]:
    """Return the turns before the last one, and the text of the last, which must be the assistant's."""
    if not turns or turns[-1].role != "assistant":
        raise UnsupportedRecord("no answer at its end")
    return turns[:-1], turns[-1].text


def _column(record: Record, name: str, where: str) -> Any:
    """Return a column's value; raise LeewayError where the record lacks it."""
    if name not in record:
        has = columns_of(record)
        raise LeewayError(f"{where}: no {name} in it (it has: {has})", fix="correct that record")
    return record[name]


def _pair(turns: Callable[[str], list[Turn]]) -> Parsed:
    """Parse two whole conversations, given by column name."""
    chosen, rejected = (_split(turns(name)) for name in ("chosen", "rejected"))
    if chosen[0] != rejected[0]:
        raise UnsupportedRecord("two answers to different prompts")
    return _parsed(chosen[0], chosen[1], rejected[1])


def _answer(value: Any, where: str, name: str) -> str:
    """Return the text of a pair's answer: text, one turn, or a list of one turn, in either spelling."""
    value = _listed(value)
    if isinstance(value, str):
        return value.strip()
    turns = value if isinstance(value, list) else [value]
    keys = ("from", "value") if turns and isinstance(turns[0], dict) and "from" in turns[0] else ("role", "content")
    parsed = _turns(turns, f"{where}, {name}", *keys)
    if len(parsed) != 1:
        raise UnsupportedRecord("several turns" if parsed else "an empty turn")
    if parsed[0].role != "assistant":
        raise UnsupportedRecord("no answer at its end")
    return parsed[0].text


def _turns(value: Any, where: str, role: str = "role", text: str = "content") -> list[Turn]:
    value = _listed(value)
    if not isinstance(value, list) or not all(isinstance(m, dict) and role in m for m in value):
        raise LeewayError(f"{where}: not a list of turns with {role} and {text}", fix="correct that record")
    turns = []
    for m in value:
        name = str(m[role]).lower()
        if name not in ROLES:
            raise UnsupportedRecord(f"a turn of {m[role]!r}")
        turns.append(Turn(ROLES[name], _text(m.get(text))))
    return turns


def _text(content: Any) -> str:
    """Return a turn's text; a list of text parts is joined."""
    if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        content = "".join(str(p.get("text") or "") for p in content)
    if not isinstance(content, str):
        raise UnsupportedRecord("a turn that is not text")
    return content.strip()


def _hh_turns(text: str, where: str) -> list[Turn]:
    pieces = HH_TURN.split("\n\n" + text.lstrip())
    if pieces[0] or len(pieces) < 3:
        what = f"{where}: chosen and rejected are strings without turns that begin with Human: and Assistant:"
        raise LeewayError(what, fix="give the prompt in a column of its own, or write the turns in that form")
    return [Turn(ROLES[r.lower()], t.strip()) for r, t in zip(pieces[1::2], pieces[2::2], strict=True)]


def _listed(value: Any) -> Any:
    """Parse turns that are JSON text, as in a cell of a table; return anything else unchanged."""
    if not isinstance(value, str) or not value.lstrip().startswith("[{"):
        return value
    try:
        turns = json.loads(value)
    except (ValueError, RecursionError):  # text that only looks like turns
        return value
    return turns if all(isinstance(m, dict) and ("role" in m or "from" in m) for m in turns) else value


Unsupported = Literal["error", "leave-out"]
MAX_LISTED = 20  # records in a message


def train_examples(path: Path, *, unsupported: Unsupported = "error") -> tuple[list[Example], str]:
    """Return the examples of a file and their origin.

    Records that are not one prompt and its answer (a system turn, several turns, an empty answer) raise one LeewayError
    that counts and names them; with `unsupported="leave-out"` they are left out, and the origin lists them.
    """
    examples: list[Example] = []
    reasons: dict[int, str] = {}  # by the number of an unsupported record
    parse: Reader | None = None
    for n, record in enumerate(read(path), 1):
        parse = parse or reader(record, path)
        try:
            parsed = parse(record, f"{path}, record {n}")
        except UnsupportedRecord as why:
            reasons[n] = str(why)
        else:
            examples.append(Example(f"{path.name}/{n}", parsed.prompt, parsed.preferred, parsed.dispreferred))
    if not reasons:
        return examples, str(path)
    kinds = ", ".join(f"{reason}: {n}" for reason, n in sorted(Counter(reasons.values()).items()))
    listed = ", ".join(map(str, list(reasons)[:MAX_LISTED])) + (", …" if len(reasons) > MAX_LISTED else "")
    counted = f"{len(reasons)} of {len(reasons) + len(examples)} records are not supported yet ({kinds})"
    summary = f"{path}: {counted}: record{'s' * (len(reasons) > 1)} {listed}"
    if unsupported == "error" or not examples:
        what = f"{summary}; an example is one user turn and its answer"
        raise LeewayError(what, fix="remove these records, or cut each down to one question and its answer")
    return examples, f"{summary}, left out"


def held_out_items(path: Path) -> tuple[list[CapabilityItem], str]:
    """Return the items of a file and its origin; raise LeewayError for a record that is not one question and answer."""
    records = enumerate(read(path), 1)
    return [CapabilityItem(f"files/{n}", *question_and_answer(r, f"{path}, record {n}")) for n, r in records], str(path)


def question_and_answer(record: Record, where: str) -> tuple[str, str]:
    """Return the question and the reference answer of a test record."""
    if "messages" not in record:
        return field(record, ("prompt", "question"), where), field(record, ("answer", "reference"), where)
    try:
        parsed = READERS["messages"](record, where)
    except UnsupportedRecord as why:
        fix = "give one user turn and its answer"
        raise LeewayError(f"{where}: {why}, which is not supported yet", fix=fix) from why
    return parsed.prompt, parsed.preferred


NAMED = {
    # Fei et al. 2023, arXiv 2309.16289 (github.com/open-compass/LawBench): 500 consultations in Chinese, with answers
    "lawbench": Source(("lawbench/3-8_legal_consultation_zh.json",)),
    # Guha et al. 2023, arXiv 2308.11462: its open-ended task, questions on rules of law
    "rule-qa": Source(("legalbench/rule_qa.jsonl", "legalbench/rule_qa.json"), "nguha/legalbench", "rule_qa", "test"),
}
KINDS = (".jsonl", ".json", ".csv", ".tsv", ".gz")


def open_ended_items(task: str, source: str) -> tuple[list[CapabilityItem], str]:
    """Return open-ended questions with their reference answers (`id` is `<task>/<n>`), in order, and their origin.

    Records have `prompt` or `question`, and `reference` or `answer`. An `instruction` precedes the question (LawBench);
    `fields` (LegalBench) become paragraphs, each after its name.
    `source` is `lawbench`, `rule-qa`, the path of a file (.jsonl, .json, .csv, .tsv, .gz of them) or a hub id (its rows
    are read from `<hub id>.jsonl` under LEEWAY_DATA if that is set).
    """
    if source.endswith(KINDS):
        records, origin = list(read(expand(source))), source
    else:
        records, origin = load(_source(source))
    if not records:
        raise LeewayError(f"evals.capability: {task} has no items ({origin})", fix="check the source")
    where = f"{task} ({origin}), record"
    return [CapabilityItem(f"{task}/{n}", *_question(r, f"{where} {n}")) for n, r in enumerate(records, 1)], origin


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
