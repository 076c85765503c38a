"""A vLLM server of a base model, with adapters loaded by name and queried as an OpenAI-compatible endpoint.

`vllm serve` is the child of a watcher process that ends it and its descendants when this process ends, even by SIGKILL.
Routes and flags: https://docs.vllm.ai/en/latest/features/lora/.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError

from leeway.data.chat import Chat
from leeway.errors import LeewayError
from leeway.generation.openai_api import OpenAIBackend
from leeway.generation.openai_client import ApiSettings
from leeway.generation.transformers import weights_hash
from leeway.hashing import digest
from leeway.model import adapters
from leeway.model.load import load_chat, resolve

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values of --max-lora-rank
BASE_NAME = "base"  # served model name of the base model
LOG_TAIL = 8  # lines of the log in an error
GRACE_S = 20.0  # between SIGTERM and SIGKILL

# End the process group when standard input closes, which the kernel does however the parent ended.
WATCHER = """
import os, signal, subprocess, sys, threading, time
grace, command = float(sys.argv[1]), sys.argv[2:]
signal.signal(signal.SIGTERM, lambda *_: None)
signal.signal(signal.SIGINT, lambda *_: None)
child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
stopping = threading.Event()
def watch():
    os.read(0, 1)
    stopping.set()
    os.killpg(0, signal.SIGTERM)
    time.sleep(grace)
    os.killpg(0, signal.SIGKILL)
threading.Thread(target=watch, daemon=True).start()
code = child.wait()
if stopping.is_set():
    os.killpg(0, signal.SIGKILL)
os._exit(code & 255)
"""


@dataclass(frozen=True)
class VllmSettings:
    """A base model (hub id or folder) and how to serve it; `args` are additional flags of `vllm serve`.

    `max_lora_rank` is rounded up to a supported value. `log` receives the server's output (None: a temporary file,
    deleted on success). For `concurrency`, `timeout_s` and `retries` see `ApiSettings`.
    """

    model: str
    revision: str | None = None
    dtype: str = "auto"
    max_lora_rank: int = 16
    port: int | None = None
    start_timeout_s: float = 900.0
    command: str = "vllm"
    args: tuple[str, ...] = ()
    log: Path | None = None
    concurrency: int = 64
    timeout_s: float = 600.0
    retries: int = 2

    def __post_init__(self) -> None:
        if not 0 < self.max_lora_rank <= LORA_RANKS[-1]:
            raise LeewayError(
                f"vLLM: adapter rank {self.max_lora_rank} is not supported",
                fix=f"use a rank from 1 to {LORA_RANKS[-1]}",
            )


class VllmServer:
    """`with VllmServer(settings) as server:` starts a server, waits until it is healthy, and always ends it."""

    def __init__(self, settings: VllmSettings) -> None:
        self.settings = settings
        self.port = settings.port or _free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._log = settings.log

    def __enter__(self) -> Self:
        command = self._command()
        _check_free(self.port)  # a server already there would answer in place of ours
        if self._log is None:
            handle, name = tempfile.mkstemp(prefix="leeway-vllm-", suffix=".log")
            os.close(handle)
            self._log = Path(name)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", WATCHER, str(GRACE_S), *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"},
            )
        try:
            self._wait()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._end()
        if kind is None and self.settings.log is None and self._log is not None:
            self._log.unlink(missing_ok=True)

    def base(self, prefix: str = "") -> OpenAIBackend:
        """Return a backend of the base model without an adapter."""
        return self._backend(BASE_NAME, "", prefix)

    @contextmanager
    def adapter(self, folder: Path, prefix: str = "") -> Iterator[OpenAIBackend]:
        """Load the adapter saved in `folder` for the duration of the context.

        Raises LeewayError if vLLM cannot serve it, or would compute another function than was trained.
        """
        check_servable(folder, self.settings.max_lora_rank)
        try:
            content = adapters.adapter_hash(adapters.saved(folder))
        except (SafetensorError, OSError) as error:
            raise LeewayError(f"{folder}: its adapter is damaged or missing", fix="train it again") from error
        name = f"leeway-{content}"  # by content, because vLLM caches prefixes by name
        backend = self._backend(name, content, prefix)
        self._post("load_lora_adapter", {"lora_name": name, "lora_path": str(folder.resolve())}, folder)
        try:
            yield backend
        except BaseException:
            with suppress(LeewayError):  # report the first error
                self._post("unload_lora_adapter", {"lora_name": name}, folder)
            raise
        self._post("unload_lora_adapter", {"lora_name": name}, folder)

    @cached_property
    def _chat(self) -> Chat:
        return load_chat(self.settings.model, self.settings.revision)

    @cached_property
    def _weights(self) -> str:
        return weights_hash(self.settings.model, self.settings.revision)

    def _backend(self, name: str, adapter: str, prefix: str) -> OpenAIBackend:
        s = self.settings
        kwargs = template_kwargs(self._chat)
        url, extra = f"http://127.0.0.1:{self.port}/v1", {"chat_template_kwargs": kwargs} if kwargs else {}
        return OpenAIBackend(
            ApiSettings(name, url, "", s.concurrency, s.timeout_s, s.retries, extra=extra, served=name),
            prefix=prefix,
            identity_override=digest("vllm", self._weights, adapter, s.dtype, list(s.args)),
            template_override=self._chat.with_prefix(prefix).template_hash,
        )

    def _command(self) -> list[str]:
        s = self.settings
        program = shutil.which(s.command)
        if program is None:
            raise LeewayError(
                f"{s.command}: program not found", fix="pip install vllm (it needs a GPU), or use backend: transformers"
            )
        rank = next(r for r in LORA_RANKS if r >= s.max_lora_rank)
        revision = ["--revision", s.revision] if s.revision else []
        return [
            *(program, "serve", resolve(s.model), *revision),
            *("--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", BASE_NAME, "--dtype", s.dtype),
            *("--enable-lora", "--max-loras", "1", "--max-lora-rank", str(rank)),
            *("--generation-config", "vllm"),  # no top-k, top-p or penalty from the model's own config
            *s.args,
        ]

    def _wait(self) -> None:
        """Wait until /health answers. Raises LeewayError with the end of the log if it does not."""
        deadline = time.monotonic() + self.settings.start_timeout_s
        while True:
            code = self._process.poll() if self._process else None
            if code is not None:
                raise self._failed(f"ended with exit code {code}")
            with suppress(OSError), _open(f"http://127.0.0.1:{self.port}/health", None, 2.0):
                return
            if time.monotonic() > deadline:
                raise self._failed(f"was not healthy after {self.settings.start_timeout_s:g} s")
            time.sleep(0.1)

    def _failed(self, why: str) -> LeewayError:
        lines = self._log.read_text("utf-8", "replace").splitlines() if self._log else []
        tail = " | ".join([line.strip() for line in lines if line.strip()][-LOG_TAIL:]) or "empty"
        return LeewayError(f"vllm serve {self.settings.model} {why}; its log ends: {tail}", fix=f"see {self._log}")

    def _post(self, route: str, body: dict[str, str], folder: Path) -> None:
        try:
            with _open(f"http://127.0.0.1:{self.port}/v1/{route}", body, self.settings.timeout_s):
                return
        except urllib.error.HTTPError as error:
            with error:
                detail = " ".join(error.read().decode("utf-8", "replace").split())[:300]
            raise LeewayError(
                f"{folder}: vLLM refused {route} (HTTP {error.code}: {detail})",
                fix=f"see the server's log, {self._log}",
            ) from error
        except OSError as error:
            raise self._failed(f"did not answer {route} ({error})") from error

    def _end(self) -> None:
        """Close the watcher's standard input, which ends the group. Do nothing if it has ended."""
        process, self._process = self._process, None
        if process is None or process.stdin is None:
            return
        with suppress(OSError):
            process.stdin.close()
        try:
            process.wait(GRACE_S + 5)
        except BaseException:
            _kill(process.pid)
            process.wait()
            raise
        _kill(process.pid)  # children of a server that ended by itself


