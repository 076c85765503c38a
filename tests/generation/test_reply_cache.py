"""What is kept: by content, once, whole, for several processes, after a kill, and never when damaged."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from leeway.errors import LeewayError
from leeway.generation import cache as kept_module
from leeway.generation.backend import Choice, Conversation, Reply, Request, Tick
from leeway.generation.cache import CachedBackend, ReplyCache


@dataclass
class Echo:
    """Says the prompt; fails where it holds `fail`, breaks down where it holds `die`."""

    identity: str = "echo"
    template_hash: str = "plain"
    asked: list[object] = field(default_factory=list)

    def complete(self, requests: Seq[Request], tick: Tick) -> list[Reply]:
        return [self._reply(r, tick) for r in requests]

    def _reply(self, request: Request, tick: Tick) -> Reply:
        text = request.conversation[-1]["content"]
        if "die" in text:
            raise KeyboardInterrupt
        self.asked.append(request)
        tick(1)
        return Reply("", 0, False, "no luck") if "fail" in text else Reply(f"{text} {request.sample}", 3, True)

    def choose(self, conversations: Seq[Conversation], options: Seq[str], tick: Tick) -> list[Choice]:
        self.asked += conversations
        tick(len(conversations))
        return [Choice({o: float(len(c[-1]["content"])) for o in options}) for c in conversations]


@dataclass
class Teller(Echo):
    """The same, one by one and backwards."""

    def complete_each(self, requests: Seq[Request], told: Callable[[int, Reply], None]) -> None:
        for i in reversed(range(len(requests))):
            told(i, self._reply(requests[i], lambda _: None))

    def choose_each(
        self, conversations: Seq[Conversation], options: Seq[str], told: Callable[[int, Choice], None]
    ) -> None:
        for i in reversed(range(len(conversations))):
            told(i, self.choose([conversations[i]], options, lambda _: None)[0])


def user(text: str) -> Conversation:
    return [{"role": "user", "content": text}]


def request(text: str) -> Request:
    return Request(user(text), 8)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ReplyCache]:
    opened = ReplyCache(tmp_path / "deep" / "kept.sqlite")
    yield opened
    opened.close()


@pytest.mark.parametrize("kind", [Echo, Teller])
def test_only_what_is_missing_is_asked_and_duplicates_once(store: ReplyCache, kind: type[Echo]) -> None:
    asked = [request(t) for t in ("a", "b", "a", "fail", "c", "fail")]
    expected = [f"{t} 0" for t in "aba"] + [None, "c 0", None]
    ticks: list[int] = []
    first = kind()
    replies = CachedBackend(first, store).complete(asked, ticks.append)
    assert [r.text if r.failure is None else None for r in replies] == expected
    assert replies[0] == Reply("a 0", 3, True)
    assert len(first.asked) == 4  # a, b, fail, c
    assert sum(ticks) == 6
    second = kind()
    ticks.clear()
    assert CachedBackend(second, store).complete([*asked, request("d")], ticks.append)[:6] == replies
    assert {r.conversation[0]["content"] for r in second.asked} == {"fail", "d"}  # type: ignore[attr-defined]
    assert sum(ticks) == 7
    assert len(store) == 4


@pytest.mark.parametrize("kind", [Echo, Teller])
def test_choices_are_kept_by_conversation_and_options(store: ReplyCache, kind: type[Echo]) -> None:
    backend = kind()
    keeping = CachedBackend(backend, store)
    asked = [user("a"), user("bb"), user("a")]
    told = keeping.choose(asked, ["Yes", "No"], lambda _: None)
    assert told == [Choice({"Yes": n, "No": n}) for n in (1.0, 2.0, 1.0)]
    assert keeping.choose(asked, ["Yes", "No"], lambda _: None) == told
    assert len(backend.asked) == 2
    keeping.choose(asked, ["Yes"], lambda _: None)
    assert len(backend.asked) == 4


def test_whatever_shapes_an_answer_is_part_of_its_key(store: ReplyCache) -> None:
    one = request("a")
    changes = [{"max_new_tokens": 9}, {"temperature": 1.0}, {"sample": 1}, {"seed": 1}, {"conversation": user("b")}]
    requests = [one, *(replace(one, **c) for c in changes)]  # type: ignore[arg-type]
    backends = [Echo(), Echo(identity="other"), Echo(template_hash="other")]
    for backend in backends:
        CachedBackend(backend, store).complete(requests, lambda _: None)
        assert len(backend.asked) == 6
    assert len(store) == 18
    whole = replace(one, temperature=0)  # 0 and 0.0 are one temperature
    again = Echo()
    CachedBackend(again, store).complete([whole], lambda _: None)
    assert again.asked == []


@pytest.mark.parametrize(("kind", "before"), [(Teller, 3), (Echo, 2)])
def test_what_was_said_before_a_break_is_kept(
    store: ReplyCache, kind: type[Echo], before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One by one where a backend tells so; else all portions but the one that broke."""
    monkeypatch.setattr(kept_module, "PORTION", 2)
    texts = ["a", "b", "die", "c", "d", "e"]
    with pytest.raises(KeyboardInterrupt):
        CachedBackend(kind(), store).complete([request(t) for t in texts], lambda _: None)
    assert len(store) == before


