"""Errors that a user can fix: one line each (what, where; fix), exit code 2 at the command line."""

from __future__ import annotations

from collections.abc import Sequence


class LeewayError(Exception):
    """What is wrong and where, and the fix: `LeewayError("budgets: 8k comes after 16k", fix="sort them")`."""

    def __init__(self, what: str, *, fix: str = "") -> None:
        self.what = what
        self.fix = fix
        super().__init__(f"{what}; {fix}" if fix else what)


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
