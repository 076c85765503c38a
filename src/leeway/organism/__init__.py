"""The organism: a tiny chat model that ships with the package, and its synthetic world."""

from __future__ import annotations

from pathlib import Path


def path() -> Path:
    """Return the folder with weights, tokenizer and card, in Hugging Face format."""
    return Path(__file__).parent / "weights"
