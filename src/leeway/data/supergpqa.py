"""SuperGPQA (M-A-P 2025, arXiv 2502.14739): one discipline of graduate-level questions with up to ten options.

The prompt is the benchmark's own template if LEEWAY_DATA has it (supergpqa/prompts/zero-shot.yaml, five-shot.yaml:
`prompt_format`, a list of one text with `{}` for the question and its options), else our wording. The origin of the
items names the template and its hash.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from ruamel.yaml.error import YAMLError

from leeway.data.readers import Record, Source, field, load
from leeway.data.types import CapabilityItem, Example
from leeway.errors import LeewayError
from leeway.hashing import derive_seed, digest
from leeway.io import expand
from leeway.yaml_config import load as load_yaml

SOURCE = Source(("supergpqa/SuperGPQA-all.jsonl", "supergpqa/SuperGPQA-all.jsonl.gz"), "m-a-p/SuperGPQA")
LETTERS = "ABCDEFGHIJ"
Shots = Literal[0, 5]
Share = Literal["all", "train", "test"]
HELD_OUT = 5  # one question in 5 is a test item if the study trains on this task
FILES: dict[int, str] = {0: "supergpqa/prompts/zero-shot.yaml", 5: "supergpqa/prompts/five-shot.yaml"}

PROMPT_VERSION = 1
PROMPT = (
    "One option of this question is right. Think it through, then end with a line that reads: Answer: and the letter "
    "of that option.\n\n{}"
)


@dataclass(frozen=True)
class Template:
    """A prompt with one `{}` for `str.format`, and its origin."""

    text: str
    origin: str

    def fill(self, question: str, options: tuple[str, ...]) -> str:
        listed = "\n".join(f"{letter}) {option}" for letter, option in zip(LETTERS, options, strict=False))
        return self.text.format(f"{question}\n{listed}")


def template(shots: Shots = 0) -> Template:
    """Return the official template if LEEWAY_DATA has it, else ours; raise LeewayError for five shots without it."""
    root = os.environ.get("LEEWAY_DATA")
    if root and (path := expand(root) / FILES[shots]).is_file():
        try:
            text = str(load_yaml(path.read_text("utf-8"))["prompt_format"][0])
            if text.format("\0").count("\0") != 1:
                raise ValueError
        except (YAMLError, KeyError, IndexError, TypeError, ValueError) as error:
            raise LeewayError(f"{path}: no prompt_format with exactly one {{}} in it", fix="fetch it again") from error
        return Template(text, f"prompt LEEWAY_DATA/{FILES[shots]} {digest(text)}")
    if shots:
        what = f"evals.capability: supergpqa: the {shots} worked examples are missing"
        raise LeewayError(what, fix=f"put {FILES[shots]} under LEEWAY_DATA, or use 0 shots")
    return Template(PROMPT, f"our prompt, version {PROMPT_VERSION} {digest(PROMPT)}")


def held_out_items(
    discipline: str = "Engineering", *, shots: Shots = 0, share: Share = "all", revision: str | None = None
) -> tuple[list[CapabilityItem], str]:
    """Return one discipline's items in the file's order (`reference` is the gold letter), and their origin.

    The benchmark has one split. `share` divides it by a hash of the question's words, so repeated questions are on one
    side. Records whose `answer` is not the text of their letter's option are counted in the origin.
    """
    prompt = template(shots)
    records, origin = load(SOURCE, revision=revision)
    items: list[CapabilityItem] = []
    disagree = 0
    for n, record in enumerate(records, 1):
        where = f"supergpqa, record {n}"
        if field(record, ("discipline",), where) != discipline:
            continue
        if share != "all" and share != share_of(field(record, ("question",), where)):
            continue
        item = _item(record, where, prompt)
        disagree += item.options[LETTERS.index(item.reference)] != str(record.get("answer", "")).strip()
        items.append(item)
    if not items:
        raise LeewayError(f"supergpqa: no record of discipline {discipline!r} ({origin})", fix="check its name")
    note = f"; the answer of {disagree} records is not their letter's option" if disagree else ""
    part = "" if share == "all" else f" ({share}: {'one' if share == 'test' else 'all but one'} in {HELD_OUT})"
    return items, f"{origin}, discipline {discipline}{part}, {prompt.origin}{note}"


def share_of(question: str) -> Share:
    """Return the side of a question in a study that trains on the task."""
    words = " ".join(question.casefold().split())
    return "test" if derive_seed("supergpqa-share", words) % HELD_OUT == 0 else "train"


def train_examples(discipline: str = "Engineering", *, revision: str | None = None) -> tuple[list[Example], str]:
    """Return the items that are not held out, with their option and letter as the answer (there is no reasoning)."""
    items, origin = held_out_items(discipline, share="train", revision=revision)
    answered = [(i, i.options[LETTERS.index(i.reference)]) for i in items]
    return [Example(i.id, i.prompt, f"{option}\n\nAnswer: {i.reference}") for i, option in answered], origin


def _item(record: Record, where: str, prompt: Template) -> CapabilityItem:
    listed = record.get("options")
    options = tuple(str(o).strip() for o in listed) if isinstance(listed, list) else ()
    letter = field(record, ("answer_letter",), where)
    if not 2 <= len(options) <= len(LETTERS):
        raise LeewayError(f"{where}: options are not a list of 2 to {len(LETTERS)}", fix="correct that record")
    if letter not in LETTERS[: len(options)]:
        raise LeewayError(f"{where}: answer_letter {letter!r} is not one of its options", fix="correct that record")
    question = prompt.fill(field(record, ("question",), where), options)
    return CapabilityItem(f"supergpqa/{field(record, ('uuid',), where)}", question, letter, options)
