"""Errors that a user can fix: one line each (what, where; fix), exit code 2 at the command line."""

from __future__ import annotations

import re
from collections.abc import Sequence

HALF_CHARACTER = re.compile("[\\ud800-\\udfff]")  # a surrogate, which JSON and YAML can spell
# control characters except tab and line feed, bidirectional and zero-width ones, surrogates
UNPRINTABLE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)


def printable(text: str) -> str:
    """Return text that cannot control a terminal or reorder its line: such characters become `⟨U+001B⟩`."""
    return UNPRINTABLE.sub(lambda m: f"⟨U+{ord(m[0]):04X}⟩", text)


class LeewayError(Exception):
    """What is wrong and where, and the fix: `LeewayError("budgets: 8k comes after 16k", fix="sort them")`.

    Both may hold text of files and servers, so they are made `printable`.
    """

    def __init__(self, what: str, *, fix: str = "") -> None:
        self.what = printable(what)
        self.fix = printable(fix)
        super().__init__(f"{self.what}; {self.fix}" if fix else self.what)


def all_faults(where: str, faults: Sequence[str]) -> LeewayError:
    """Return one error that lists all faults, one a line if there are several."""
    if len(faults) == 1:
        return LeewayError(f"{where}: {faults[0]}" if where else faults[0])
    return LeewayError("\n  ".join([f"{where}: {len(faults)} faults" if where else f"{len(faults)} faults", *faults]))


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class NotFiniteError(LeewayError):
    """Training diverged: a loss, a gradient or a weight is infinite or NaN."""
