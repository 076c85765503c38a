"""An endpoint that fails in every way, over real HTTP: results, retries, budget and secrets."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
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

from leeway.cache import RecordStore
from leeway.errors import LeewayError
from leeway.generation import openai_api
from leeway.generation.backend import Choice, Reply, Request
from leeway.generation.cache import CachedBackend
from leeway.generation.openai_api import ApiSettings, OpenAIBackend, ReplyError, parse_choice
from leeway.generation.vllm import VllmBackend
from leeway.model.load import load_chat

pytestmark = pytest.mark.slow

KEY = "sk-secret-0123456789"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    monkeypatch.setenv("TEST_KEY", KEY)
    with serving() as running:
        yield running


def backend(server: FaultyServer, **settings: object) -> OpenAIBackend:
    given = {"retries": 2, "timeout_s": 5.0, "key_env": "TEST_KEY"} | settings
    return OpenAIBackend(ApiSettings(model="m", base_url=server.url, **given))  # type: ignore[arg-type]


def request(prompt: str, limit: int = 16, temperature: float = 0.0, sample: int = 0, seed: int = 0) -> Request:
    return Request([{"role": "user", "content": prompt}], limit, temperature, sample, seed)


def complete(target: OpenAIBackend | CachedBackend, *prompts: str) -> list[Reply]:
    return target.complete([request(p) for p in prompts], lambda _: None)


FAULTS = {  # fault: (the reply, or the start of its failure; the number of attempts with two retries)
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
    "later": ("HTTP 429: not now (Retry-After: 3600)", 1),
    "broken": ("HTTP 500: ", 3),
    "cut": ("the connection broke", 3),
    "hang": ("no answer within 1 s (3 attempts)", 3),
    "drip": ("no answer within 1 s (3 attempts)", 3),
    "wrong": ("HTTP 400: I do not take this", 1),
    "garbage": ("the reply is not JSON", 1),
    "page": ("the reply is not JSON", 1),
    "list": ("the reply is not a JSON object", 1),
    "bare": ("the reply has no choices", 1),
    "half": ("the reply holds a lone surrogate", 1),
    "half_error": ("HTTP 400: half a \ufffd", 1),
    "deep": ("the reply is nested too deeply", 1),
    "count": ("the endpoint's token count is out of range", 1),
    "zipped": ("the endpoint compressed its reply", 1),
    "null": ("the reply has no text (finish_reason stop)", 1),
    "filter": ("the endpoint's content filter stopped the reply", 1),
}


def test_faults_do_not_affect_other_requests_and_a_rerun_repeats_only_failures(
    server: FaultyServer, tmp_path: Path
) -> None:
    """All faults in one call, twice, with a reply cache: no reply is paid for twice or lost, no failure is cached."""
    client = CachedBackend(backend(server, timeout_s=1.0, concurrency=30), RecordStore(tmp_path))
    for again in (1, 2):
        ticks = 0

        def tick(n: int) -> None:
            nonlocal ticks
            ticks += n

        replies = dict(zip(FAULTS, client.complete([request(p) for p in FAULTS], tick), strict=True))
        assert ticks == len(FAULTS)
        for fault, (expected, times) in FAULTS.items():
            if isinstance(expected, Reply):
                assert replies[fault] == expected, fault
                assert server.attempts[fault] == times, fault  # the second time from the cache
            else:
                assert str(replies[fault].failure).startswith(expected), (fault, replies[fault])
                assert replies[fault].text == ""
                assert server.attempts[fault] == times * again, fault
    assert len(client.cache) == sum(isinstance(e, Reply) for e, _ in FAULTS.values())


@pytest.mark.parametrize("fault", ["flood", "flood_error"])
def test_a_reply_is_read_up_to_the_size_limit(
    fault: str, server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_api, "MAX_REPLY_BYTES", 1 << 20)
    client = backend(server, timeout_s=30.0, price_in=1.0, price_out=2.0)
    replies = complete(client, fault, "fine")
    assert replies[0] == Reply("", 0, False, "the endpoint sent more than 1 MiB")
    assert replies[1].text == "about fine"
    assert server.attempts[fault] == 1
    assert server.flooded < 64 << 20  # what the sockets' buffers hold, and no more
    assert client.spent.dollars > 20e-6  # it may have been billed


def test_a_logprob_beyond_floats_is_a_failure() -> None:
    content = [{"top_logprobs": [{"token": "Yes", "logprob": -(10**400)}]}]
    with pytest.raises(ReplyError, match="the reply's logprobs are invalid"):
        parse_choice({"choices": [{"logprobs": {"content": content}}]}, ["Yes"])


def test_retries_wait_for_retry_after_and_otherwise_back_off_exponentially(server: FaultyServer) -> None:
    """Without Retry-After the client waits 0.5 s, then 1 s, each less up to a quarter at random."""
    complete(backend(server), "busy*1", "broken*2")
    first, second = server.times["busy*1"]
    assert 0.3 <= second - first < 2.0
    a, b, c = server.times["broken*2"]
    assert 0.375 <= b - a < 2.0
    assert 0.75 <= c - b < 3.0


def test_concurrency_is_bounded_and_replies_are_in_order(server: FaultyServer) -> None:
    prompts = [f"slow {k}" for k in range(12)]
    begun = time.monotonic()
    replies = complete(backend(server, concurrency=4), *prompts)
    took = time.monotonic() - begun
    assert [r.text for r in replies] == [f"about slow {k}" for k in range(12)]
    assert server.most_under_way == 4
    assert took < 12 * 0.2  # the time of a sequential run


def test_request_bodies(server: FaultyServer) -> None:
    client = replace(backend(server, extra={"top_k": 0, "temperature": None}), prefix="<x> ")
    client.complete([request("fine")], lambda _: None)
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
    assert len({b["seed"] for b in bodies}) == 3  # a function of sample and seed only
    assert {b["top_p"] for b in bodies} == {1.0}
    assert server.keys == {f"Bearer {KEY}"}


def test_a_started_answer_is_continued_only_by_an_endpoint_that_can(
    server: FaultyServer, models: dict[str, Path]
) -> None:
    started = [{"role": "user", "content": "fine"}, {"role": "assistant", "content": "Sure:"}]
    requests = [Request(started, 16)]
    with pytest.raises(LeewayError, match=r"cannot continue the beginning of an answer \(prefill\): .* has no field"):
        backend(server).complete(requests, lambda _: None)
    assert not server.bodies
    able = backend(server, extra={"continue_final_message": True, "add_generation_prompt": False})
    able.complete(requests, lambda _: None)
    assert server.bodies[-1]["messages"] == started
    served = VllmBackend(able.settings, chat=load_chat(str(models["llama"])), context=512)
    plain = replace(served, settings=replace(able.settings, extra={"top_k": 0}))
    plain.complete(requests, lambda _: None)
    body = server.bodies[-1]
    assert (body["continue_final_message"], body["add_generation_prompt"], body["top_k"]) == (True, False, 0)
    plain.complete([Request(started[:1], 16)], lambda _: None)
    assert "continue_final_message" not in server.bodies[-1]
    with pytest.raises(LeewayError, match="vLLM continues from other tokens"):
        replace(plain, prefill_fault=lambda: "vLLM continues from other tokens").complete(requests, lambda _: None)


def test_a_budget_of_calls_is_never_exceeded(server: FaultyServer, tmp_path: Path) -> None:
    prompts = [f"fine {k}" for k in range(10)]
    client = CachedBackend(backend(server, max_calls=4, concurrency=3), RecordStore(tmp_path))
    replies = complete(client, *prompts)
    assert [r.failure for r in replies] == [None] * 4 + ["the budget of 4 calls is spent"] * 6
    assert complete(client, *prompts) == replies  # from the cache, and no further call
    assert server.total == 4
    more = CachedBackend(backend(server, max_calls=4, concurrency=3), client.cache)
    assert [r.failure for r in complete(more, *prompts)].count(None) == 8
    assert server.total == 8


def test_retries_count_against_the_budget(server: FaultyServer) -> None:
    reply = complete(backend(server, max_calls=2), "broken")[0]
    assert str(reply.failure).startswith("the budget of 2 calls is spent (before that: HTTP 500")
    assert server.total == 2


def test_every_attempt_is_counted(server: FaultyServer) -> None:
    counted = backend(server)
    complete(counted, "fine", "broken", "busy*1", "wrong")
    assert counted.spent.calls == server.total == 1 + 3 + 2 + 1
    assert (counted.spent.tokens_in, counted.spent.tokens_out) == (20, 10)  # of the two replies


def test_a_redirect_to_another_host_gets_neither_prompt_nor_key(server: FaultyServer) -> None:
    with serving() as other:
        server.redirect_to = f"{other.url}/chat/completions"
        reply = complete(backend(server), "redirect")[0]
        assert reply.failure == f"HTTP 307: redirects are not followed: {server.redirect_to}"
        assert server.total == 1
        assert other.total == 0


def test_a_budget_in_dollars_is_never_exceeded(server: FaultyServer) -> None:
    """10 tokens in and 5 out at 1 and 2 dollars a million are 20 millionths a call."""
    priced = {"price_in": 1.0, "price_out": 2.0}
    free = backend(server, **priced)
    complete(free, "fine")
    assert math.isclose(free.spent.dollars, 20e-6)
    bounded = backend(server, max_dollars=500e-6, concurrency=4, **priced)
    replies = complete(bounded, *[f"fine {k}" for k in range(60)])
    answered = sum(r.failure is None for r in replies)
    assert math.isclose(bounded.spent.dollars, answered * 20e-6)
    assert bounded.spent.dollars <= 500e-6
    assert 5 < answered < 25  # a request goes out only where its upper bound, by its bytes, still fits
    assert all(str(r.failure).startswith("the budget of $0.0005 is spent") for r in replies[answered:])
    assert server.total == answered + 1


def test_attempts_that_may_be_billed_count_at_their_upper_bound(server: FaultyServer) -> None:
    """A cut reply costs its upper bound; a 500 costs nothing."""
    client = backend(server, price_in=1.0, price_out=2.0, retries=0)
    complete(client, "broken")
    assert client.spent.dollars == 0
    complete(client, "cut")
    assert client.spent.dollars > 20e-6


def test_choices_are_summed_over_spellings_within_the_top_tokens(server: FaultyServer) -> None:
    conversation = [{"role": "user", "content": "fine"}]
    choices = backend(server).choose([conversation], ["Yes", "No"], lambda _: None)
    assert choices[0].failure is None
    assert math.isclose(choices[0].mass["Yes"], math.exp(-1.0) + math.exp(-2.0))  # not that after a line break
    assert math.isclose(choices[0].mass["No"], math.exp(-1.5))
    sent = server.bodies[-1]
    assert (sent["logprobs"], sent["top_logprobs"], sent["max_tokens"], sent["temperature"]) == (True, 20, 1, 1.0)


def test_choices_without_logprobs_are_failures_and_others_are_cached(server: FaultyServer, tmp_path: Path) -> None:
    client = CachedBackend(backend(server), RecordStore(tmp_path))
    conversations = [[{"role": "user", "content": p}] for p in ("fine", "mute", "nan", "broken", "fine")]
    for _ in range(2):
        choices = client.choose(conversations, ["Yes", "No"], lambda _: None)
        assert choices[0] == choices[4]
        assert choices[0].failure is None
        assert choices[1] == Choice({}, "the reply has no logprobs")
        assert choices[2] == Choice({}, "the reply's logprobs are invalid")
        assert str(choices[3].failure).startswith("HTTP 500")
    assert server.attempts == {"fine": 1, "mute": 2, "nan": 2, "broken": 6}


def test_a_reply_from_another_model_is_a_failure(server: FaultyServer) -> None:
    loose, pinned = backend(server), backend(server, served="model-of-today")
    assert complete(pinned, "fine")[0].failure is None
    server.served = "model-of-tomorrow"
    assert complete(pinned, "fine")[0].failure == "the reply is from model model-of-tomorrow, not model-of-today"
    assert complete(loose, "fine")[0].failure is None
    assert loose.served == {"model-of-tomorrow"}


def test_identity_covers_what_shapes_a_reply_and_no_limits() -> None:
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
    ("settings", "message"),
    [
        ({"model": ""}, "no model name"),
        ({"base_url": "ftp://a"}, "is not a URL"),
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
def test_invalid_settings(settings: dict[str, object], message: str) -> None:
    with pytest.raises(LeewayError, match=message) as error:
        ApiSettings(**{"model": "m"} | settings)  # type: ignore[arg-type]
    assert "pass@" not in str(error.value)


def test_a_missing_or_refused_key_is_one_error(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LeewayError, match=r"the key was refused \(HTTP 401\); check the value of TEST_KEY"):
        complete(backend(server, concurrency=1), "key", "fine", "fine 2")
    assert server.total == 1
    with pytest.raises(LeewayError, match="no model 'm', or no such address"):
        complete(backend(server), "lost")
    monkeypatch.delenv("TEST_KEY")
    with pytest.raises(LeewayError, match="the environment variable TEST_KEY is not set"):
        complete(backend(server), "fine")
    monkeypatch.setenv("TEST_KEY", "two words")
    with pytest.raises(LeewayError, match="the value of TEST_KEY is not a valid key") as error:
        complete(backend(server), "fine")
    assert "two words" not in str(error.value)
    assert complete(backend(server, key_env=""), "fine")[0].failure is None  # no key needed


def test_the_key_is_in_no_failure_log_hash_or_file(
    server: FaultyServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    client = CachedBackend(backend(server), RecordStore(tmp_path))
    replies = complete(client, "wrong", "fine", "broken", "cut")
    assert "[key]" in str(replies[0].failure)  # the server sent it back
    with pytest.raises(LeewayError) as error:
        complete(client, "key")
    assert server.keys == {f"Bearer {KEY}"}  # it was really sent
    outputs = [repr(replies), str(error.value), repr(client.backend), caplog.text, *capfd.readouterr()]
    assert not [t for t in outputs if KEY in t]
    assert not [f for f in tmp_path.iterdir() if KEY.encode() in f.read_bytes()]


def test_inside_a_running_loop(server: FaultyServer) -> None:
    """As in a notebook."""

    async def notebook() -> list[Reply]:
        return complete(backend(server), "fine")

    assert asyncio.run(notebook())[0].text == "about fine"


STOPPED = """
import os, sys
from pathlib import Path
from leeway.generation.openai_api import ApiSettings
from leeway.cache import RecordStore
from leeway.generation.backend import Request
from leeway.generation.cache import CachedBackend
from leeway.generation.openai_api import OpenAIBackend
settings = ApiSettings(model="m", base_url=sys.argv[1], key_env="", concurrency=3, timeout_s=60)
client = CachedBackend(OpenAIBackend(settings), RecordStore(Path(sys.argv[2])))
prompts = [f"fine {k}" for k in range(6)] + [f"hang {k}" for k in range(3)] + ["fine last"]
try:
    client.complete([Request([{"role": "user", "content": p}], 16) for p in prompts], lambda n: print(n, flush=True))
except KeyboardInterrupt:
    print("stopped", flush=True)
    sys.exit(130)
"""


@pytest.mark.usefixtures("heeding")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_ctrl_c_and_kill_lose_no_reply(server: FaultyServer, tmp_path: Path, how: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(STOPPED), server.url, str(tmp_path)],
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
    cache = RecordStore(tmp_path)
    assert len(cache) == 6
    before = server.total
    again = complete(CachedBackend(backend(server), cache), *[f"fine {k}" for k in range(6)])
    assert server.total == before  # the key is not part of the identity, so these come from the cache
    assert [r.text for r in again] == [f"about fine {k}" for k in range(6)]
