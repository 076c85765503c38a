"""The command line without the start of an interpreter, which costs more than most commands."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import sys
from collections.abc import Sequence
from subprocess import CompletedProcess
from unittest import mock

from leeway.cli import main


def leeway(*args: str) -> CompletedProcess[str]:
    """Run a command in this process through its entry point, and studies without worker processes.

    What only a process of its own can show (its exit, pipes, signals, what it imports) needs a real one.
    """
    out, err, code = io.StringIO(), io.StringIO(), None
    with (
        mock.patch.object(sys, "argv", ["leeway", *args]),
        mock.patch.object(os, "sched_getaffinity", return_value={0}, create=True),  # one core: no worker processes
        mock.patch.dict(os.environ),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code
    return CompletedProcess(["leeway", *args], code if isinstance(code, int) else 0, out.getvalue(), err.getvalue())


def split(command: str) -> Sequence[str]:
    """Return the arguments of a command line that begins with `leeway`."""
    return shlex.split(command, comments=True)[1:]