def check_servable(folder: Path, max_rank: int) -> None:
    """Raise LeewayError unless `folder` holds an adapter that vLLM applies as it was trained."""
    try:
        config = json.loads((folder / adapters.CONFIG).read_text("utf-8"))
    except FileNotFoundError as error:
        raise LeewayError(
            f"{folder}: no {adapters.CONFIG}, so vLLM cannot load it as an adapter",
            fix="serve whole weights as the model itself, or use backend: transformers",
        ) from error
    except ValueError as error:
        raise LeewayError(f"{folder}: its {adapters.CONFIG} is damaged", fix="train it again") from error
    for key, what in (
        ("trainable_token_indices", "trained embedding rows (control tokens)"),
        ("modules_to_save", "modules trained in full"),
        ("use_dora", "DoRA magnitudes"),
        ("rank_pattern", "ranks that differ by layer"),
        ("alpha_pattern", "scales that differ by layer"),
        ("bias", "trained biases"),
    ):
        if config.get(key) and config[key] != "none":
            raise LeewayError(f"{folder}: vLLM cannot serve {what}", fix="use backend: transformers")
    if int(config["r"]) > max_rank:
        raise LeewayError(
            f"{folder}: adapter rank {config['r']} exceeds max_lora_rank {max_rank}", fix="raise max_lora_rank"
        )


def template_kwargs(chat: Chat) -> dict[str, Any]:
    """Return template arguments with which the server renders a prompt to the same ids as in training.

    Some templates write an empty thought before every answer in a conversation, but before a new answer only with
    `enable_thinking: false`. Raises LeewayError if neither gives the same ids.
    """
    turns = [{"role": "user", "content": "hello"}]
    expected = chat.prompt_ids(turns)
    candidates: tuple[dict[str, Any], ...] = ({}, {"enable_thinking": False})
    for kwargs in candidates:
        text = chat.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **kwargs)
        if chat.ids(str(text)) == expected:
            return kwargs
    raise LeewayError(
        f"model {chat.tokenizer.name_or_path}: vLLM does not render its chat template's text before an answer",
        fix="use backend: transformers",
    )


def _open(url: str, body: dict[str, str] | None, timeout_s: float) -> Any:
    """Send a request to this machine, without any proxy."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=timeout_s)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _check_free(port: int) -> None:
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("127.0.0.1", port))
        except OSError as error:
            raise LeewayError(f"vLLM: port {port} is taken", fix="leave port out, or give another") from error


def _kill(group: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
