"""An endpoint that fails in many ways: raw sockets, so that nothing of a reply has to be valid HTTP."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import re
import socket
import ssl
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path
from typing import Any

GRADES = "1.b: 0\n2.b: 3\n3.b: 3\n\n#1. b. 0\n#2. b. 3\n#3. b. 3"
JSON = "Content-Type: application/json\r\n"
CHUNK = b" " * (1 << 16)


def completion(text: str = GRADES, **changes: object) -> bytes:
    """Return the body of a valid chat completion, with some fields replaced."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
    whole = {"id": "x", "object": "chat.completion", "created": 1, "model": "judge", "choices": [choice]}
    return json.dumps(whole | {"usage": usage} | changes).encode()


def reply(body: bytes, status: str = "200 OK", headers: str = JSON) -> bytes:
    head = f"HTTP/1.1 {status}\r\n{headers}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode() + body


Answer = Callable[["Endpoint", socket.socket], None]


def raw(content: bytes) -> Answer:
    """Return an answer that sends these bytes and closes."""
    return lambda _, connection: connection.sendall(content)


def _open_ended(head: bytes, chunk: bytes = CHUNK, limit: int = 10 << 30, pause: float = 0.0) -> Answer:
    """Return an answer that sends `chunk` until `limit` bytes are out or the client hangs up."""

    def answer(endpoint: Endpoint, connection: socket.socket) -> None:
        connection.sendall(head)
        for _ in range(limit // len(chunk)):
            if endpoint.closing.wait(pause) if pause else endpoint.closing.is_set():
                return
            connection.sendall(chunk)
            endpoint.flooded += len(chunk)

    return answer


def _hang(endpoint: Endpoint, _: socket.socket) -> None:
    endpoint.closing.wait(120)


def _reset(_: Endpoint, connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


_HEAD = f"HTTP/1.1 200 OK\r\n{JSON}"
_CHUNKED = f"{_HEAD}Transfer-Encoding: chunked\r\n\r\n".encode()
_DEEP = b'{"choices": ' + b"[" * 200_000
FAULTS: dict[str, Answer] = {
    "never answers": _hang,
    "sends a byte every 0.1 s": _open_ended(f"{_HEAD}Content-Length: 100000\r\n\r\n".encode(), b" ", pause=0.1),
    "closes without a byte": raw(b""),
    "resets the connection": _reset,
    "closes half-way through the head": raw(b"HTTP/1.1 200 O"),
    "closes half-way through the body": raw(reply(completion())[:-40]),
    "closes half-way through a chunk": raw(_CHUNKED + b'fff\r\n{"choices": [{"mess'),
    "streams 10 GB": _open_ended(f"{_HEAD}Content-Length: {10 << 30}\r\n\r\n".encode()),
    "streams 10 GB of chunks": _open_ended(_CHUNKED, b"10000\r\n" + CHUNK + b"\r\n"),
    "streams 10 GB of headers": _open_ended(b"HTTP/1.1 200 OK\r\nX: ", b"y" * (1 << 16)),
    "streams 10 GB under HTTP 500": _open_ended(f"HTTP/1.1 500 No\r\nContent-Length: {10 << 30}\r\n\r\n".encode()),
    "sends HTTP 100 without end": _open_ended(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100, limit=1 << 24),
    "sends random bytes": raw(bytes(range(256)) * 40),
    "sends random bytes as JSON": raw(reply(bytes(range(256)) * 40)),
    "sends a chunk of negative size": raw(_CHUNKED + b"-5\r\nhello\r\n"),
    "sends two lengths": raw(f"{_HEAD}Content-Length: 5\r\nContent-Length: 9\r\n\r\nhello".encode()),
    "sends an event stream": raw(reply(b"data: {}\n\ndata: [DONE]\n\n", headers="Content-Type: text/event-stream\r\n")),
    "sends a compressed bomb": raw(reply(b"\x1f\x8b" * 99, headers=JSON + "Content-Encoding: gzip\r\n")),
    "sends brackets 200,000 deep": raw(reply(_DEEP)),
    "sends a lone surrogate": raw(reply(completion().replace(b"#1.", b"\\ud800"))),
    "sends 4,000-digit token counts": raw(reply(completion().replace(b"120", b"9" * 4000))),
    "sends negative token counts": raw(reply(completion(usage={"prompt_tokens": -1, "completion_tokens": -1}))),
    "sends no choices": raw(reply(completion(choices=[]))),
    "sends choices of another type": raw(reply(completion(choices={"0": None}))),
    "sends null": raw(reply(b"null")),
    "sends a page of HTML": raw(reply(b"<html>welcome</html>", headers="Content-Type: text/html\r\n")),
    "redirects to another host": raw(reply(b"", "307 Go", "Location: http://198.51.100.7/v1/chat/completions\r\n")),
    "redirects to itself": raw(reply(b"", "308 Go", "Location: /v1/chat/completions\r\n")),
    "answers HTTP 429, Retry-After a year": raw(reply(b"{}", "429 No", "Retry-After: 31536000\r\n")),
    "answers HTTP 429, Retry-After NaN": raw(reply(b"{}", "429 No", "Retry-After: nan\r\n")),
    "answers HTTP 500": raw(reply(b"{}", "500 No")),
    "answers HTTP 999": raw(reply(b"{}", "999 No")),
    "answers HTTP 204": raw(b"HTTP/1.1 204 No Content\r\n\r\n"),
    "answers HTTP 401 to some": raw(reply(b'{"error": {"message": "who?"}}', "401 No")),
    "answers HTTP 404 to some": raw(reply(b'{"error": {"message": "what?"}}', "404 No")),
    "escapes in its error": raw(reply(b'{"error": {"message": "\\u001b[2J\\u0000 \\r\\n x"}}', "400 No")),
}


@dataclass
class Endpoint:
    """Answers `healthy` requests well and all others with `fault`; counts what was sent and what was paid for."""

    fault: Answer
    healthy: int = 0
    certificate: Path | None = None
    asked: Counter[str] = field(default_factory=Counter)
    paid: Counter[str] = field(default_factory=Counter)  # valid replies by request
    flooded: int = 0  # bytes
    closing: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def handle(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError), connection:
            connection.settimeout(120)
            if self.certificate:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.load_cert_chain(self.certificate)
                connection = context.wrap_socket(connection, server_side=True)
            body = _body(connection)
            key = hashlib.sha256(body).hexdigest()[:16]
            with self._lock:
                self.asked[key] += 1
                is_healthy = self.healthy > 0
                self.healthy -= is_healthy
                self.paid[key] += is_healthy
            if is_healthy:
                connection.sendall(reply(completion()))
            else:
                self.fault(self, connection)


def _body(connection: socket.socket) -> bytes:
    """Read a request; return its body."""
    data = b""
    while b"\r\n\r\n" not in data:
        if not (more := connection.recv(1 << 16)):
            raise ValueError("no request")
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
    while length and len(body) < int(length[1]):
        body += connection.recv(1 << 16)
    return body


@dataclass
class Server:
    """An endpoint in a process of its own, so that this one stays free of threads and can be forked."""

    process: multiprocessing.Process
    control: Any
    url: str

    def heal(self) -> None:
        """Answer every request well from now on."""
        self._send("heal")

    def counts(self) -> tuple[Counter[str], Counter[str], int]:
        """Return requests and paid replies by request, and the bytes of floods."""
        return self._send("counts")

    def _send(self, command: str) -> Any:
        self.control.send(command)
        return self.control.recv()


@contextmanager
def serving(fault: Answer, healthy: int = 0, certificate: Path | None = None) -> Iterator[Server]:
    """Serve on a free local port: 127.0.0.1, or 127.0.0.2 under TLS, where a client reads its environment."""
    host = "127.0.0.2" if certificate else "127.0.0.1"
    with socket.create_server((host, 0), backlog=64) as listener:
        ours, theirs = multiprocessing.Pipe()
        endpoint = Endpoint(fault, healthy, certificate)
        process = multiprocessing.get_context("fork").Process(target=_serve, args=(endpoint, listener, theirs))
        process.start()
        url = f"http{'s' if certificate else ''}://{host}:{listener.getsockname()[1]}/v1"
        try:
            yield Server(process, ours, url)
        finally:
            process.kill()
            process.join()


def _serve(endpoint: Endpoint, listener: socket.socket, control: Any) -> None:
    threading.Thread(target=_obey, args=(endpoint, control), daemon=True).start()
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=endpoint.handle, args=(connection,), daemon=True).start()


def _obey(endpoint: Endpoint, control: Any) -> None:
    while True:
        if control.recv() == "heal":
            endpoint.healthy = 1 << 40
            control.send(None)
        else:
            control.send((endpoint.asked, endpoint.paid, endpoint.flooded))


def certificates(folder: Path) -> dict[str, tuple[Path, bool]]:
    """Return PEM files (certificate and key) that a client has to refuse, and whether it is to trust the issuer."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    found = {}
    past, now, future = (datetime(year, 1, 1, tzinfo=UTC) for year in (2020, 2021, 2090))
    cases = {
        "of an unknown issuer": ("127.0.0.2", past, future, False),
        "of another host": ("127.0.0.3", past, future, True),
        "expired": ("127.0.0.2", past, now, True),
    }
    for k, (name, (host, begins, ends, trusted)) in enumerate(cases.items()):
        key, subject = ec.generate_private_key(ec.SECP256R1()), x509.Name.from_rfc4514_string("CN=test")
        builder = x509.CertificateBuilder(subject, subject, key.public_key(), k + 1, begins, ends)
        names = x509.SubjectAlternativeName([x509.IPAddress(ip_address(host))])
        made = builder.add_extension(names, critical=False).sign(key, hashes.SHA256())
        forms = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        path = folder / f"certificate-{k}.pem"
        path.write_bytes(made.public_bytes(serialization.Encoding.PEM) + key.private_bytes(*forms))
        found[name] = (path, trusted)
    return found
