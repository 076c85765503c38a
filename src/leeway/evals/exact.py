"""Exact answers to questions from the user's own file: numbers by value, other text by its letters and digits."""

from __future__ import annotations

import json
import unicodedata

from leeway.evals import gsm8k


def normal(text: str) -> str:
    """Lower case, compatibility-normalised, runs of anything but letters and digits as one space."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(c if c.isalnum() else " " for c in folded).split())


def grade(reference: str, response: str) -> tuple[bool, str]:
    """A numeric reference is graded as GSM8K's are; another must be the whole answer."""
    if gsm8k.number(reference) is not None:
        return gsm8k.grade(reference, response)
    right = normal(reference) == normal(response)
    return right, json.dumps({"rule": "exact", "right": right}, sort_keys=True)
