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


def leeway(*args: str, encoding: str = "utf-8") -> CompletedProcess[str]:
    """Run a command in this process through its entry point, and studies without worker processes.

    `encoding` is that of its output. What only a process of its own can show (its exit, pipes, signals, what it
    imports) needs a real one.
    """
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding, newline="", write_through=True) for _ in range(2))
    code = None
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
    printed, failed = (stream.buffer.getvalue().decode(encoding) for stream in (out, err))  # type: ignore[attr-defined]
    return CompletedProcess(["leeway", *args], code if isinstance(code, int) else 0, printed, failed)


def split(command: str) -> Sequence[str]:
    """Return the arguments of a command line that begins with `leeway`."""
    return shlex.split(command, comments=True)[1:]
