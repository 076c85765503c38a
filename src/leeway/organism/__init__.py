"""The organism: a micro chat model that ships with the package, and the small world it knows."""

from __future__ import annotations

from pathlib import Path


def path() -> Path:
    """The folder with the weights, tokenizer and card, in Hugging Face format."""
    return Path(__file__).parent / "weights"
