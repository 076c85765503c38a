"""What a base model said, by content: one JSON line for each answer, appended, so that a kill loses a batch at most.

A record's key is a digest of all that it depends on. A line torn by a kill is not read, and drawn again.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from leeway.errors import LeewayError
from leeway.io import verify_checksum, with_checksum

Record = dict[str, Any]


class Cache:
    """Records of one file; a key is written once, and its first record stands."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._records = self._read()

    def get(self, key: str) -> Record | None:
        return self._records.get(key)

    def add(self, records: Mapping[str, Record]) -> None:
        """Append what is new in one write; raises LeewayError where it cannot be written."""
        new = {k: r for k, r in records.items() if k not in self._records}
        if not new:
            return
        lines = "".join(json.dumps(with_checksum({"key": k} | r), sort_keys=True) + "\n" for k, r in new.items())
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as f:
                fcntl.flock(f, fcntl.LOCK_EX)
                f.write((b"" if self._whole(f) else b"\n") + lines.encode())
                f.flush()
                os.fsync(f.fileno())
        except OSError as error:
            raise LeewayError(
                f"{self.path}: answers cannot be kept ({error.strerror})", fix="free some space, or give another folder"
            ) from error
        self._records |= new

    @staticmethod
    def _whole(f: Any) -> bool:
        """Whether the file is empty or ends with a whole line."""
        if f.seek(0, os.SEEK_END) == 0:
            return True
        f.seek(-1, os.SEEK_END)
        return bool(f.read(1) == b"\n")

    def _read(self) -> dict[str, Record]:
        if not self.path.exists():
            return {}
        try:
            lines = self.path.read_bytes().split(b"\n")
        except OSError as error:
            raise LeewayError(f"{self.path}: cannot be read ({error.strerror})", fix="delete it") from error
        records: dict[str, Record] = {}
        for number, line in enumerate(lines, 1):
            try:
                raw = json.loads(line)
            except ValueError:
                continue  # torn by a kill: whoever needs it draws it again
            try:
                record = verify_checksum(raw)
                records.setdefault(record.pop("key"), record)
            except (ValueError, AttributeError, KeyError, TypeError) as error:
                raise LeewayError(
                    f"{self.path}, line {number}: not an answer that was kept there ({error})",
                    fix="delete that line: it is drawn again",
                ) from error
        return records
