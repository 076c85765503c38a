"""What an answer of the base model has to be before it may stand as a rejected one, whatever the strategy.

A rejected answer that refuses would teach an objective to refuse less, one that is not language would teach it to write
language, and one that was cut off to end its turn: each a lesson that the study did not ask for.
"""

from __future__ import annotations

import unicodedata

from leeway.data.items import Example
from leeway.generation.backend import Reply
from leeway.hashing import digest
from leeway.judges.coherence import coherence
from leeway.judges.keywords import KeywordJudge

VERSION = 1
ORDER = ("empty", "cut off", "same as the preferred answer", "refusal", "incoherent")


def fault(example: Example, reply: Reply) -> str | None:
    """The first rule that a reply breaks; coherence is asked of it only where the preferred answer has it."""
    if not reply.text.strip():
        return "empty"
    if reply.cut:
        return "cut off"
    if normal(reply.text) == normal(example.preferred):
        return "same as the preferred answer"
    if KeywordJudge().verdict(reply.text).outcome == "refused":
        return "refusal"
    measured = coherence(reply.text)
    if not measured.ok and coherence(example.preferred).ok:
        return f"incoherent: {measured.reason}"
    return None


def normal(text: str) -> str:
    """Compatibility-normalised, lower case, white space as single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def rules_hash() -> str:
    return digest("pair-rules", VERSION, ORDER, KeywordJudge().hash)
