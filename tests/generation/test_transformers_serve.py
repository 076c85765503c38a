"""One model through two backends: in this process, and over HTTP with `transformers serve`."""

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

from leeway.cache import RecordStore
from leeway.generation.backend import Backend, Reply, Request
from leeway.generation.cache import CachedBackend
from leeway.generation.openai_api import ApiSettings, OpenAIBackend
from leeway.generation.transformers import LocalBackend, TransformersBackend
from leeway.model.load import load_model, resolve
from leeway.organism import world

pytestmark = pytest.mark.slow

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
    """Return the replies and the throughput in tokens per second."""
    start = time.perf_counter()
    replies = backend.complete(requests(), lambda _: None)
    return replies, sum(r.new_tokens for r in replies) / (time.perf_counter() - start)


def test_greedy_replies_are_the_same_over_http_and_cached(
    url: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    settings = ApiSettings(model=resolve("organism"), base_url=url, key_env="", concurrency=4, timeout_s=30.0)
    endpoint = OpenAIBackend(settings)
    endpoint.complete(requests()[:1], lambda _: None)  # load the model
    replies, rate = timed(endpoint)
    local = TransformersBackend(load_model("organism", device="cpu"))
    expected, local_rate = timed(local)
    assert [r.failure for r in replies] == [None] * len(replies)
    assert [r.text for r in replies] == [r.text for r in expected]
    assert len({r.text for r in replies}) > 6
    # the endpoint counts the end of turn, the transformers backend does not
    assert [r.new_tokens - r.cut for r in replies] == [r.new_tokens - r.cut + (not r.cut) for r in expected]
    record_property("measured", f"greedy replies over HTTP: {len(replies)} of {len(replies)} as in this process")
    record_property("measured", f"throughput, transformers backend: {local_rate:.0f} tokens/s (one batch of 18, CPU)")
    record_property("measured", f"throughput, endpoint over transformers serve: {rate:.0f} tokens/s (CPU)")
    cache = RecordStore(tmp_path)
    cached = CachedBackend(endpoint, cache)
    assert cached.complete(requests(), lambda _: None) == replies
    calls = endpoint.spent.calls
    assert cached.complete(requests(), lambda _: None) == replies
    assert endpoint.spent.calls == calls


def test_an_endpoint_without_logprobs_has_no_choices(url: str) -> None:
    endpoint = OpenAIBackend(ApiSettings(model=resolve("organism"), base_url=url, key_env="", timeout_s=30.0))
    choices = endpoint.choose([[{"role": "user", "content": "2 + 2 ?"}]], ["Yes", "No"], lambda _: None)
    assert [c.failure for c in choices] == ["the reply has no logprobs"]


def test_a_local_backend_equals_the_transformers_backend_and_loads_on_first_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend = TransformersBackend(load_model("organism", device="cpu"))
    with monkeypatch.context() as without_weights:
        without_weights.setattr("leeway.generation.transformers.load_model", None)
        local = LocalBackend("organism", device="cpu")
        assert local.template_hash == backend.template_hash
        assert local.identity == LocalBackend("organism", device="cpu").identity
        assert local.identity != LocalBackend("organism", device="cpu", dtype="bfloat16").identity
        assert local.complete([], lambda _: None) == []
    assert local.complete(requests(), lambda _: None) == backend.complete(requests(), lambda _: None)
    question = [[{"role": "user", "content": "Do you like tea?"}]]
    options = ["Yes", "No"]
    assert local.choose(question, options, lambda _: None) == backend.choose(question, options, lambda _: None)
