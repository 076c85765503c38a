"""The command line: verbs only, each a call or two into the rooms below."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
import traceback
from typing import NoReturn

import typer

from leeway.cli import finished, studies, tools
from leeway.errors import LeewayError, first_line

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Measure how far fine-tuning pushes a chat model off course. Add -v to any command for a traceback.",
)
for verbs in (studies, finished, tools):
    app.add_typer(verbs.app)

INTERRUPTED = 130  # what shells report for a program ended by Ctrl-C
CLOSED_PIPE = 141  # and for one that writes into a pipe whose reader has gone, as `| head` does
CRASH = 70  # EX_SOFTWARE; 0, 1 and 3 are a gate's verdicts
STOPPED = "stopped; the same command carries on from here"


def main() -> None:
    """Run a command and exit with its code.

    A user's mistake is one line on stderr and exit code 2; any other exception is one line and 70; `-v` adds the
    traceback to either. A closed pipe on stdout is 141.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads that spin starve a busy machine
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an ASCII-only terminal must not raise UnicodeEncodeError
    verbose = any(a in ("-v", "--verbose") for a in sys.argv[1:])
    sys.argv[1:] = [a for a in sys.argv[1:] if a not in ("-v", "--verbose")]
    try:
        code = app(standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()  # at interpreter shutdown it would be too late to report a failure
    except KeyboardInterrupt:
        _fail(STOPPED, INTERRUPTED, verbose)
    except LeewayError as error:
        _fail(str(error), 2, verbose)
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # the command-line and terminal libraries exit 1 on it
            _leave(CLOSED_PIPE)
        raise
    except Exception as error:  # noqa: BLE001 - whatever it is, it must not exit 1
        if isinstance(error, BrokenPipeError) and _stdout_is_closed():
            _leave(CLOSED_PIPE)
        line = _mistake(error)
        if line is None:
            name, detail = type(error).__name__, first_line(error)
            named = name if detail == name else f"{name}: {detail}"
            _fail(f"internal error: {named}; add -v for the traceback", CRASH, verbose)
        _fail(line, 2, verbose)
    if code == INTERRUPTED:
        _fail(STOPPED, INTERRUPTED, verbose=False)
    sys.exit(code if isinstance(code, int) else 0)


def _stdout_is_closed() -> bool:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return True
    return False


def _leave(code: int) -> NoReturn:
    """Exit with `code` even where stdout or stderr cannot be flushed: the interpreter would exit 120 then."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


def _mistake(error: Exception) -> str | None:
    """One line for what a user can mend and other libraries raise: a usage error, a full disk, a folder of others."""
    if hasattr(error, "format_message"):  # the command-line library's own
        said = error.format_message().replace("\n", " ")
        return f"{said} (see `leeway --help`)" if said else "name a command (see `leeway --help`)"
    code = error.errno if isinstance(error, OSError) else None
    full = any(sign in str(error) for sign in ("No space left", "StorageFull"))  # writers in Rust raise their own kind
    if full or code in (errno.ENOSPC, errno.EDQUOT):
        return "no disk space left for the output folder; free some and run the same command again: it carries on"
    if code in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG):
        where = getattr(error, "filename", None) or "the output folder"
        return f"{where}: may not be written; give another --out"
    return None


def _fail(line: str, code: int, verbose: bool) -> NoReturn:
    with contextlib.suppress(OSError):  # stderr may be a closed pipe too
        if verbose:
            traceback.print_exc()
        print(f"leeway: {line}", file=sys.stderr)
    _leave(code)
