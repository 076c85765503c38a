"""The exit code of a command that crashes, or whose output cannot be written, is never a verdict's (0, 1, 3)."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from command import leeway
from gated import answers, moved, run

from leeway import cli
from leeway.errors import LeewayError

pytestmark = pytest.mark.slow

PASSES = "against: base\nrules: [{measure: accuracy, at_least: 0.01}]\n"
FAILS = "against: base\nrules: [{measure: accuracy, at_least: 0.99}]\n"


def gate(folder: Path, rules: str, *more: str) -> list[str]:
    """The command that decides on a small run by `rules`."""
    directory, path = run(folder, answers("capability", moved(40)), rules=rules)
    return ["gate", str(directory), "--rule", str(path), *more]


def crash_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise error

    monkeypatch.setattr(import_module("leeway.gate.gate"), "gate", crash)  # the module, not the function of its name


@pytest.mark.parametrize("error", [RuntimeError("two\nlines"), RecursionError("too deep")])
def test_a_crash_exits_70_with_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    crash_with(error, monkeypatch)
    found = leeway("gate", "x", "--rule", "y")
    name = type(error).__name__
    assert found.returncode == os.EX_SOFTWARE == 70
    assert found.stdout == ""
    (line,) = found.stderr.splitlines()
    assert line.startswith(f"leeway: internal error: {name}")
    assert line.endswith("; add -v for the traceback")
    verbose = leeway("gate", "x", "--rule", "y", "-v")
    assert verbose.returncode == 70
    assert "Traceback (most recent call last)" in verbose.stderr
    assert "in crash" in verbose.stderr


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (SystemExit(1), 70, "internal error: a library ended the process with 1"),
        (SystemExit("gone"), 70, "internal error: a library ended the process with 'gone'"),
        (asyncio.CancelledError(), 70, "internal error: CancelledError; add -v for the traceback"),
        (
            BaseExceptionGroup("both", [KeyboardInterrupt(), ValueError()]),
            70,
            "internal error: BaseExceptionGroup: both",
        ),
        (KeyboardInterrupt(), 130, "stopped; run the same command again to resume"),
        (MemoryError(), 2, "not enough memory; free some"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 2, "not enough memory; free some"),
        (OSError(errno.EIO, "", "/mnt/x"), 2, "/mnt/x: Input/output error; check the disk"),
        (OSError(errno.EMFILE, ""), 2, "too many open files; raise the limit"),
        (OSError(errno.EFBIG, ""), 2, "no disk space left for the output folder"),
        (OSError(errno.EROFS, "", "/mnt/x"), 2, "/mnt/x: not writable; give another --out"),
    ],
)
def test_no_exception_has_the_exit_code_of_a_verdict(
    error: BaseException, code: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def crash(**_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "app", crash)
    monkeypatch.setattr(sys, "argv", ["leeway", "gate"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == code
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"leeway: {line}")


def test_a_package_that_cannot_be_imported_exits_70() -> None:
    """Python itself would exit 1, which says that the gate's rules fail."""
    script = "import sys; sys.modules['leeway.cli'] = None; from leeway.__main__ import main; main()"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert found.returncode == 70
    (line,) = found.stderr.splitlines()
    assert line.startswith("leeway: cannot run (ModuleNotFoundError")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed_from_the_start_change_no_exit_code(closed: str) -> None:
    command = f"{sys.executable} -m leeway gate /nowhere --rule /nowhere.yaml {closed}"
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize(("rules", "code"), [(PASSES, 0), (FAILS, 1)])
def test_a_stdout_of_ascii_alone_keeps_the_verdict(rules: str, code: int, tmp_path: Path) -> None:
    found = leeway(*gate(tmp_path, rules), encoding="ascii")
    assert (found.returncode, found.stderr) == (code, "")
    assert found.stdout.rstrip().endswith(f"gate: {['pass', 'fail'][code]}")


def test_any_text_can_be_printed_to_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    crash_with(LeewayError("größer ≥ \ud800"), monkeypatch)
    found = leeway("gate", "x", "--rule", "y", encoding="ascii")
    assert found.returncode == 2
    assert found.stderr == "leeway: gr\\xf6\\xdfer \\u2265 \\u27e8U+D800\\u27e9\n"


@pytest.mark.parametrize(("rules", "closed"), [(PASSES, "stdout"), (FAILS, "stdout"), (PASSES, "stderr")])
def test_a_closed_pipe_is_no_verdict(rules: str, closed: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "leeway", *gate(tmp_path, rules)]
    if closed == "stderr":
        command = [*command[:-1], str(tmp_path / "nowhere.yaml")]  # a mistake, whose line cannot be written
    reader, writer = os.pipe()
    os.close(reader)
    other = {"stdout": "stderr", "stderr": "stdout"}[closed]
    try:
        found = subprocess.run(command, check=False, text=True, **{closed: writer, other: subprocess.PIPE})  # type: ignore[call-overload]
    finally:
        os.close(writer)
    assert found.returncode == {"stdout": 141, "stderr": 2}[closed]
    assert not found.stderr
    assert not found.stdout


def test_a_closed_pipe_of_a_plain_command() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "leeway", "studies"]
    try:
        found = subprocess.run(command, check=False, stdout=writer, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(writer)
    assert (found.returncode, found.stderr) == (141, "")
