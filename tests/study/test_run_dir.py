"""A run folder is locked before it is written, and an error removes nothing that was finished."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import killing
import pytest
from test_stages import text
from test_study import carry, contents

from leeway.errors import LeewayError
from leeway.study.run_dir import RunDir
from leeway.study.worker import Worker

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("without_report")]

ROUNDS = 12


@pytest.fixture(scope="module")
def study(models: dict[str, Path], root: Path) -> str:
    return text(models, root, "[sft]")


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_an_error_before_the_first_checkpoint_keeps_the_finished_parts(
    study: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = contents(carry(study, tmp_path / "whole"))
    out = tmp_path / "run"

    def fail(*_: object) -> None:
        raise LeewayError("no space left", fix="free some")

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "train", fail)
        with pytest.raises(LeewayError, match="no space left"):
            carry(study, out)
    kept = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in out.glob("parts/base-*.parquet")}
    assert kept
    measured: list[str] = []
    real = Worker._evaluate
    monkeypatch.setattr(Worker, "_evaluate", lambda w, b, t, h: (measured.append(t.objective), real(w, b, t, h))[1])
    assert contents(carry(study, out)) == whole
    assert set(measured) == {"sft"}
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in kept} == kept


def test_a_worker_that_is_killed_before_the_first_checkpoint_loses_no_part(
    models: dict[str, Path], root: Path, tmp_path: Path
) -> None:
    path, out = tmp_path / "study.yaml", tmp_path / "run"
    path.write_text(text(models, root, "[sft]").replace("budgets: [300, 600]", "budgets: [20k]"))
    command = [sys.executable, "-m", "leeway", "run", str(path), "--out", str(out), "--quiet", "--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    until = time.monotonic() + 120
    while not list(out.glob("parts/base-*.parquet")) and time.monotonic() < until and process.poll() is None:
        time.sleep(0.005)
    for child in killing.children(process.pid):
        os.kill(child, signal.SIGKILL)
    _, said = process.communicate()
    assert process.returncode == 2, said
    assert not list(out.glob("checkpoints/*/*/*/ledger.json"))
    assert list(out.glob("parts/base-*.parquet"))


def break_down(store: RunDir, written: dict[str, str]) -> None:
    """Claim a folder, write into it, and end with an error."""

    def work() -> None:
        with store.claimed("abc", "name: x\n"):
            for name, content in written.items():
                (store.folder / name).parent.mkdir(parents=True, exist_ok=True)
                (store.folder / name).write_text(content)
            raise LeewayError("broken", fix="mend it")

    with pytest.raises(LeewayError, match="broken"):
        work()


@pytest.mark.parametrize(
    "work",
    [
        "parts/base-s0-0-x.parquet",
        "cache/answers/host.tsv",
        "cache/references/abc.safetensors",
        "tuning/sft.json",
        "steps/sft-s0.jsonl",
        "cache/replies/host.tsv",
        "cache/pairs/host.tsv",
        "checkpoints/sft/s0/1/adapter_model.safetensors",
        "notes.txt",
    ],
)
def test_whatever_is_finished_keeps_the_folder(work: str, tmp_path: Path) -> None:
    store = RunDir(tmp_path / "run")
    break_down(store, {work: "something", "manifest.json": "{}"})
    assert files(store.folder).keys() == {"study.yaml", "manifest.json", ".lock", ".workers", work}
    with store.claimed("abc", "name: x\n"):
        assert (store.folder / work).read_text() == "something"


def test_a_folder_without_work_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for name in ("new", "mine"):
        store = RunDir(tmp_path / name)
        break_down(store, {"manifest.json": "{}", "steps/sft-s0.jsonl": "", "parts/.partial-x": "half"})
    assert not (tmp_path / "new").exists()
    assert list((tmp_path / "mine").iterdir()) == []


def test_a_refused_run_changes_nothing(tmp_path: Path) -> None:
    """The holder has the lock and has not written study.yaml yet, as between two lines of `claimed`."""
    import fcntl

    out = tmp_path / "run"
    out.mkdir()
    (out / ".partial-study").write_text("of the holder")
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(LeewayError, match="is in use by another leeway"), RunDir(out).claimed("abc", "name: x\n"):
            pass
    assert files(out) == {".lock": b"", ".partial-study": b"of the holder"}


def claim(out: Path, mine: str, barrier: Any, found: Any) -> None:
    """Claim a folder per round at the same moment as the other process; report what went wrong."""
    for k in range(ROUNDS):
        store, text_ = RunDir(out / str(k)), f"name: {mine}\n"
        barrier.wait(60)
        try:
            with store.claimed(mine, text_):
                scratch = store.folder / f".partial-{mine}"
                scratch.write_text("half written")
                time.sleep(0.05)
                kept = (store.folder / "study.yaml").read_text() == f"# study {mine}\n{text_}"
                found.put((k, "held" if kept and scratch.exists() else "replaced"))
                scratch.unlink(missing_ok=True)
        except (LeewayError, OSError) as error:  # the other process must not wait for one that has ended
            found.put((k, "refused" if "in use" in str(error) or "holds another" in str(error) else str(error)))
        barrier.wait(60)


def test_of_two_studies_that_begin_at_once_one_holds_the_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, found = context.Barrier(2), context.Queue()
    both = [context.Process(target=claim, args=(tmp_path, mine, barrier, found)) for mine in ("one", "two")]
    for process in both:
        process.start()
    told = [found.get(timeout=120) for _ in range(2 * ROUNDS)]
    for process in both:
        process.join()
    for k in range(ROUNDS):
        assert sorted(what for r, what in told if r == k) == ["held", "refused"], k


@pytest.mark.parametrize("replaced", [False, True])
def test_a_folder_that_is_removed_under_the_run_is_an_error(replaced: bool, tmp_path: Path) -> None:
    out = tmp_path / "run"

    def move() -> None:
        with RunDir(out).claimed("abc", "name: x\n"):
            out.rename(tmp_path / "elsewhere")
            if replaced:
                (out / "parts").mkdir(parents=True)

    with pytest.raises(LeewayError, match="was removed or replaced while this command ran"):
        move()


def test_a_symbolic_link_to_nothing_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to(tmp_path / "purged")
    with (
        pytest.raises(LeewayError, match="run: cannot be created"),
        RunDir(tmp_path / "run").claimed("abc", "name: x\n"),
    ):
        pass


def test_a_cache_by_itself_is_reused(tmp_path: Path) -> None:
    reply = tmp_path / "run" / "cache" / "replies" / "host.tsv"
    reply.parent.mkdir(parents=True)
    reply.write_text("paid")
    with RunDir(tmp_path / "run").claimed("abc", "name: x\n"):
        assert reply.read_text() == "paid"


def test_a_lock_is_never_followed_or_emptied(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    for name in (".lock", ".workers"):
        out = tmp_path / f"run{name}"
        out.mkdir()
        (out / name).symlink_to(precious)
        said = rf"{name}: cannot be opened \(it is a symbolic link\)"
        with pytest.raises(LeewayError, match=said), RunDir(out).claimed("abc", "name: x\n"):
            pass
        assert precious.read_text() == "mine"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text("kept")
    with RunDir(tmp_path / "run").claimed("abc", "name: x\n"):
        assert (tmp_path / "run" / ".lock").read_text() == "kept"
