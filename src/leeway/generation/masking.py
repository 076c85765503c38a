"""Find an API key where it must not be: in what an endpoint sends back, as it is or encoded, and in settings."""

from __future__ import annotations

import base64
import json
import re
from functools import lru_cache
from urllib.parse import quote

MASK = "[key]"
MIN_CHARS = 8  # a shorter key is a placeholder ("none", "EMPTY"), whose letters stand in ordinary text

VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)
LIKE_A_KEY = re.compile(r"(?=.*[a-z])(?=.*\d)\w{20,}", re.ASCII)


def variable_fault(name: str) -> str:
    """Return what is wrong with the name of a key's environment variable, without quoting it; "" for none."""
    if not name or (VARIABLE.fullmatch(name) and not LIKE_A_KEY.fullmatch(name)):
        return ""
    return "is not the name of an environment variable (is it the key itself?); name the variable that holds the key"


def mask(text: str, key: str) -> str:
    """Return `text` with the key, and its encodings, replaced by `[key]`."""
    return _pattern(key).sub(MASK, text) if len(key) >= MIN_CHARS else text


def quotes(text: str, key: str) -> bool:
    """Return whether `text` holds the key or an encoding of it."""
    return len(key) >= MIN_CHARS and _pattern(key).search(text) is not None


@lru_cache(maxsize=32)
def _pattern(key: str) -> re.Pattern[str]:
    """Match the key as it is, in JSON, in a URL, in hexadecimal, and within any Base64 text."""
    raw = key.encode()
    forms = {key, json.dumps(key)[1:-1], quote(key, safe=""), raw.hex(), *_base64_forms(raw)}
    return re.compile("|".join(map(re.escape, sorted(forms, key=len, reverse=True))), re.IGNORECASE)


def _base64_forms(raw: bytes) -> set[str]:
    """Return the characters that depend on `raw` alone, for each of its three positions in the encoded text."""
    forms = set()
    for offset in range(3):
        first, end = -(-8 * offset // 6), 8 * (offset + len(raw)) // 6
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            forms.add(encode(bytes(offset) + raw).decode()[first:end])
    return forms
