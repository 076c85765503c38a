"""Errors that a user can fix: one line each (what, where; fix), exit code 2 at the command line."""

from __future__ import annotations


class LeewayError(Exception):
    """What is wrong and where, and the fix: `LeewayError("budgets: 8k comes after 16k", fix="sort them")`."""

    def __init__(self, what: str, *, fix: str = "") -> None:
        self.what = what
        self.fix = fix
        super().__init__(f"{what}; {fix}" if fix else what)


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class NotFiniteError(LeewayError):
    """Training diverged: a loss, a gradient or a weight is infinite or NaN."""
