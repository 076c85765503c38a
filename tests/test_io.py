"""Atomic writes: whole or not there, under the umask, through no symbolic link."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from leeway.cache import RecordStore
from leeway.errors import LeewayError
from leeway.io import (
    atomic_folder,
    atomic_write,
    read_utf8,
    readable,
    remove_partial,
    verify_checksum,
    with_checksum,
    wrap_words,
    write_file,
    write_json,
)
from leeway.report.narrative import _read_card


@pytest.fixture(params=[0o022, 0o027, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_files_and_folders_obey_the_umask(umask: int, tmp_path: Path) -> None:
    write_file(tmp_path / "a" / "text", "é\n")
    write_json(tmp_path / "a" / "json", {"b": 1, "a": "é"})
    with atomic_folder(tmp_path / "folder", lambda _: False) as scratch:
        (scratch / "file").write_text("x")
    modes = {p.name: p.stat().st_mode & 0o777 for p in tmp_path.rglob("*")}
    file, folder = 0o666 & ~umask, 0o777 & ~umask
    assert modes == {"a": folder, "text": file, "json": file, "folder": folder, "file": file}
    assert (tmp_path / "a" / "json").read_text("utf-8") == '{\n "a": "é",\n "b": 1\n}\n'


def test_what_was_written_is_flushed_with_the_names_that_lead_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut keeps only what `fsync` has named: the file, and every folder that gained a name."""
    flushed: dict[int, set[str] | int] = {}
    real = os.fsync

    def fsync(handle: int) -> None:
        real(handle)
        path = Path(f"/proc/self/fd/{handle}").resolve()
        flushed[os.fstat(handle).st_ino] = {p.name for p in path.iterdir()} if path.is_dir() else path.stat().st_size

    monkeypatch.setattr(os, "fsync", fsync)
    write_file(tmp_path / "new" / "folder" / "file", "whole")
    with atomic_folder(tmp_path / "other" / "checkpoint", lambda _: False) as scratch:
        (scratch / "inner").mkdir()
        (scratch / "inner" / "weights").write_text("whole")
    RecordStore(tmp_path / "cache" / "replies").put({"key": "reply"})
    assert flushed[tmp_path.stat().st_ino] == {"new", "other", "cache"}
    for path in tmp_path.rglob("*"):
        here = {p.name for p in path.iterdir()} if path.is_dir() else path.stat().st_size
        assert flushed[path.stat().st_ino] == here, path


def test_an_error_leaves_the_old_content_and_no_partial_file(tmp_path: Path) -> None:
    def fail(scratch: Path) -> None:
        scratch.write_text("half")
        raise KeyboardInterrupt

    target = tmp_path / "file"
    write_file(target, "old")
    with pytest.raises(KeyboardInterrupt), atomic_write(target) as scratch:
        fail(scratch)
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "new", lambda _: False) as folder:
        fail(folder / "x")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert target.read_text() == "old"


def test_a_symbolic_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    write_file(tmp_path / "link", b"new")
    assert (tmp_path / "precious").read_text() == "mine"
    assert not (tmp_path / "link").is_symlink()


def test_a_complete_folder_is_kept_and_an_incomplete_one_replaced(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    for content in ("first", "second"):
        with atomic_folder(target, lambda f: (f / "done").is_file()) as scratch:
            (scratch / "done").write_text(content)
    assert (target / "done").read_text() == "first"
    (target / "done").rename(target / "half")
    with atomic_folder(target, lambda f: (f / "done").is_file()) as scratch:
        (scratch / "done").write_text("third")
    assert [p.name for p in target.iterdir()] == ["done"]


KILLED = """
import sys
from pathlib import Path
from leeway.io import write_file
k = 0
while True:
    write_file(Path(sys.argv[1]), f"{k}" * 100_000)
    k = (k + 1) % 10
"""


def test_a_killed_writer_leaves_a_whole_file_and_its_partial_one_can_be_removed(tmp_path: Path) -> None:
    target = tmp_path / "file"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(target)])
    until = time.monotonic() + 60
    while not target.exists() and time.monotonic() < until:
        time.sleep(0.001)
    for _ in range(200):
        text = target.read_text()
        assert len(set(text)) == 1
        assert len(text) == 100_000
    process.send_signal(signal.SIGKILL)
    process.wait()
    remove_partial(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert len(set(target.read_text())) == 1


def test_a_changed_record_and_a_damaged_file_are_errors(tmp_path: Path) -> None:
    record = with_checksum({"a": 1, "b": [0.1, None, "é"]})
    assert verify_checksum(record) == {"a": 1, "b": [0.1, None, "é"]}
    for changed in ({**record, "a": 2}, {**record, "c": 1}, {"a": 1}):
        with pytest.raises(ValueError, match="it was changed after it was written"):
            verify_checksum(changed)
    with pytest.raises(LeewayError, match=r"file: damaged \(.*\); delete it"), readable(tmp_path / "file"):
        verify_checksum({})


@pytest.mark.parametrize("read", [read_utf8, lambda path: readable(path).__enter__(), _read_card])
def test_a_device_is_not_read(read: Callable[[Path], object], tmp_path: Path) -> None:
    (tmp_path / "x").symlink_to("/dev/zero")
    with pytest.raises(LeewayError, match="x: not a regular file"):
        read(tmp_path / "x")


def test_lines_are_wrapped_between_words_under_their_last_column() -> None:
    line = "dan  v1  community jailbreak of 2022-12, see arXiv 2308.03825 and so on"
    parts = wrap_words(line, 40)
    assert parts == ["dan  v1  community jailbreak of 2022-12,", "         see arXiv 2308.03825 and so on"]
    assert wrap_words(line, None) == [line]
    assert wrap_words("  assumed: one two", 14) == ["  assumed: one", "    two"]
    assert wrap_words("a-word-that-is-too-long b", 9) == ["a-word-that-is-too-long", "  b"]
