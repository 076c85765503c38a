"""vLLM: one server for a base model, each checkpoint's adapter loaded into it by name and asked like any endpoint.

`vllm serve` runs as a child process of a watcher that ends it, and all it has started, when this process is gone: after
an exception, Ctrl-C or a kill alike. Routes and flags: https://docs.vllm.ai/en/latest/features/lora/.
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

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank may be
BASE = "base"  # the name the base model is served under
TAIL = 8  # lines of the log in an error
GRACE_S = 20.0  # between asking the server to end and ending it

# Ends the whole process group once its standard input closes, which the kernel does whatever became of the parent.
WATCHER = """
import os, signal, subprocess, sys, threading, time
grace, command = float(sys.argv[1]), sys.argv[2:]
signal.signal(signal.SIGTERM, lambda *_: None)
signal.signal(signal.SIGINT, lambda *_: None)
child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
asked = threading.Event()
def watch():
    os.read(0, 1)
    asked.set()
    os.killpg(0, signal.SIGTERM)
    time.sleep(grace)
    os.killpg(0, signal.SIGKILL)
threading.Thread(target=watch, daemon=True).start()
code = child.wait()
if asked.is_set():
    os.killpg(0, signal.SIGKILL)
os._exit(code & 255)
"""


@dataclass(frozen=True)
class VllmSettings:
    """A base model (hub id or folder) and how to serve it; `args` are further flags of `vllm serve`.

    `max_lora_rank` is rounded up to one that vLLM knows. `log` is where the server's output goes (None: a temporary
    file, deleted when all went well). Concurrency, timeout and retries are those of `ApiSettings`.
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
        if not 0 < self.max_lora_rank <= RANKS[-1]:
            raise LeewayError(
                f"vLLM: an adapter of rank {self.max_lora_rank}", fix=f"it serves ranks from 1 to {RANKS[-1]}"
            )


class VllmServer:
    """`with VllmServer(settings) as server:` starts it, waits until it is healthy, and ends it whatever happens."""

    def __init__(self, settings: VllmSettings) -> None:
        self.settings = settings
        self.port = settings.port or _free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._log = settings.log

    def __enter__(self) -> Self:
        command = self._command()
        _check_free(self.port)  # another server there would be taken for ours
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
        """The base model without an adapter."""
        return self._backend(BASE, "", prefix)

    @contextmanager
    def adapter(self, folder: Path, prefix: str = "") -> Iterator[OpenAIBackend]:
        """The base model under the adapter saved in `folder`, for as long as the context lasts.

        Raises LeewayError where vLLM cannot serve it, or would serve another function than was trained.
        """
        check_servable(folder, self.settings.max_lora_rank)
        try:
            content = adapters.adapter_hash(adapters.saved(folder))
        except (SafetensorError, OSError) as error:
            raise LeewayError(f"{folder}: its adapter is damaged or missing", fix="train it again") from error
        name = f"leeway-{content}"  # by content: vLLM keeps what it computed under a name
        backend = self._backend(name, content, prefix)
        self._post("load_lora_adapter", {"lora_name": name, "lora_path": str(folder.resolve())}, folder)
        try:
            yield backend
        except BaseException:
            with suppress(LeewayError):  # what went wrong first is what is told
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
        return OpenAIBackend(
            ApiSettings(
                model=name,
                base_url=f"http://127.0.0.1:{self.port}/v1",
                key_env="",
                concurrency=s.concurrency,
                timeout_s=s.timeout_s,
                retries=s.retries,
                extra={"chat_template_kwargs": kwargs} if kwargs else {},
                served=name,
            ),
            prefix=prefix,
            identity_override=digest("vllm", self._weights, adapter, s.dtype, list(s.args)),
            template_override=self._chat.with_prefix(prefix).template_hash,
        )

    def _command(self) -> list[str]:
        s = self.settings
        found = shutil.which(s.command)
        if found is None:
            raise LeewayError(
                f"{s.command}: no such program", fix="pip install vllm where there is a GPU, or leave vLLM out"
            )
        rank = next(r for r in RANKS if r >= s.max_lora_rank)
        revision = ["--revision", s.revision] if s.revision else []
        return [
            *(found, "serve", resolve(s.model), *revision),
            *("--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", BASE, "--dtype", s.dtype),
            *("--enable-lora", "--max-loras", "1", "--max-lora-rank", str(rank)),
            *("--generation-config", "vllm"),  # no top-k, top-p or penalty that came with the model
            *s.args,
        ]

    def _wait(self) -> None:
        """Until /health answers. Raises LeewayError with the end of the log where it does not."""
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
        tail = " | ".join([line.strip() for line in lines if line.strip()][-TAIL:]) or "empty"
        return LeewayError(f"vllm serve {self.settings.model} {why}; its log ends: {tail}", fix=f"see {self._log}")

    def _post(self, route: str, body: dict[str, str], folder: Path) -> None:
        try:
            with _open(f"http://127.0.0.1:{self.port}/v1/{route}", body, self.settings.timeout_s):
                return
        except urllib.error.HTTPError as error:
            with error:
                said = " ".join(error.read().decode("utf-8", "replace").split())[:300]
            raise LeewayError(
                f"{folder}: vLLM refused {route} (HTTP {error.code}: {said})", fix=f"see the server's log, {self._log}"
            ) from error
        except OSError as error:
            raise self._failed(f"did not answer {route} ({error})") from error

    def _end(self) -> None:
        """Close the watcher's standard input: it ends the group, gently first. Does nothing where all is over."""
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
        _kill(process.pid)  # what a server that ended by itself has left behind


