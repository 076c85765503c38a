"""A faulty endpoint for the tests: chat completions over real HTTP; the prompt selects the fault.

A prompt's first word names the fault; "fault*n" fails n times before it succeeds. The server counts requests by prompt
and records their bodies.
"""

from __future__ import annotations

import base64
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

USAGE = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
LOGPROBS = [(" Yes", -1.0), ("yes", -2.0), ("No", -1.5), ("\nYes", -3.0), ("Maybe", -2.5)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][-1]["content"]
        seen = self.server.note(self, prompt, body)
        kind, _, times = prompt.split()[0].partition("*")
        try:
            if seen > int(times or 10**9):
                kind = "fine"
            getattr(self, f"say_{kind.replace('-', '_')}", self.say_fine)(prompt, body)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client disconnected, as the test intends
        finally:
            self.server.leave()

    def say_fine(self, prompt: str, body: dict[str, Any]) -> None:
        self.answer({"role": "assistant", "content": f" about {prompt} "}, body)

    def say_slow(self, prompt: str, body: dict[str, Any]) -> None:
        time.sleep(0.2)
        self.say_fine(prompt, body)

    def say_hang(self, *_: Any) -> None:
        self.server.stopping.wait(20)

    def say_drip(self, *_: Any) -> None:
        """A byte every 50 ms: a connection that is never idle and never complete."""
        self.head(200, {"Content-Type": "application/json", "Content-Length": "100000"})
        while not self.server.stopping.wait(0.05):
            self.wfile.write(b" ")
            self.wfile.flush()

    def say_busy(self, *_: Any) -> None:
        self.error(429, {"Retry-After": "0.3"})

    def say_later(self, *_: Any) -> None:
        self.error(429, {"Retry-After": "3600"})

    def say_redirect(self, *_: Any) -> None:
        self.error(307, {"Location": self.server.redirect_to})

    def say_broken(self, *_: Any) -> None:
        self.error(500, {})

    def say_wrong(self, *_: Any) -> None:
        self.error(400, {}, f"I do not take this from {self.headers['Authorization']}")

    def say_coded(self, *_: Any) -> None:
        self.error(400, {"Retry-After": self.key}, f"not {base64.b64encode(f'<{self.key}>'.encode()).decode()}")

    def say_leak(self, _: str, body: dict[str, Any]) -> None:
        self.answer({"role": "assistant", "content": f"You sent {self.key}."}, body)

    def say_coded_leak(self, _: str, body: dict[str, Any]) -> None:
        self.answer({"role": "assistant", "content": base64.b64encode(self.key.encode()).decode()}, body)

    def say_key(self, *_: Any) -> None:
        self.error(401, {}, f"bad key {self.headers['Authorization']}")

    def say_lost(self, *_: Any) -> None:
        self.error(404, {})

    def say_cut(self, *_: Any) -> None:
        self.head(200, {"Content-Type": "application/json", "Content-Length": "1000"})
        self.wfile.write(b'{"choices": [{"mess')
        self.close_connection = True

    def say_garbage(self, *_: Any) -> None:
        self.send(200, b'{"choices": [oops', {"Content-Type": "application/json"})

    def say_page(self, *_: Any) -> None:
        self.send(200, b"<html>welcome to the proxy</html>", {"Content-Type": "text/html"})

    def say_list(self, *_: Any) -> None:
        self.send(200, b"[1, 2]", {"Content-Type": "application/json"})

    def say_bare(self, *_: Any) -> None:
        self.send(200, b'{"object": "chat.completion", "choices": []}', {"Content-Type": "application/json"})

    def say_half(self, _: str, body: dict[str, Any]) -> None:
        """A lone surrogate: valid in JSON, not in UTF-8."""
        self.answer({"role": "assistant", "content": "a \ud800 b"}, body)

    def say_half_error(self, *_: Any) -> None:
        self.error(400, {}, "half a \ud800")

    def say_deep(self, *_: Any) -> None:
        self.send(200, b"[" * 200_000, {"Content-Type": "application/json"})

    def say_count(self, *_: Any) -> None:
        choice = b'{"index": 0, "message": {"role": "assistant", "content": "x"}, "finish_reason": "stop"}'
        usage = b'{"prompt_tokens": 1, "completion_tokens": ' + b"9" * 4000 + b"}"
        raw = b'{"model": "m", "choices": [' + choice + b'], "usage": ' + usage + b"}"
        self.send(200, raw, {"Content-Type": "application/json"})

    def say_zipped(self, *_: Any) -> None:
        self.send(200, b"x", {"Content-Type": "application/json", "Content-Encoding": "gzip"})

    def say_flood(self, *_: Any) -> None:
        """A gigabyte, or the part that is read."""
        self.head(200, {"Content-Type": "application/json", "Content-Length": str(1 << 30)})
        for _chunk in range(1 << 14):
            self.wfile.write(b" " * (1 << 16))
            self.server.flooded += 1 << 16

    def say_flood_error(self, *_: Any) -> None:
        self.head(500, {"Content-Type": "application/json", "Content-Length": str(1 << 30)})
        for _chunk in range(1 << 14):
            self.wfile.write(b" " * (1 << 16))
            self.server.flooded += 1 << 16

    def say_refusal(self, _: str, body: dict[str, Any]) -> None:
        self.answer({"role": "assistant", "content": None, "refusal": "I will not."}, body)

    def say_empty(self, _: str, body: dict[str, Any]) -> None:
        self.answer({"role": "assistant", "content": ""}, body)

    def say_null(self, _: str, body: dict[str, Any]) -> None:
        self.answer({"role": "assistant", "content": None}, body)

    def say_thought(self, _: str, body: dict[str, Any]) -> None:
        self.answer({"role": "assistant", "content": None}, body, "length")

    def say_filter(self, _: str, body: dict[str, Any]) -> None:
        self.answer({"role": "assistant", "content": "half"}, body, "content_filter")

    def say_long(self, _: str, body: dict[str, Any]) -> None:
        self.answer({"role": "assistant", "content": "and so on"}, body, "length")

    def say_mute(self, prompt: str, body: dict[str, Any]) -> None:
        """Never return logprobs."""
        self.answer({"role": "assistant", "content": prompt}, {k: v for k, v in body.items() if k != "logprobs"})

    def say_nan(self, prompt: str, body: dict[str, Any]) -> None:
        self.answer({"role": "assistant", "content": prompt}, body, top=[("Yes", float("nan")), ("No", -1.0)])

    @property
    def key(self) -> str:
        return str(self.headers["Authorization"]).removeprefix("Bearer ")

    def answer(
        self, message: dict[str, Any], body: dict[str, Any], reason: str = "stop", top: list[Any] | None = None
    ) -> None:
        choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": reason}
        if body.get("logprobs"):
            tokens = [{"token": t, "logprob": p} for t, p in (top or LOGPROBS)]
            choice["logprobs"] = {"content": [{**tokens[0], "top_logprobs": tokens}]}
        data = {"object": "chat.completion", "model": self.server.served, "choices": [choice], "usage": USAGE}
        self.send(200, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def error(self, code: int, headers: dict[str, str], message: str = "not now") -> None:
        self.send(code, json.dumps({"error": {"message": message}}).encode(), headers)

    def send(self, code: int, raw: bytes, headers: dict[str, str]) -> None:
        self.head(code, {**headers, "Content-Length": str(len(raw))})
        self.wfile.write(raw)

    def head(self, code: int, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Quiet."""


class FaultyServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.attempts: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.times: dict[str, list[float]] = {}
        self.keys: set[str] = set()
        self.flooded = 0  # bytes of floods that were sent
        self.served = "model-of-today"
        self.redirect_to = ""
        self.stopping = threading.Event()
        self.under_way = self.most_under_way = 0
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    @property
    def total(self) -> int:
        return self.attempts.total()

    def note(self, handler: Handler, prompt: str, body: dict[str, Any]) -> int:
        """Record a request; return the number of requests with this prompt so far."""
        with self._lock:
            self.attempts[prompt] += 1
            self.bodies.append(body)
            self.times.setdefault(prompt, []).append(time.monotonic())
            self.keys.add(str(handler.headers["Authorization"]))
            self.under_way += 1
            self.most_under_way = max(self.most_under_way, self.under_way)
            return self.attempts[prompt]

    def leave(self) -> None:
        with self._lock:
            self.under_way -= 1

    def handle_error(self, *_: Any) -> None:
        """Ignore clients that disconnect."""


@contextmanager
def serving() -> Iterator[FaultyServer]:
    server = FaultyServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.stopping.set()
        server.shutdown()
        thread.join()
        server.server_close()
