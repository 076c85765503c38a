"""The cache: content-addressed, shared by processes and hosts, kill-safe; its size, and how it is cleared."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from leeway.cache import Cache, RecordStore, describe, find_cache
from leeway.errors import LeewayError


@pytest.fixture
def store(tmp_path: Path) -> RecordStore:
    return RecordStore(tmp_path / "deep" / "replies")


def the_file(store: RecordStore) -> Path:
    (path,) = store.folder.glob("*.tsv")
    return path


def test_the_first_record_of_a_key_is_kept(store: RecordStore) -> None:
    assert store.get(["k"]) == {}
    store.put({"k": {"text": "one"}})
    store.put({"k": {"text": "two"}, "l": {"text": "é\u2028\t\n\\"}})
    both = {"k": {"text": "one"}, "l": {"text": "é\u2028\t\n\\"}}
    assert store.get(["k", "l", "m", "k"]) == both
    assert RecordStore(store.folder).get(["k", "l", "m"]) == both
    many = {f"{i}": {"n": i} for i in range(1234)}
    store.put(many)
    assert store.get(list(many)) == many
    assert len(store) == len(RecordStore(store.folder)) == 1236


def test_a_lone_surrogate_is_not_stored(store: RecordStore) -> None:
    """No file of a run can hold one half of a character."""
    store.put({"half": {"text": "\ud800"}, "whole": {"text": "é"}})
    assert store.get(["half", "whole"]) == {"whole": {"text": "é"}}


def write(folder: Path, worker: int, count: int) -> None:
    store = pickle.loads(pickle.dumps(RecordStore(folder)))
    for k in range(count):
        store.put({f"{worker}-{k}": {"text": "x" * 50}, f"shared-{k}": {"by": worker}})


def test_several_processes_at_once(tmp_path: Path) -> None:
    """All begin in a folder that does not exist yet; none loses a record, and of shared keys one is kept."""
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=write, args=(tmp_path / "new", w, 60)) for w in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [w.exitcode for w in workers] == [0, 0, 0]
    store = RecordStore(tmp_path / "new")
    assert len(store) == 3 * 60 + 60
    assert the_file(store).read_text().count("\n") == 3 * 60 + 60


def test_hosts_write_a_file_each_and_read_all(store: RecordStore, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = RecordStore(store.folder)
    for host in ("b", "a/../c"):
        monkeypatch.setattr(platform, "node", lambda host=host: host)
        RecordStore(store.folder).put({f"of {host}": host, "shared": host})
        assert reader.get([f"of {host}", "shared"]) == {f"of {host}": host, "shared": "b"}
    assert sorted(p.name for p in store.folder.iterdir()) == ["a_.._c.tsv", "b.tsv"]


KILLED = """
import sys
from pathlib import Path
from leeway.cache import RecordStore
store = RecordStore(Path(sys.argv[1]))
k = 0
while True:
    store.put({str(k): {"n": k, "fill": "x" * 300}})
    print(k, flush=True)
    k += 1
