"""A local endpoint of chat completions that answers after a fixed latency and counts what was asked twice.

    python -m benchmarks.hardening.stub --latency 1.0

prints its address, then serves until its standard input closes. `GET /counts` returns the counts as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import sys
import time
from typing import Any

FILLER = "first lift the lid, then turn it twice and set it down; " * 8  # the length of a plain answer, 450 characters


class Counts:
    """What was asked and answered, by the hash of a request's body."""

    def __init__(self) -> None:
        self.requests = 0
        self.answered: set[bytes] = set()
        self.asked: set[bytes] = set()
        self.again = 0  # requests that had been asked before
        self.again_answered = 0  # of these, the ones whose answer had been sent whole
        self.under_way = self.most_under_way = 0
        self.first = self.last = 0.0  # when the first request came, and when the last was answered

    def begin(self, body: bytes) -> bytes:
        key = hashlib.blake2b(body, digest_size=12).digest()
        self.requests += 1
        self.first = self.first or time.monotonic()
        self.again += key in self.asked
        self.again_answered += key in self.answered
        self.asked.add(key)
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        return key

    def to_json(self) -> dict[str, float]:
        numbers = {k: v for k, v in vars(self).items() if isinstance(v, int)}
        return numbers | {"seconds": self.last - self.first}


class Connection(asyncio.Protocol):
    """HTTP/1.1 with keep-alive, one request at a time, as httpx sends them."""

    def __init__(self, counts: Counts, latency: float) -> None:
        self.counts, self.latency = counts, latency
        self.buffer = b""
        self.transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, separator, rest = self.buffer.partition(b"\r\n\r\n")
        if not separator:
            return
        if head.startswith(b"GET"):
            self.buffer = rest
            found = self.counts.to_json() if b"/counts" in head.split(b"\r\n")[0] else {"object": "list", "data": []}
            self._send(json.dumps(found).encode())
            return
        length = next(int(h[15:]) for h in head.split(b"\r\n") if h[:15].lower() == b"content-length:")
        if len(rest) < length:
            return
        body, self.buffer = rest[:length], rest[length:]
        key = self.counts.begin(body)
        asyncio.get_running_loop().call_later(self.latency, self._answer, key)

    def _answer(self, key: bytes) -> None:
        self.counts.under_way -= 1
        if self.transport.is_closing():
            return
        message = {"role": "assistant", "content": f"Answer {key.hex()}: {FILLER}"}
        usage = {"prompt_tokens": 10, "completion_tokens": 100, "total_tokens": 110}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        data = {"object": "chat.completion", "model": "stub", "choices": [choice], "usage": usage}
        self._send(json.dumps(data).encode())
        self.counts.answered.add(key)
        self.counts.last = time.monotonic()

    def _send(self, body: bytes) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        self.transport.write(head + body)


async def serve(latency: float) -> None:
    loop, counts = asyncio.get_running_loop(), Counts()
    server = await loop.create_server(lambda: Connection(counts, latency), "127.0.0.1", 0, backlog=1024)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    server.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hardening.stub", description=__doc__)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds until a request is answered")
    asyncio.run(serve(parser.parse_args().latency))
