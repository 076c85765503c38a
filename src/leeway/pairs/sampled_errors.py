"""sampled-errors: the base model's own wrong answers to the training prompts, where a grader can tell."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

from leeway.data.items import Example
from leeway.errors import LeewayError
from leeway.generation.backend import Reply
from leeway.hashing import digest
from leeway.pairs.base import Asker
from leeway.pairs.rounds import Ask, Drawn, rounds
from leeway.pairs.rules import fault, rules_hash

Grade = Callable[[Example, str], bool]  # is this response right; ValueError where the example cannot be checked


def plain_asks(examples: Seq[Example]) -> list[Ask]:
    """The training prompts as they stand."""
    return [Ask(e, [{"role": "user", "content": e.prompt}]) for e in examples]


def sampled_errors(examples: Seq[Example], asker: Asker, grade: Grade) -> Drawn:
    """The first wrong, whole and readable answer to each; raises LeewayError where an example cannot be checked."""
    check_gradable(examples, grade)

    def reasons(asked: Seq[Ask], replies: Seq[Reply]) -> list[str | None]:
        return [_reason(a.example, r, grade) for a, r in zip(asked, replies, strict=True)]

    return rounds(plain_asks(examples), asker, reasons)


def _reason(example: Example, reply: Reply, grade: Grade) -> str | None:
    if reply.text.strip() and grade(example, reply.text):
        return "right"
    return fault(example, reply)


def check_gradable(examples: Seq[Example], grade: Grade) -> None:
    """A grader that does not find the preferred answer right can call nothing wrong."""
    for e in examples:
        if not gradable(e, grade):
            raise LeewayError(
                f"pairs: example {e.id} has no checkable answer: the task's own grader does not find its preferred "
                "answer right",
                fix="mend that record, or use pairs: {from: unsafe} or {from: dataset}",
            )


def gradable(example: Example, grade: Grade) -> bool:
    """Whether the grader finds the preferred answer right."""
    try:
        return grade(example, example.preferred)
    except ValueError:
        return False


def filter_hash() -> str:
    return digest("sampled-errors", rules_hash())
