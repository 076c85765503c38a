"""The command line: verbs only, each a call or two into the rooms below."""

from __future__ import annotations

import errno
import os
import sys
import traceback

import typer

from leeway.cli import finished, studies, tools
from leeway.errors import LeewayError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Measure how far fine-tuning pushes a chat model off course. Add -v to any command for a traceback.",
)
for verbs in (studies, finished, tools):
    app.add_typer(verbs.app)

INTERRUPTED = 130  # what shells say of a program ended by Ctrl-C
STOPPED = "stopped; the same command carries on from here"


def main() -> None:
    """Run a command: a user's mistake is one line on stderr and exit code 2; `-v` shows where it came from."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads that spin starve a busy machine
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    verbose = any(a in ("-v", "--verbose") for a in sys.argv[1:])
    sys.argv[1:] = [a for a in sys.argv[1:] if a not in ("-v", "--verbose")]
    try:
        code = app(standalone_mode=False)
    except KeyboardInterrupt:
        _fail(STOPPED, INTERRUPTED, verbose)
    except LeewayError as error:
        _fail(str(error), 2, verbose)
    except Exception as error:
        line = _mistake(error)
        if line is None:
            raise
        _fail(line, 2, verbose)
    if code == INTERRUPTED:
        _fail(STOPPED, INTERRUPTED, verbose=False)
    sys.exit(code if isinstance(code, int) else 0)


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


def _fail(line: str, code: int, verbose: bool) -> None:
    if verbose:
        traceback.print_exc()
    print(f"leeway: {line}", file=sys.stderr)
    sys.exit(code)