"""


@pytest.mark.parametrize("after", [1, 40])
def test_after_kill_9_all_records_that_were_put_are_there(store: RecordStore, after: int) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(store.folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(after):
        last = process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    rest = process.communicate()[0].splitlines()
    put = int(([last.strip()] + [r for r in rest if r])[-1])
    found = store.get([str(k) for k in range(put + 1)])
    assert [found[str(k)]["n"] for k in range(put + 1)] == list(range(put + 1))
    store.put({"more": {}})
    assert store.get(["more"]) == {"more": {}}


def test_a_line_torn_by_a_kill_is_skipped_and_the_next_record_is_whole(store: RecordStore) -> None:
    store.put({"a": 1, "b": 2})
    path = the_file(store)
    path.write_bytes(path.read_bytes()[:-3])
    for again in (store, RecordStore(store.folder)):
        assert again.get(["a", "b"]) == {"a": 1}
    RecordStore(store.folder).put({"b": 3, "c": 4})
    assert RecordStore(store.folder).get(["a", "b", "c"]) == {"a": 1, "b": 3, "c": 4}


def one_letter(raw: bytes) -> bytes:
    assert raw.count(b"harmless") == 1
    return raw.replace(b"harmless", b"harmfull")


def a_key(raw: bytes) -> bytes:
    return raw.replace(b"\tk\t", b"\tj\t")


def a_page(raw: bytes) -> bytes:
    return raw[:50] + b"\xff" * 40 + raw[90:]


@pytest.mark.parametrize("damage", [one_letter, a_key, a_page])
def test_a_damaged_record_is_lost_and_never_wrong(store: RecordStore, damage: Callable[[bytes], bytes]) -> None:
    store.put({"k": {"text": "harmless, whatever the letters that follow this sentence may be"}})
    store.put({str(i): {"n": i} for i in range(200)})
    the_file(store).write_bytes(damage(the_file(store).read_bytes()))
    for again in (store, RecordStore(store.folder)):
        found = again.get(["k", "j", *map(str, range(200))])
        assert "k" not in found
        assert "j" not in found
        assert len(found) >= 199
        assert all(found[key] == {"n": int(key)} for key in found)
    RecordStore(store.folder).put({"k": {"text": "new"}})
    assert RecordStore(store.folder).get(["k"]) == {"k": {"text": "new"}}


def test_another_file_in_its_place_is_no_error(store: RecordStore) -> None:
    store.put({"k": 1})
    the_file(store).write_bytes(b"no cache\n" * 100 + b"\t\t\n\n")
    assert RecordStore(store.folder).get(["k"]) == store.get(["k"]) == {}
    store.put({"k": 2})
    assert RecordStore(store.folder).get(["k"]) == store.get(["k"]) == {"k": 2}


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LeewayError, match=r"the cache cannot be used .*LEEWAY_CACHE_DIR"):
        RecordStore(tmp_path / "file" / "replies").put({"a": 1})
    with pytest.raises(LeewayError, match="the cache cannot be used"):
        Cache(tmp_path / "file").acquire(tmp_path / "run")


def test_how_long_it_takes(store: RecordStore, record_property: Callable[[str, object], None]) -> None:
    """Far less than any answer takes to generate."""
    began = time.perf_counter()
    for k in range(200):
        store.put({str(k): {"text": "x" * 1000}})
    each = (time.perf_counter() - began) / 200
    record_property("measured", f"cache: {each * 1e3:.2f} ms to write a record to disk (50)")
    assert each < 0.05


def run_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "study.yaml").write_text("# study abc\n")
    return path


def filled(cache: Cache) -> Cache:
    cache.records("replies").put({"a": {"text": "x" * 1000}, "b": {"text": "y" * 2000}})
    cache.records("pairs").put({"a": {"text": "x"}})
    cache.references.mkdir(parents=True)
    (cache.references / "0.safetensors").write_bytes(b"z" * 5000)
    return cache


def test_the_root_is_the_runs_own_or_the_shared_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Cache.of(tmp_path / "run").root == tmp_path / "run" / "cache"
    monkeypatch.setenv("LEEWAY_CACHE_DIR", "~/shared")
    assert Cache.of(tmp_path / "run").root == Path.home() / "shared"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LEEWAY_CACHE_DIR", "here")
    assert Cache.of(tmp_path / "run").root == find_cache(None).root == tmp_path / "here"


def test_size_by_kind(tmp_path: Path) -> None:
    cache = filled(Cache.of(run_folder(tmp_path / "run")))
    sizes = cache.sizes()
    assert {kind: count for kind, (count, _) in sizes.items()} == {
        "replies": 2,
        "answers": 0,
        "verdicts": 0,
        "pairs": 1,
        "references": 1,
        "models": 0,
    }
    assert sizes["references"][1] == 5000
    assert sizes["replies"][1] == the_file(cache.records("replies")).stat().st_size > 3000
    lines = describe(cache).splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [
        ["replies", "2", "records"],
        ["answers", "0", "records"],
        ["verdicts", "0", "records"],
        ["pairs", "1", "records"],
        ["references", "1", "files"],
        ["models", "0", "files"],
    ]


def test_clear_removes_records_and_nothing_else(tmp_path: Path) -> None:
    cache = filled(Cache(tmp_path / "shared"))
    (tmp_path / "shared" / "notes.txt").write_text("mine")
    cache.clear()
    assert sorted(p.name for p in (tmp_path / "shared").iterdir()) == [".lock", "notes.txt"]
    assert cache.records("replies").get(["a"]) == {}
    cache.records("replies").put({"a": 2})
    assert cache.records("replies").get(["a"]) == {"a": 2}


def test_clear_refuses_while_a_run_is_unfinished(tmp_path: Path) -> None:
    one, two = run_folder(tmp_path / "one"), run_folder(tmp_path / "two")
    cache = filled(Cache(tmp_path / "shared"))
    cache.acquire(one)
    cache.acquire(two)
    cache.release(one)
    before = cache.sizes()
    with pytest.raises(LeewayError, match=rf"not cleared, needed to resume {two}; finish") as error:
        cache.clear()
    assert "\n" not in str(error.value)
    assert cache.sizes() == before
    assert f"needed by the unfinished run {two}" in describe(cache)
    cache.release(two)
    cache.clear()
    assert sum(count for count, _ in cache.sizes().values()) == 0


def test_a_lease_of_a_deleted_run_is_ignored(tmp_path: Path) -> None:
    cache = filled(Cache(tmp_path / "shared"))
    for name in ("deleted", "emptied"):
        cache.acquire(run_folder(tmp_path / name))
    shutil.rmtree(tmp_path / "deleted")
    (tmp_path / "emptied" / "study.yaml").unlink()
    assert cache.unfinished() == []
    cache.clear()
    assert not list((tmp_path / "shared").glob("*/*"))


def test_a_moved_run_keeps_its_own_cache(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    filled(Cache.of(run)).acquire(run)
    moved = run.rename(tmp_path / "moved")
    with pytest.raises(LeewayError, match=f"needed to resume {moved}"):
        Cache.of(moved).clear()
    Cache.of(moved).release(moved)
    Cache.of(moved).clear()  # its lease names the run by a relative path


def leeway(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-m", "leeway", *args], capture_output=True, text=True, check=False, env=env)


def test_the_command_shows_and_clears(tmp_path: Path) -> None:
    run, shared = run_folder(tmp_path / "run"), tmp_path / "shared"
    filled(Cache.of(run)).acquire(run)
    filled(Cache(shared))
    shown = leeway("cache", str(run))
    assert shown.returncode == 0, shown.stderr
    assert f"needed by the unfinished run {run}" in shown.stdout
    refused = leeway("cache", "clear", str(run))
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("leeway: ")
    assert "not cleared" in refused.stderr
    cleared = leeway("cache", "clear", LEEWAY_CACHE_DIR=str(shared))
    assert cleared.returncode == 0, cleared.stderr
    assert f"{shared}: 0.0 MB" in cleared.stdout
    assert Cache(shared).sizes()["replies"] == (0, 0)
    assert Cache.of(run).sizes()["replies"][0] == 2


def test_command_mistakes(tmp_path: Path) -> None:
    for args in (["cache", str(tmp_path)], ["cache", "clear", str(tmp_path / "none")]):
        result = leeway(*args)
        assert result.returncode == 2, result.stdout
        assert "not a cache" in result.stderr
    assert "clear" in leeway("cache", str(tmp_path), "clear").stderr
    users = leeway("cache", LEEWAY_CACHE_DIR="", XDG_CACHE_HOME=str(tmp_path / "xdg"))
    assert users.stdout.startswith(f"{tmp_path}/xdg/leeway: 0.0 MB")
    assert "leeway cache clear runs/" in leeway("cache", "--help").stdout
