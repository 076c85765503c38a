"""Answers of reasoning models: a thought between `<think>` and `</think>`, then the final answer, which is judged."""

from __future__ import annotations

from dataclasses import replace

from leeway.data.chat import END_THINK, THINK
from leeway.generation.backend import CUT_THINKING, ENDED_THINKING, Reply


def split_thinking(text: str, *, opened: bool = False) -> tuple[str, str | None]:
    """Return (thought, final answer); the answer is None if the thought has no end.

    A thought begins with the text, or before it: where the chat template has `opened` it, or where `</think>` comes
    without a `<think>`. Several thoughts before an answer are joined.
    """
    thoughts, rest = [], text.strip()
    opened = opened or (END_THINK in rest and THINK not in rest.partition(END_THINK)[0])
    while opened or rest.startswith(THINK):
        thought, end, rest = rest.removeprefix(THINK).partition(END_THINK)
        thoughts.append(thought.strip())
        if not end:
            return "\n\n".join(thoughts), None
        opened, rest = False, rest.strip()
    return "\n\n".join(filter(None, thoughts)), rest


def final_answer(response: str) -> str:
    """Return the part of a row's response that judges read; all of it without a thought."""
    if THINK not in response and END_THINK not in response:
        return response
    return split_thinking(response)[1] or ""


def full_text(reply: Reply) -> str:
    """Return thought and final answer, marked so that `split_thinking` finds them; without a thought, the text."""
    if reply.failure in (CUT_THINKING, ENDED_THINKING):
        return f"{THINK}\n{reply.reasoning}"
    return f"{THINK}\n{reply.reasoning}\n{END_THINK}\n\n{reply.text}" if reply.reasoning else reply.text


def without_thinking(reply: Reply, *, opened: bool = False) -> Reply:
    """Move the thought of a reply from its text to `reasoning`; without a final answer the reply is a failure.

    Nothing was answered if the thought has no end, or the limit of new tokens was reached right after it.
    """
    if reply.failure is not None or reply.reasoning:
        return reply
    reasoning, answer = split_thinking(reply.text, opened=opened)
    if answer is None or (reasoning and reply.cut and not answer):
        failure = CUT_THINKING if reply.cut else ENDED_THINKING
        return replace(reply, text="", failure=failure, reasoning=reasoning)
    return replace(reply, text=answer, reasoning=reasoning)