def check_servable(folder: Path, max_rank: int) -> None:
    """Raise LeewayError where `folder` holds no adapter that vLLM applies as it was trained."""
    try:
        config = json.loads((folder / adapters.CONFIG).read_text("utf-8"))
    except FileNotFoundError as error:
        raise LeewayError(
            f"{folder}: no {adapters.CONFIG}, so no adapter to load into vLLM",
            fix="serve whole weights as the model itself, or use the transformers backend",
        ) from error
    except ValueError as error:
        raise LeewayError(f"{folder}: its {adapters.CONFIG} is damaged", fix="train it again") from error
    for key, what in (
        ("trainable_token_indices", "trained embedding rows (control tokens)"),
        ("modules_to_save", "whole modules beside its low-rank matrices"),
        ("use_dora", "DoRA magnitudes"),
        ("rank_pattern", "ranks that differ by layer"),
        ("alpha_pattern", "scales that differ by layer"),
    ):
        if config.get(key):
            raise LeewayError(f"{folder}: vLLM cannot serve {what}", fix="measure it with the transformers backend")
    if config.get("bias", "none") != "none":
        raise LeewayError(f"{folder}: vLLM cannot serve trained biases", fix="measure it with the transformers backend")
    if int(config["r"]) > max_rank:
        raise LeewayError(f"{folder}: an adapter of rank {config['r']}", fix=f"raise max_lora_rank ({max_rank})")


def template_kwargs(chat: Chat) -> dict[str, Any]:
    """What makes the server render a prompt to the very ids that were trained on.

    Some templates write an empty thought before every answer of a conversation, and before a new one only where they
    are told not to think. Raises LeewayError where neither way gives the same ids.
    """
    turns = [{"role": "user", "content": "hello"}]
    wanted = chat.prompt_ids(turns)
    ways: tuple[dict[str, Any], ...] = ({}, {"enable_thinking": False})
    for kwargs in ways:
        text = chat.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **kwargs)
        if chat.ids(str(text)) == wanted:
            return kwargs
    raise LeewayError(
        f"model {chat.tokenizer.name_or_path}: its chat template writes something before an answer that vLLM would not",
        fix="measure it with the transformers backend",
    )


def _open(url: str, body: dict[str, str] | None, timeout_s: float) -> Any:
    """A plain request to this machine, past any proxy."""
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
