"""An endpoint that fails in every way, over real HTTP: what becomes of a request, of the others, and what it costs."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("openai")

from api_server import FaultyServer, serving

from leeway.errors import LeewayError
from leeway.generation import openai_api
from leeway.generation.backend import Choice, Reply, Request
from leeway.generation.cache import CachedBackend, ReplyCache
from leeway.generation.openai_api import ApiSettings, OpenAIBackend, RequestFailed, choice_of
from leeway.hashing import digest

KEY = "sk-secret-0123456789"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    monkeypatch.setenv("TEST_KEY", KEY)
    with serving() as running:
        yield running


def backend(server: FaultyServer, **settings: object) -> OpenAIBackend:
    given = {"retries": 2, "timeout_s": 5.0, "backoff_s": 0.01, "key_env": "TEST_KEY"} | settings
    return OpenAIBackend(ApiSettings(model="m", base_url=server.url, **given))  # type: ignore[arg-type]


def request(prompt: str, limit: int = 16, temperature: float = 0.0, sample: int = 0, seed: int = 0) -> Request:
    return Request([{"role": "user", "content": prompt}], limit, temperature, sample, seed)


def ask(asked: OpenAIBackend | CachedBackend, *prompts: str) -> list[Reply]:
    return asked.complete([request(p) for p in prompts], lambda _: None)


FAULTS = {  # fault: (the reply, or how its failure begins; how often it is asked with two retries)
    "fine": (Reply("about fine", 5, False), 1),
    "long": (Reply("and so on", 5, True), 1),
    "empty": (Reply("", 5, False), 1),
    "refusal": (Reply("I will not.", 5, False), 1),
    "thought": (Reply("", 5, True), 1),
    "busy*1": (Reply("about busy*1", 5, False), 2),
    "broken*2": (Reply("about broken*2", 5, False), 3),
    "cut*1": (Reply("about cut*1", 5, False), 2),
    "hang*1": (Reply("about hang*1", 5, False), 2),
    "busy": ("HTTP 429: ", 3),
    "later": ("HTTP 429: asks to come back in 3600 s", 1),
    "broken": ("HTTP 500: ", 3),
    "cut": ("the connection broke", 3),
    "hang": ("no answer within 1 s (3 tries)", 3),
    "drip": ("no answer within 1 s (3 tries)", 3),
    "wrong": ("HTTP 400: I do not take this", 1),
    "garbage": ("what the endpoint sent is not JSON", 1),
    "page": ("what the endpoint sent is not JSON", 1),
    "list": ("what the endpoint sent is no JSON object", 1),
    "bare": ("what the endpoint sent holds no choices", 1),
    "half": ("what the endpoint sent holds one half of a character", 1),
    "half_error": ("HTTP 400: half a \ufffd", 1),
    "deep": ("what the endpoint sent is nested too deeply", 1),
    "count": ("the endpoint's token count is out of range", 1),
    "zipped": ("the endpoint compressed its answer", 1),
    "null": ("the endpoint sent no text (finish_reason stop)", 1),
    "filter": ("the endpoint's content filter stopped the answer", 1),
}


def test_each_fault_is_its_own_requests_affair_and_a_rerun_asks_only_what_failed(
    server: FaultyServer, tmp_path: Path
) -> None:
    """All faults in one call, twice, with kept answers: none paid for twice, none lost, no failure kept."""
    asking = CachedBackend(backend(server, timeout_s=1.0, concurrency=30), ReplyCache(tmp_path / "kept.sqlite"))
    for again in (1, 2):
        told = 0

        def tick(n: int) -> None:
            nonlocal told
            told += n

        replies = dict(zip(FAULTS, asking.complete([request(p) for p in FAULTS], tick), strict=True))
        assert told == len(FAULTS)
        for fault, (expected, times) in FAULTS.items():
            if isinstance(expected, Reply):
                assert replies[fault] == expected, fault
                assert server.asked[fault] == times, fault  # the second time it is not asked
            else:
                assert str(replies[fault].failure).startswith(expected), (fault, replies[fault])
                assert replies[fault].text == ""
                assert server.asked[fault] == times * again, fault
    assert len(asking.kept) == sum(isinstance(e, Reply) for e, _ in FAULTS.values())
    asking.kept.close()


@pytest.mark.parametrize("fault", ["flood", "flood_error"])
def test_a_reply_without_end_is_read_up_to_the_limit(
    fault: str, server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_api, "REPLY_BYTES", 1 << 20)
    asking = backend(server, timeout_s=30.0, price_in=1.0, price_out=2.0)
    replies = ask(asking, fault, "fine")
    assert replies[0] == Reply("", 0, False, "the endpoint sent more than 1 MiB")
    assert replies[1].text == "about fine"
    assert server.asked[fault] == 1
    assert server.flooded < 64 << 20  # what the sockets' buffers hold, and no more
    assert asking.spent.dollars > 20e-6  # it may have been billed


def test_a_kept_half_character_is_asked_anew(server: FaultyServer, tmp_path: Path) -> None:
    """As a version without the check wrote it: it is no answer, and the run goes on without it."""
    asking = CachedBackend(backend(server), ReplyCache(tmp_path / "kept.sqlite"))
    first = ask(asking, "fine")
    db = sqlite3.connect(tmp_path / "kept.sqlite")
    ((key,),) = db.execute("SELECT key FROM said").fetchall()
    record = json.dumps({"text": "\ud800", "new_tokens": 1, "cut": False, "failure": None}, sort_keys=True)
    with db:
        db.execute("UPDATE said SET record = ?, sum = ?", (record, digest(key, record)))
    db.close()
    assert ask(asking, "fine") == first
    assert ask(asking, "fine") == first
    assert server.asked["fine"] == 2
    asking.kept.close()


def test_a_logprob_beyond_floats_is_a_failure() -> None:
    content = [{"top_logprobs": [{"token": "Yes", "logprob": -(10**400)}]}]
    with pytest.raises(RequestFailed, match="the endpoint's logprobs are none"):
        choice_of({"choices": [{"logprobs": {"content": content}}]}, ["Yes"])


def test_retry_after_is_waited_for_and_backoff_grows(server: FaultyServer) -> None:
    ask(backend(server, backoff_s=0.1), "busy*1", "broken*2")
    first, second = server.times["busy*1"]
    assert 0.3 <= second - first < 2.0
    a, b, c = server.times["broken*2"]
    assert 0.05 <= b - a < 1.5
    assert 0.1 <= c - b < 1.5


def test_no_more_requests_at_once_than_allowed_and_never_out_of_order(server: FaultyServer) -> None:
    prompts = [f"slow {k}" for k in range(12)]
    begun = time.monotonic()
    replies = ask(backend(server, concurrency=4), *prompts)
    took = time.monotonic() - begun
    assert [r.text for r in replies] == [f"about slow {k}" for k in range(12)]
    assert server.most_under_way == 4
    assert took < 12 * 0.2  # one after another would take that


def test_what_is_sent(server: FaultyServer) -> None:
    asking = replace(backend(server, extra={"top_k": 0, "temperature": None}), prefix="<x> ")
    asking.complete([request("fine")], lambda _: None)
    assert server.bodies[-1] == {
        "model": "m",
        "messages": [{"role": "user", "content": "<x> fine"}],
        "max_tokens": 16,
        "top_k": 0,
    }
    plain = backend(server, limit_field="max_completion_tokens")
    drawn = [request("fine", temperature=0.7, sample=s, seed=d) for s, d in ((0, 0), (0, 0), (1, 0), (0, 1))]
    plain.complete([request("fine"), *drawn], lambda _: None)
    greedy = next(b for b in server.bodies[-5:] if b["temperature"] == 0)
    assert "seed" not in greedy
    assert greedy["max_completion_tokens"] == 16
    assert "max_tokens" not in greedy
    bodies = [b for b in server.bodies[-5:] if b["temperature"] == 0.7]
    assert len({b["seed"] for b in bodies}) == 3  # by sample and seed, and by nothing else
    assert {b["top_p"] for b in bodies} == {1.0}
    assert server.keys == {f"Bearer {KEY}"}


def test_a_budget_of_calls_is_never_exceeded_and_the_rest_is_not_asked(server: FaultyServer, tmp_path: Path) -> None:
    prompts = [f"fine {k}" for k in range(10)]
    asking = CachedBackend(backend(server, max_calls=4, concurrency=3), ReplyCache(tmp_path / "kept.sqlite"))
    replies = ask(asking, *prompts)
    assert [r.failure for r in replies] == [None] * 4 + ["the budget of 4 calls is spent"] * 6
    assert ask(asking, *prompts) == replies  # kept ones stay answered, and nothing more is asked
    assert server.total == 4
    more = CachedBackend(backend(server, max_calls=4, concurrency=3), asking.kept)
    assert [r.failure for r in ask(more, *prompts)].count(None) == 8
    assert server.total == 8
    asking.kept.close()


def test_retries_count_against_the_budget(server: FaultyServer) -> None:
    reply = ask(backend(server, max_calls=2), "broken")[0]
    assert str(reply.failure).startswith("the budget of 2 calls is spent (before that: HTTP 500")
    assert server.total == 2


def test_a_budget_in_dollars_is_never_exceeded(server: FaultyServer) -> None:
    """10 tokens in and 5 out at 1 and 2 dollars a million are 20 millionths a call."""
    priced = {"price_in": 1.0, "price_out": 2.0}
    free = backend(server, **priced)
    ask(free, "fine")
    assert math.isclose(free.spent.dollars, 20e-6)
    bounded = backend(server, max_dollars=500e-6, concurrency=4, **priced)
    replies = ask(bounded, *[f"fine {k}" for k in range(60)])
    answered = sum(r.failure is None for r in replies)
    assert math.isclose(bounded.spent.dollars, answered * 20e-6)
    assert bounded.spent.dollars <= 500e-6
    assert 5 < answered < 25  # a request goes out only where its upper bound, by its bytes, still fits
    assert all(str(r.failure).startswith("the budget of $0.0005 is spent") for r in replies[answered:])
    assert server.total == answered + 1


def test_what_may_have_been_billed_counts_as_billed(server: FaultyServer) -> None:
    """A cut answer costs its upper bound, which is more than any answer; a 500 costs nothing."""
    asking = backend(server, price_in=1.0, price_out=2.0, retries=0)
    ask(asking, "broken")
    assert asking.spent.dollars == 0
    ask(asking, "cut")
    assert asking.spent.dollars > 20e-6


def test_choices_are_summed_over_spellings_within_the_top_tokens(server: FaultyServer) -> None:
    conversation = [{"role": "user", "content": "fine"}]
    told = backend(server).choose([conversation], ["Yes", "No"], lambda _: None)
    assert told[0].failure is None
    assert math.isclose(told[0].mass["Yes"], math.exp(-1.0) + math.exp(-2.0))  # not that after a line break
    assert math.isclose(told[0].mass["No"], math.exp(-1.5))
    sent = server.bodies[-1]
    assert (sent["logprobs"], sent["top_logprobs"], sent["max_tokens"], sent["temperature"]) == (True, 20, 1, 1.0)


def test_choices_without_logprobs_are_failures_and_kept_ones_are_not_asked(
    server: FaultyServer, tmp_path: Path
) -> None:
    asking = CachedBackend(backend(server), ReplyCache(tmp_path / "kept.sqlite"))
    asked = [[{"role": "user", "content": p}] for p in ("fine", "mute", "nan", "broken", "fine")]
    for _ in range(2):
        told = asking.choose(asked, ["Yes", "No"], lambda _: None)
        assert told[0] == told[4]
        assert told[0].failure is None
        assert told[1] == Choice({}, "the endpoint tells no logprobs")
        assert told[2] == Choice({}, "the endpoint's logprobs are none")
        assert str(told[3].failure).startswith("HTTP 500")
    assert server.asked == {"fine": 1, "mute": 2, "nan": 2, "broken": 6}
    asking.kept.close()


def test_another_model_behind_the_name_is_a_failure(server: FaultyServer) -> None:
    loose, pinned = backend(server), backend(server, served="model-of-today")
    assert ask(pinned, "fine")[0].failure is None
    server.served = "model-of-tomorrow"
    assert ask(pinned, "fine")[0].failure == "answered by model-of-tomorrow, not by model-of-today"
    assert ask(loose, "fine")[0].failure is None
    assert loose.served == {"model-of-tomorrow"}


def test_identity_is_all_that_shapes_an_answer_and_nothing_of_how_hard_we_try() -> None:
    one = ApiSettings(model="m")
    same = replace(
        one, key_env="OTHER", concurrency=1, timeout_s=1.0, retries=0, max_calls=3, base_url=f"{one.base_url}/"
    )
    assert same.identity == one.identity
    others = [
        replace(one, **change)  # type: ignore[arg-type]
        for change in (
            {"model": "n"},
            {"base_url": "http://other/v1"},
            {"extra": {"top_k": 1}},
            {"served": "m-1"},
            {"version": "2"},
            {"limit_field": "max_completion_tokens"},
        )
    ]
    assert len({one.identity, *(o.identity for o in others)}) == 7
    assert OpenAIBackend(one).template_hash != OpenAIBackend(one, prefix="x").template_hash


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model": ""}, "no model is named"),
        ({"base_url": "ftp://a"}, "is no address"),
        ({"base_url": "https://me:pass@host/v1"}, "holds a user, a password or a query"),
        ({"base_url": "https://host/v1?key=abc"}, "holds a user, a password or a query"),
        ({"concurrency": 0}, "concurrency: 0 is out of range"),
        ({"timeout_s": math.inf}, "timeout_s: inf is out of range"),
        ({"retries": -1}, "retries: -1 is out of range"),
        ({"max_calls": -1}, "max_calls: -1 is out of range"),
        ({"max_dollars": 1.0}, "max_dollars without prices"),
        ({"extra": {"a": object()}}, "extra cannot be sent"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, object], said: str) -> None:
    with pytest.raises(LeewayError, match=said) as error:
        ApiSettings(**{"model": "m"} | settings)  # type: ignore[arg-type]
    assert "pass@" not in str(error.value)


def test_a_missing_or_refused_key_is_one_error(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LeewayError, match=r"the key was refused \(HTTP 401\); check what TEST_KEY holds"):
        ask(backend(server, concurrency=1), "key", "fine", "fine 2")
    assert server.total == 1
    with pytest.raises(LeewayError, match="no model 'm' there"):
        ask(backend(server), "lost")
    monkeypatch.delenv("TEST_KEY")
    with pytest.raises(LeewayError, match="the environment variable TEST_KEY is not set"):
        ask(backend(server), "fine")
    monkeypatch.setenv("TEST_KEY", "two words")
    with pytest.raises(LeewayError, match="what TEST_KEY holds is no key") as error:
        ask(backend(server), "fine")
    assert "two words" not in str(error.value)
    assert ask(backend(server, key_env=""), "fine")[0].failure is None  # an endpoint that needs none


def test_the_key_is_in_no_failure_log_hash_or_file(
    server: FaultyServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    asking = CachedBackend(backend(server), ReplyCache(tmp_path / "kept.sqlite"))
    replies = ask(asking, "wrong", "fine", "broken", "cut")
    assert "[key]" in str(replies[0].failure)  # the server said it, we do not
    with pytest.raises(LeewayError) as error:
        ask(asking, "key")
    assert server.keys == {f"Bearer {KEY}"}  # it was really sent
    said = [repr(replies), str(error.value), repr(asking.backend), caplog.text, *capfd.readouterr()]
    asking.kept.close()
    assert not [t for t in said if KEY in t]
    assert not [f for f in tmp_path.iterdir() if KEY.encode() in f.read_bytes()]


def test_inside_a_running_loop(server: FaultyServer) -> None:
    """As in a notebook."""

    async def notebook() -> list[Reply]:
        return ask(backend(server), "fine")

    assert asyncio.run(notebook())[0].text == "about fine"


STOPPED = """
import os, sys
from pathlib import Path
from leeway.generation import openai_api
from leeway.generation.openai_api import NoAnswer, choice_of
from leeway.generation.openai_api import ApiSettings
from leeway.generation.backend import Request
from leeway.generation.cache import Kept, KeptBackend
from leeway.generation.openai_api import OpenAIBackend
settings = ApiSettings(model="m", base_url=sys.argv[1], key_env="", concurrency=3, timeout_s=60)
asking = KeptBackend(OpenAIBackend(settings), Kept(Path(sys.argv[2])))
prompts = [f"fine {k}" for k in range(6)] + [f"hang {k}" for k in range(3)] + ["fine last"]
try:
    asking.complete([Request([{"role": "user", "content": p}], 16) for p in prompts], lambda n: print(n, flush=True))
except KeyboardInterrupt:
    print("stopped", flush=True)
    sys.exit(130)
"""


@pytest.mark.usefixtures("heeding")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_ctrl_c_and_kill_lose_nothing_that_was_answered(
    server: FaultyServer, tmp_path: Path, how: signal.Signals
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(STOPPED), server.url, str(tmp_path / "kept.sqlite")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
    )
    assert process.stdout is not None
    for _ in range(6):
        assert process.stdout.readline() == "1\n"
    time.sleep(0.2)  # all three now hang
    begun = time.monotonic()
    process.send_signal(how)
    out, err = process.communicate(timeout=20)
    assert time.monotonic() - begun < 5
    if how is signal.SIGINT:
        assert (process.returncode, out, err) == (130, "stopped\n", "")
    kept = ReplyCache(tmp_path / "kept.sqlite")
    assert len(kept) == 6
    before = server.total
    again = ask(CachedBackend(backend(server), kept), *[f"fine {k}" for k in range(6)])
    assert server.total == before  # a key is no part of who answers, so that these are the same answers
    assert [r.text for r in again] == [f"about fine {k}" for k in range(6)]
    kept.close()
