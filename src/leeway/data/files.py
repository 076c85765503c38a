"""The user's own files: training records and test records, one JSON object a line (or .json, .csv, .tsv, .gz of them).

train: any of the shapes in `data/shapes.py`; plainly `prompt` and `completion`, with `rejected` where a pair exists.
test: `prompt` or `question` and `answer` or `reference`; or `messages`, the last of which is the answer.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Literal

from leeway.data import shapes
from leeway.data.items import CapabilityItem, Example
from leeway.data.read import Record, field, read
from leeway.errors import LeewayError

Misfits = Literal["error", "leave-out"]
NAMED = 20  # records that a message lists before it only counts them


def train_examples(path: Path, *, unfit: Misfits = "error") -> tuple[list[Example], str]:
    """(examples, where they came from).

    A record that is not one prompt and its answer (a system turn, several turns, an empty answer) raises LeewayError
    that counts and names all of them; `unfit="leave-out"` leaves them out, and where the examples came from says so.
    """
    examples: list[Example] = []
    misfits: dict[int, str] = {}
    read_one: shapes.Reader | None = None
    for n, record in enumerate(read(path), 1):
        read_one = read_one or shapes.reader(record, path)
        try:
            parsed = read_one(record, f"{path}, record {n}")
        except shapes.Unfit as why:
            misfits[n] = str(why)
        else:
            examples.append(Example(f"{path.name}/{n}", parsed.prompt, parsed.preferred, parsed.dispreferred))
    if misfits and (unfit == "error" or not examples):
        raise LeewayError(
            f"{path}: {_told(misfits, len(misfits) + len(examples))}; an example is one user turn and its answer",
            fix="take these records out, or cut each down to one question and its answer",
        )
    return examples, f"{path}; {_told(misfits, len(misfits) + len(examples))}, left out" if misfits else str(path)


def _told(misfits: dict[int, str], total: int) -> str:
    why = ", ".join(f"{reason}: {n}" for reason, n in sorted(Counter(misfits.values()).items()))
    shown = ", ".join(map(str, list(misfits)[:NAMED])) + (", …" if len(misfits) > NAMED else "")
    return f"{len(misfits)} of {total} records are not supported yet ({why}): record{'s' * (len(misfits) > 1)} {shown}"


def held_out_items(path: Path) -> tuple[list[CapabilityItem], str]:
    """(items, where they came from); a record that is not one question and its answer is an error that names it."""
    items = []
    for n, record in enumerate(read(path), 1):
        prompt, answer = question_and_answer(record, f"{path}, record {n}")
        items.append(CapabilityItem(f"files/{n}", prompt, answer))
    return items, str(path)


def question_and_answer(record: Record, where: str) -> tuple[str, str]:
    """One test record's question and reference answer."""
    if "messages" not in record:
        return field(record, ("prompt", "question"), where), field(record, ("answer", "reference"), where)
    try:
        parsed = shapes.READERS["messages"](record, where)
    except shapes.Unfit as why:
        raise LeewayError(
            f"{where}: {why}, which is not supported yet", fix="give one user turn and its answer"
        ) from why
    return parsed.prompt, parsed.preferred
