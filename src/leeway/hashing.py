"""Content hashes and derived seeds: the identity of everything that is matched, cached or resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from leeway.errors import LeewayError


def digest(*parts: object) -> str:
    """16 hex digits of SHA-256 over the parts as canonical JSON (`bytes` by their own digest)."""
    h = hashlib.sha256()
    for part in parts:
        raw = part if isinstance(part, bytes) else canonical(part).encode()
        h.update(len(raw).to_bytes(8, "big") + raw)
    return h.hexdigest()[:16]


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def file_digest(path: Path) -> str:
    """16 hex digits of SHA-256 over a file's bytes.

    Raises LeewayError for a device or a pipe, which may not end, and for a file that cannot be read.
    """
    if path.exists() and not path.is_file():
        raise LeewayError(f"{path}: not a regular file", fix="replace it by a file")
    try:
        with path.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()[:16]
    except FileNotFoundError:
        raise
    except OSError as error:
        raise LeewayError(f"{path}: cannot be read ({error.strerror})", fix="check the file and its disk") from error


def changed_files(folder: Path, written: Mapping[str, str | list[str]]) -> list[str]:
    """Return the files of `folder` that are missing or whose digest differs from the `written` one.

    A file that is being replaced has two valid digests, the old one and the new one.
    """

    def is_unchanged(name: str, digests: str | list[str]) -> bool:
        path = folder / name
        return path.is_file() and file_digest(path) in ([digests] if isinstance(digests, str) else digests)

    return [name for name, digests in written.items() if not is_unchanged(name, digests)]


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from any key, so that randomness depends on *what* is drawn, never on what was drawn before."""
    raw = hashlib.sha256(canonical(list(parts)).encode()).digest()
    return int.from_bytes(raw[:8], "big") >> 1
