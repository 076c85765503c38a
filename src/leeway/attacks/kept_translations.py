"""Translations in a file, one JSON object a line, so that a set is translated once and can be read by a speaker.

    {"direction": "out" | "back", "source": …, "text": …}      and `"reviewed": true` once somebody has read it

A line that a translator added also says `by`, the translator's hash. Reviewed lines and lines without `by` are given:
they stand whoever translates, and may leave a text as it is. Other lines serve the translator that wrote them.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

from leeway.attacks.attack import AttackFailed, Helper
from leeway.attacks.zulu import Passage
from leeway.errors import LeewayError
from leeway.hashing import digest
from leeway.paths import expand

Key = tuple[str, str]
Entry = dict[str, Any]


class Cached:
    """A Helper that answers from `path`; what is missing is asked of `inner` and appended, or is an AttackFailed.

    Its hash covers the given lines as they stood when it was made and `inner`'s hash; without `inner`, every line.
    Raises LeewayError for a broken line, and where two reviewed translations of one text differ.
    """

    def __init__(self, path: Path | str, inner: Helper | None = None, name: str = "cached") -> None:
        self.path = expand(path)
        self.inner = inner
        self.name = name
        if inner is None and not self.path.is_file():
            raise LeewayError(f"{self.path}: no such file", fix="give a file of translations, or a translator as well")
        self._texts = self._read()
        fixed = sorted(self._given.items()) if inner else sorted(self._texts.items())
        self.hash = digest("cached", inner.hash if inner else None, [[*key, text] for key, text in fixed])

    def help(self, asked: Seq[Passage]) -> list[str | AttackFailed]:
        """What is missing is asked at once, each text once."""
        missing = [p for p in dict.fromkeys(asked) if (p.direction, p.text) not in self._texts]
        failed: dict[Passage, AttackFailed] = {}
        if missing and self.inner is None:
            failed = {p: AttackFailed(f"no translation ({p.direction}) in {self.path.name}") for p in missing}
        elif missing and self.inner is not None:
            said = dict(zip(missing, self.inner.help(missing), strict=True))
            self._add({(p.direction, p.text): t for p, t in said.items() if isinstance(t, str)})
            failed = {p: t for p, t in said.items() if not isinstance(t, str)}
        return [failed[p] if p in failed else self._texts[p.direction, p.text] for p in asked]

    def _add(self, new: dict[Key, str]) -> None:
        """Add what nobody else has added meanwhile, the whole file in one step; a text's first translation stands."""
        by = self.inner.hash if self.inner else ""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.with_name(f"{self.path.name}.lock").open("wb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                self._texts = self._read() | self._texts
                added = {k: t for k, t in new.items() if k not in self._texts}
                rows = [{"direction": d, "source": s, "text": t, "by": by} for (d, s), t in added.items()]
                body = self.path.read_bytes() if self.path.is_file() else b""
                body += b"" if not body or body.endswith(b"\n") else b"\n"
                other = self.path.with_name(f"{self.path.name}.part")
                other.write_bytes(body + "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode())
                os.replace(other, self.path)
        except OSError as error:
            raise LeewayError(
                f"{self.path}: translations cannot be kept ({error.strerror})", fix="give another file"
            ) from error
        self._texts |= added

    def _read(self) -> dict[Key, str]:
        """Text by direction and source: reviewed before given before a translator's, an earlier line before a later."""
        found: dict[Key, tuple[int, str]] = {}
        self._given: dict[Key, str] = {}
        for number, entry in self._entries():
            key, text, reviewed = (entry["direction"], entry["source"]), entry["text"], entry.get("reviewed", False)
            given = reviewed or "by" not in entry
            if not given and self.inner is not None and entry["by"] != self.inner.hash:
                continue
            rank, before = int(given) + int(reviewed), found.get(key)
            if before and reviewed and before[0] == rank and before[1] != text:
                raise LeewayError(
                    f"{self.path}, line {number}: another reviewed translation of the same text", fix="keep one of them"
                )
            if before is None or rank > before[0]:
                found[key] = (rank, text)
                if given:
                    self._given[key] = text
        return {key: text for key, (_, text) in found.items()}

    def _entries(self) -> list[tuple[int, Entry]]:
        if not self.path.is_file():
            return []
        try:
            lines = self.path.read_text("utf-8-sig").split("\n")
        except OSError as error:
            raise LeewayError(f"{self.path}: cannot be read ({error.strerror})", fix="give another file") from error
        except UnicodeDecodeError as error:
            raise LeewayError(f"{self.path}: not UTF-8 text (byte {error.start})", fix="save it as UTF-8") from error
        return [(k, self._entry(k, line)) for k, line in enumerate(lines, 1) if line.strip()]

    def _entry(self, number: int, line: str) -> Entry:
        where = f"{self.path}, line {number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise LeewayError(f"{where}: not JSON ({error.msg})", fix="mend or remove that line") from error
        texts = [entry.get(k) for k in ("direction", "source", "text")] if isinstance(entry, dict) else []
        if not texts or not all(isinstance(t, str) and t.strip() for t in texts) or texts[0] not in ("out", "back"):
            raise LeewayError(f"{where}: not a translation", fix="give direction (out or back), source and text")
        if not isinstance(entry.get("reviewed", False), bool):
            raise LeewayError(f"{where}: reviewed is neither true nor false", fix="write true or false")
        return dict(entry)