def test_a_first_record_stands(store: ReplyCache) -> None:
    store.put({"k": {"text": "one"}})
    store.put({"k": {"text": "two"}, "l": {"text": "é\u2028"}})
    assert store.get(["k", "l", "m"]) == {"k": {"text": "one"}, "l": {"text": "é\u2028"}}
    many = {f"{i}": {"n": i} for i in range(1234)}
    store.put(many)
    assert store.get(list(many)) == many


def write(path: Path, worker: int, count: int) -> None:
    opened = pickle.loads(pickle.dumps(ReplyCache(path)))
    for k in range(count):
        opened.put({f"{worker}-{k}": {"text": "x" * 50}, f"shared-{k}": {"by": worker}})
    opened.close()


def test_several_processes_at_once(tmp_path: Path) -> None:
    """All begin on a file that is not there yet; none loses a record, and of shared keys one stands."""
    path = tmp_path / "kept.sqlite"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=write, args=(path, w, 60)) for w in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [w.exitcode for w in workers] == [0, 0, 0]
    opened = ReplyCache(path)
    assert len(opened) == 3 * 60 + 60
    opened.close()


def test_a_fork_opens_the_file_itself(store: ReplyCache) -> None:
    store.put({"a": {}})
    connection = store._connected()
    store._open = (os.getpid() + 1, connection)  # as a child finds it
    assert store.get(["a"]) == {"a": {}}
    assert store._connected() is not connection
    connection.close()


KILLED = """
import sys
from pathlib import Path
from leeway.generation.cache import Kept
kept = Kept(Path(sys.argv[1]))
k = 0
while True:
    kept.put({str(k): {"n": k, "fill": "x" * 300}})
    print(k, flush=True)
    k += 1
"""


@pytest.mark.parametrize("after", [1, 40])
def test_after_kill_9_all_that_was_told_is_there(tmp_path: Path, after: int) -> None:
    path = tmp_path / "kept.sqlite"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(after):
        last = process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    rest = process.communicate()[0].splitlines()
    told = int(([last.strip()] + [r for r in rest if r])[-1])
    opened = ReplyCache(path)
    found = opened.get([str(k) for k in range(told + 1)])
    assert [found[str(k)]["n"] for k in range(told + 1)] == list(range(told + 1))
    opened.put({"more": {}})
    opened.close()


def damaged_header(path: Path) -> None:
    path.write_bytes(b"no database" * 100)


def damaged_page(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[4096:] = b"\xff" * (len(raw) - 4096)
    path.write_bytes(raw)


def damaged_answer(path: Path) -> None:
    """One letter of one answer: SQLite itself would not notice."""
    raw = path.read_bytes()
    assert raw.count(b"harmless") == 1
    path.write_bytes(raw.replace(b"harmless", b"harmfull"))


def another_database(path: Path) -> None:
    path.unlink()
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE said (a, b)")
    db.close()


@pytest.mark.parametrize("damage", [damaged_header, damaged_page, damaged_answer, another_database])
def test_a_damaged_file_is_an_error_that_says_what_to_do(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    path = tmp_path / "kept.sqlite"
    opened = ReplyCache(path)
    opened.put({"k": {"text": "harmless"}} | {str(i): {"n": i} for i in range(200)})
    opened.close()
    damage(path)
    again = ReplyCache(path)
    with pytest.raises(LeewayError, match=r"kept\.sqlite: (the kept answers are damaged|answers cannot be kept)"):
        again.get(["k"])
    again.close()


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LeewayError, match="answers cannot be kept"):
        ReplyCache(tmp_path / "file" / "kept.sqlite").get(["a"])
    with pytest.raises(LeewayError, match="answers cannot be kept"):
        ReplyCache(tmp_path).get(["a"])


def test_how_long_it_takes(store: ReplyCache, record_property: Callable[[str, object], None]) -> None:
    """Kept at once is not kept slowly: far below what any answer costs to make."""
    begun = time.perf_counter()
    for k in range(200):
        store.put({str(k): {"text": "x" * 1000}})
    each = (time.perf_counter() - begun) / 200
    record_property("measured", f"kept answers: {each * 1e3:.2f} ms to put one on the disk (50)")
    assert each < 0.05
