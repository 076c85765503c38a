"""Every command that reads a run directory names what is damaged in it, in one line, and exits 2."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import synthetic

from leeway.cli import main
from leeway.hashing import file_digest
from leeway.report import rebuild

MOVE = "move it away, and run the report again"
RULES = "checkpoint: {objective: sft}\nrules: [{measure: asr, margin: 0.1}]"
COMMANDS = {
    "report": ["report", "{run}"],
    "gate": ["gate", "{run}", "--rule", "{rules}"],
    "compare": ["compare", "{run}", "{whole}", "--out", "{out}"],
    "ledger": ["ledger", "{run}"],
    "export": ["export", "{run}", "--redacted", "--out", "{out}"],
    "sheet": ["judge", "sheet", "{run}", "--out", "{out}"],
    "rescore": ["rescore", "{run}", "--judge", "keywords"],
}
DAMAGE: dict[str, Callable[[Path], object]] = (
    {
        f"manifest {text[:4]}": lambda run, text=text: (run / "manifest.json").write_text(text)  # type: ignore[misc]
        for text in ("[]", "null", "{", "[" * 100_000)
    }
    | {
        "no manifest": lambda run: (run / "manifest.json").unlink(),
        "no rows": lambda run: (run / "rows.parquet").unlink(),
        "empty rows": lambda run: (run / "rows.parquet").write_bytes(b""),
        "rows of text": lambda run: (run / "rows.parquet").write_text("objective,score\n"),
        "cut rows": lambda run: (run / "rows.parquet").write_bytes((run / "rows.parquet").read_bytes()[:-99]),
        "no folder": shutil.rmtree,
    }
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = synthetic.rows(("sft",), (25_000,), capability=10, prompts=5, items=4)
    return synthetic.write(tmp_path_factory.mktemp("whole") / "run", rows)


def arguments(command: str, run: Path, whole: Path, folder: Path) -> list[str]:
    rules = folder / "rules.yaml"
    rules.write_text(RULES)
    return [a.format(run=run, whole=whole, rules=rules, out=folder / "out") for a in COMMANDS[command]]


def exit_code(given: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["leeway", *given])
    with pytest.raises(SystemExit) as found:
        main()
    return int(found.value.code or 0)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("command", COMMANDS)
def test_damage_is_named_in_one_line(
    command: str,
    damage: str,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    DAMAGE[damage](run)
    before = sorted(p.name for p in tmp_path.iterdir())
    assert exit_code(arguments(command, run, whole, tmp_path), monkeypatch) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("leeway: ")
    assert err.count("\n") == 1
    assert str(run) in err
    assert sorted(p.name for p in tmp_path.iterdir()) in (before, sorted([*before, "rules.yaml"]))


@pytest.mark.parametrize("text", ["", "name: another\n", "# study 0\n"])
def test_a_study_file_that_was_emptied_or_swapped_is_noticed_by_the_gate(
    text: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    manifest = run / "manifest.json"
    manifest.write_text(
        json.dumps(json.loads(manifest.read_text()) | {"file_hashes": {"study.yaml": file_digest(run / "study.yaml")}})
    )
    (run / "study.yaml").write_text(text)
    assert exit_code(arguments("gate", run, whole, tmp_path), monkeypatch) == 2
    assert "study.yaml is not the file that the run wrote" in capsys.readouterr().err


def test_a_file_in_the_place_of_a_folder_of_the_report(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "tables").write_text("mine")
    assert exit_code(["report", str(run)], monkeypatch) == 2
    assert capsys.readouterr().err == f"leeway: {run / 'tables'} is a file, and a folder of the report; {MOVE}\n"
    assert (run / "tables").read_text() == "mine"
    assert not (run / "report.html").exists()


def test_a_run_that_is_removed_during_its_report_is_an_error(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    monkeypatch.setattr(rebuild, "page", lambda *_: shutil.rmtree(run) or "")
    assert exit_code(["report", str(run)], monkeypatch) == 2
    assert f"{run} was removed while its report was made" in capsys.readouterr().err


def drop_file_capabilities() -> None:
    """Give up root's right to open every file, as any other user has none; its own files stay its own."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    sets[0] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, sets) == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
@pytest.mark.parametrize("command", ["report", "gate", "ledger"])
@pytest.mark.parametrize("mode", [0o700, 0o755])
def test_another_users_run(command: str, mode: int, whole: Path, tmp_path: Path) -> None:
    """Unreadable, or readable only: one line and exit 2 for what would be written, no traceback."""
    run, errors = tmp_path / "run", tmp_path / "errors"
    shutil.copytree(whole, run)
    for path in (run, *run.rglob("*")):
        os.chown(path, 65534, 65534)
    run.chmod(mode)
    given = arguments(command, run, whole, tmp_path)
    child = os.fork()
    if not child:
        code = 99
        try:
            sys.stderr = errors.open("w", buffering=1)
            drop_file_capabilities()
            sys.argv = ["leeway", *given]
            main()
        except SystemExit as found:
            code = int(found.code or 0)
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    text = errors.read_text()
    assert code == 2, text
    assert text.startswith("leeway: ")
    assert text.count("\n") == 1
