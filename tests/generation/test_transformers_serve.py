"""The same model behind two backends: in this process, and behind `transformers serve` over HTTP."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from leeway.generation.backend import Backend, Reply, Request
from leeway.generation.cache import CachedBackend, ReplyCache
from leeway.generation.openai_api import OpenAIBackend
from leeway.generation.openai_client import ApiSettings
from leeway.generation.transformers import LocalBackend, TransformersBackend
from leeway.model.load import load_model, resolve
from leeway.organism import world

LIMIT = 48


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`transformers serve` on the organism's folder."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log"
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", resolve("organism")]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
    try:
        deadline = time.monotonic() + 50
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


def requests() -> list[Request]:
    texts = [i.prompt for i in world.capability_items(12)] + [p.text for p in world.forbidden_prompts(6)]
    return [Request([{"role": "user", "content": t}], LIMIT) for t in texts]


def timed(backend: Backend) -> tuple[list[Reply], float]:
    """Replies, and new tokens a second by this process's own count."""
    begun = time.perf_counter()
    replies = backend.complete(requests(), lambda _: None)
    return replies, sum(r.new_tokens for r in replies) / (time.perf_counter() - begun)


def test_greedy_replies_are_the_same_over_http_and_asked_once(
    url: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    settings = ApiSettings(model=resolve("organism"), base_url=url, key_env="", concurrency=4, timeout_s=30.0)
    endpoint = OpenAIBackend(settings)
    endpoint.complete(requests()[:1], lambda _: None)  # the model is loaded by now
    replies, rate = timed(endpoint)
    here = TransformersBackend(load_model("organism", device="cpu"))
    theirs, own_rate = timed(here)
    assert [r.failure for r in replies] == [None] * len(replies)
    assert [r.text for r in replies] == [r.text for r in theirs]
    assert len({r.text for r in replies}) > 6
    # the endpoint counts the token that ends a turn, and we do not
    assert [r.new_tokens - r.cut for r in replies] == [r.new_tokens - r.cut + (not r.cut) for r in theirs]
    record_property("measured", f"greedy replies over HTTP: {len(replies)} of {len(replies)} as in this process")
    record_property("measured", f"throughput, transformers backend: {own_rate:.0f} tokens/s (one batch of 18, CPU)")
    record_property("measured", f"throughput, endpoint over transformers serve: {rate:.0f} tokens/s (CPU)")
    kept = ReplyCache(tmp_path / "kept.sqlite")
    asking = CachedBackend(endpoint, kept)
    assert asking.complete(requests(), lambda _: None) == replies
    calls = endpoint.spent.calls
    assert asking.complete(requests(), lambda _: None) == replies
    assert endpoint.spent.calls == calls
    kept.close()


def test_an_endpoint_without_logprobs_has_no_choices(url: str) -> None:
    endpoint = OpenAIBackend(ApiSettings(model=resolve("organism"), base_url=url, key_env="", timeout_s=30.0))
    told = endpoint.choose([[{"role": "user", "content": "2 + 2 ?"}]], ["Yes", "No"], lambda _: None)
    assert [c.failure for c in told] == ["the reply has no logprobs"]


def test_a_local_model_answers_as_the_backend_does_and_is_known_before_it_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = TransformersBackend(load_model("organism", device="cpu"))
    with monkeypatch.context() as without_weights:
        without_weights.setattr("leeway.generation.transformers.load_model", None)
        local = LocalBackend("organism", device="cpu")
        assert local.template_hash == here.template_hash
        assert local.identity == LocalBackend("organism", device="cpu").identity
        assert local.identity != LocalBackend("organism", device="cpu", dtype="bfloat16").identity
        assert local.complete([], lambda _: None) == []
    asked = requests()
    assert local.complete(asked, lambda _: None) == here.complete(asked, lambda _: None)
    question = [[{"role": "user", "content": "Do you like tea?"}]]
    assert local.choose(question, ["Yes", "No"], lambda _: None) == here.choose(question, ["Yes", "No"], lambda _: None)
