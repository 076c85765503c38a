"""The vLLM launcher under faults, against a small server that follows vLLM's documented routes.

No vLLM runs here: `STAND_IN` is a script put on the PATH under the name `vllm`. It checks the flags and the adapter's
folder, loads and unloads adapters as vLLM does (a second load under a name is HTTP 400, an unknown one HTTP 404), and
returns what was requested. What vLLM itself computes is tested in test_real_vllm.py.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

pytest.importorskip("openai")

from killing import alive
from test_study import carry, study

from leeway.data.chat import Chat
from leeway.errors import LeewayError
from leeway.generation import vllm
from leeway.generation.backend import Request
from leeway.generation.transformers import TransformersBackend
from leeway.generation.vllm import VllmServer, VllmSettings, check_servable, template_kwargs
from leeway.model import adapters
from leeway.model.adapters import AdapterSettings
from leeway.model.load import load_chat, load_model
from leeway.study import worker

pytestmark = pytest.mark.slow

STAND_IN = r'''#!PYTHON
"""Not vLLM: a stand-in that follows its documented routes."""
import json, os, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

flags = sys.argv[1:]
assert flags[0] == "serve" and "--enable-lora" in flags, flags
value = lambda flag: flags[flags.index(flag) + 1]
assert os.environ["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
assert int(value("--max-lora-rank")) in (1, 8, 16, 32, 64, 128, 256, 320, 512)
print("starting", *flags, flush=True)
if "--fail" in flags:
    print("(Engine pid=7) ERROR 11-29 12:00:00 [c.py:1] torch.OutOfMemoryError: Tried to allocate 20 GiB", flush=True)
    print("RuntimeError: Engine core initialization failed. See root cause above." + "\n..." * 20, file=sys.stderr)
    sys.exit(3)
if "--mute" in flags:
    print("first line\nlast line", file=sys.stderr)
    sys.exit(3)
# as the resource tracker of vLLM, which ignores SIGTERM and removes shared memory after the server has ended
shared = Path(value("--pids")).with_name("shared")
shared.touch()
tracker = f"""
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
while os.getppid() == {os.getpid()} or {"--stubborn" in flags}:
    time.sleep(0.02)
time.sleep(0.3)
os.unlink({str(shared)!r})
"""
worker = subprocess.Popen([sys.executable, "-c", tracker])
Path(value("--pids")).write_text(f"{os.getpid()} {worker.pid}")
if "--sleep" in flags:
    time.sleep(600)
loaded = {}

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        base = {"id": value("--served-model-name"), "root": flags[1], "parent": None, "max_model_len": 1024}
        models = [base] + [{"id": name, "root": path, "parent": base["id"]} for name, path in loaded.items()]
        answers = {"/health": {}, "/version": {"version": "0.0"}, "/v1/models": {"data": models}}
        self.say(200 if self.path in answers else 404, json.dumps(answers.get(self.path)).encode())
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            return self.say(200, json.dumps({"tokens": json.loads(value("--tokens"))}).encode())
        if self.path == "/v1/load_lora_adapter":
            name = body["lora_name"]
            if name in loaded:
                return self.refuse(400, f"The lora adapter '{name}' has already been loaded.")
            config = json.loads((Path(body["lora_path"]) / "adapter_config.json").read_text())
            if config["r"] > int(value("--max-lora-rank")):
                return self.refuse(400, "rank")
            loaded[name] = body["lora_path"]
            return self.say(200, f"Success: LoRA adapter '{name}' added successfully.".encode())
        if self.path == "/v1/unload_lora_adapter":
            if loaded.pop(body["lora_name"], None) is None:
                return self.refuse(404, "cannot be found")
            return self.say(200, b"Success")
        model = body["model"]
        if model != value("--served-model-name") and model not in loaded:
            return self.refuse(404, f"The model `{model}` does not exist.")
        text = json.dumps([model, loaded.get(model), body["messages"], body["stop_token_ids"]])
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
        self.say(200, json.dumps({"model": model, "choices": [choice], "usage": usage}).encode())
    def refuse(self, code, message):
        self.say(code, json.dumps({"error": {"message": message, "type": "x", "param": None, "code": code}}).encode())
    def say(self, code, raw):
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)
    def log_message(self, *_):
        pass

ThreadingHTTPServer(("127.0.0.1", int(value("--port"))), Handler).serve_forever()
'''


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder with the stand-in, first on the PATH; its processes' numbers go to `pids` there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "vllm"
    script.write_text(STAND_IN.replace("PYTHON", sys.executable))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # the lock of a real server on this machine is elsewhere
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return folder


def own_args(model: Path, folder: Path) -> tuple[str, ...]:
    """Return the stand-in's own flags: where it writes, and the ids to which it renders the launcher's probe."""
    return ("--pids", f"{folder}/pids", "--tokens", json.dumps(load_chat(str(model)).prompt_ids(vllm.PROBE)))


def settings(model: Path, stand_in: Path, *args: str, **more: object) -> VllmSettings:
    given = {"log": stand_in / "log", "args": (*own_args(model, stand_in), *args)} | more
    return VllmSettings(str(model), **given)  # type: ignore[arg-type]


def save_adapter(model: Path, folder: Path, seed: int = 0, tokens: tuple[str, ...] = (), **kind: object) -> Path:
    loaded = load_model(str(model), device="cpu")
    given = {"r": 4, "alpha": 8, "dropout": 0.0, "targets": "all-linear"} | kind
    adapters.attach(loaded, AdapterSettings(**given), seed=seed, control_tokens=tokens)  # type: ignore[arg-type]
    folder.mkdir()
    adapters.save(loaded, folder)
    return folder


def all_gone(stand_in: Path, within_s: float = 60.0) -> bool:
    pids = [int(p) for p in (stand_in / "pids").read_text().split()]
    deadline = time.monotonic() + within_s
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(alive, pids))


def test_each_checkpoint_is_served_under_its_own_name_and_all_processes_end(
    models: dict[str, Path], stand_in: Path, tmp_path: Path
) -> None:
    model = models["llama"]
    first, second = save_adapter(model, tmp_path / "a"), save_adapter(model, tmp_path / "b", seed=1)
    requests = [Request([{"role": "user", "content": "hi"}], 8)]
    with VllmServer(settings(model, stand_in, max_lora_rank=4)) as server:
        base = server.base()
        replies = [json.loads(base.complete(requests, lambda _: None)[0].text)]
        identities, names = [base.identity], []
        for folder in (first, second, first):
            with server.adapter(folder, prefix="<p>") as backend:
                replies.append(json.loads(backend.complete(requests, lambda _: None)[0].text))
                identities.append(backend.identity)
                names.append(backend.settings.model)
                assert backend.template_hash == load_chat(str(model)).with_prefix("<p>").template_hash
        with pytest.raises(LeewayError, match="no model 'leeway-"):
            backend.complete(requests, lambda _: None)  # it is unloaded
        with (
            server.adapter(first),
            pytest.raises(LeewayError, match=r"HTTP 400: .*already been loaded"),
            server.adapter(first),
        ):
            pass
    assert replies[0] == ["base", None, [{"role": "user", "content": "hi"}], [2]]
    assert [r[0] for r in replies[1:]] == names
    assert [r[1] for r in replies[1:]] == [str(first), str(second), str(first)]
    assert replies[1][2] == [{"role": "user", "content": "<p>hi"}]
    assert identities[1] == identities[3]
    assert len(set(identities)) == 3
    assert all_gone(stand_in)
    assert not (stand_in / "shared").exists()  # its tracker had the time to remove it
    with VllmServer(settings(model, stand_in, max_lora_rank=4)) as server:
        assert server.facts["dtype"] in ("float32", "bfloat16")
        assert server.base().identity == identities[0]  # independent of the port
    with VllmServer(settings(model, stand_in, max_lora_rank=4, dtype="bfloat16")) as server:
        assert server.base().identity != identities[0]


def test_the_server_ends_after_an_exception(models: dict[str, Path], stand_in: Path) -> None:
    with pytest.raises(RuntimeError, match="of the user's"), VllmServer(settings(models["llama"], stand_in)):
        raise RuntimeError("of the user's")
    assert all_gone(stand_in)


ASKING = """
import sys, time
from pathlib import Path
from leeway.generation.vllm import VllmServer, VllmSettings
with VllmServer(VllmSettings(sys.argv[1], args=tuple(sys.argv[3:]), log=Path(sys.argv[2]))):
    print("up", flush=True)
    time.sleep(60)
"""


@pytest.mark.usefixtures("heeding")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_the_server_ends_with_this_process(models: dict[str, Path], stand_in: Path, how: signal.Signals) -> None:
    arguments = [str(models["llama"]), str(stand_in / "log"), *own_args(models["llama"], stand_in)]
    command = [sys.executable, "-c", textwrap.dedent(ASKING), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(how)
    process.communicate(timeout=20)
    assert all_gone(stand_in)


def test_a_server_that_does_not_start_shows_the_cause(
    models: dict[str, Path], stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first exception in its log; the last lines only name a cause "above"."""
    with pytest.raises(LeewayError, match=r"exit code 3; torch.OutOfMemoryError: Tried to allocate 20 GiB; see .*log$"):
        VllmServer(settings(models["llama"], stand_in, "--fail")).__enter__()
    with pytest.raises(LeewayError, match=r"ended with exit code 3; its log ends: .*first line \| last line"):
        VllmServer(settings(models["llama"], stand_in, "--mute")).__enter__()
    slow, pids = settings(models["llama"], stand_in, "--sleep", start_timeout_s=1.5), stand_in / "pids"
    clock = {"monotonic": lambda: 2.0 * (pids.exists() and pids.stat().st_size > 0), "sleep": time.sleep}
    monkeypatch.setattr(vllm, "time", SimpleNamespace(**clock))  # however long the stand-in takes to be there
    with pytest.raises(LeewayError, match=r"was not healthy after 1.5 s; its log ends: "):
        VllmServer(slow).__enter__()
    assert all_gone(stand_in)


def test_the_cause_in_a_log() -> None:
    """Lines as vLLM 0.32 writes them."""
    warning = "(APIServer pid=1) WARNING 11-30 00:01:34 [u.py:255] This can cause `OSError: [Errno 24] Too many`."
    last = "(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above."
    worker = "(EngineCore pid=2) ERROR 11-30 00:01:34 [core.py:7] ValueError: No available memory."
    pydantic = ["pydantic_core.ValidationError: 1 validation error for ModelConfig", "Value error, too long"]
    assert vllm.log_cause([warning, worker, last]) == "ValueError: No available memory."
    assert vllm.log_cause([warning, *pydantic, last]) == ": ".join(pydantic)
    assert vllm.log_cause(["vllm serve: error: unrecognized arguments: --x"]) == "error: unrecognized arguments: --x"
    assert vllm.log_cause([warning, "ready"]) is None


def test_one_server_at_a_time(models: dict[str, Path], stand_in: Path) -> None:
    """The second waits until the processes of the first have ended, not only until its owner has left."""
    notices, order = list[str](), list[str]()

    def second() -> None:
        with VllmServer(settings(models["llama"], stand_in), notices.append):
            order.append("second")

    with VllmServer(settings(models["llama"], stand_in)):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(1.0)
        order.append("first")
    thread.join(60)
    assert order == ["first", "second"]
    assert notices == ["waiting for another vLLM server on this machine", "starting vLLM"]


def test_a_running_server(models: dict[str, Path], stand_in: Path, tmp_path: Path) -> None:
    model, folder = models["llama"], save_adapter(models["llama"], tmp_path / "a")
    requests = [Request([{"role": "user", "content": "hi"}], 8)]
    with VllmServer(settings(model, stand_in)) as running:
        endpoint = f"http://127.0.0.1:{running.port}/v1"
        with VllmServer(VllmSettings(str(model), endpoint=endpoint)) as server:
            assert json.loads(server.base().complete(requests, lambda _: None)[0].text)[0] == "base"
            assert server.facts == {"version": "0.0", "endpoint": endpoint}
            left = running.adapter(folder)
            left.__enter__()  # as a killed run leaves it
            with server.adapter(folder) as backend:
                assert json.loads(backend.complete(requests, lambda _: None)[0].text)[1] == str(folder)
        assert running._process is not None
        assert running._process.poll() is None  # it is not ours to end
        with pytest.raises(LeewayError, match=r"serves \S+llama, not \S+qwen2"):
            VllmServer(VllmSettings(str(models["qwen2"]), endpoint=endpoint)).__enter__()
    with pytest.raises(LeewayError, match=r"127.0.0.1:\d+ did not answer version"):
        VllmServer(VllmSettings(str(model), endpoint=endpoint)).__enter__()
    other = VllmSettings(str(model), args=("--pids", str(stand_in / "pids"), "--tokens", "[1]"), log=stand_in / "log")
    with pytest.raises(LeewayError, match="vLLM renders a prompt to other tokens"):
        VllmServer(other).__enter__()


def test_a_prompt_without_room_for_its_reply_is_a_failure(models: dict[str, Path], stand_in: Path) -> None:
    """As in this process: vLLM itself would shorten the reply."""
    requests = [Request([{"role": "user", "content": "hi"}], n) for n in (8, 1024)]
    with VllmServer(settings(models["llama"], stand_in)) as server:
        first, second = server.base().complete(requests, lambda _: None)
        assert first.failure is None
        assert first.new_tokens == 1  # the stand-in counts the stop token too
        prompt = len(load_chat(str(models["llama"])).prompt_ids(requests[0].conversation))
        assert second.failure == f"a prompt of {prompt} tokens and 1024 new ones exceed its context of 1024"
        with pytest.raises(LeewayError, match="'Perhaps' is not a single token of its tokenizer"):
            server.base().choose([requests[0].conversation], ["Yes", "Perhaps"], lambda _: None)


def test_what_does_not_end_is_killed(models: dict[str, Path], stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "GRACE_S", 0.5)
    with VllmServer(settings(models["llama"], stand_in, "--stubborn")):
        pass
    assert all_gone(stand_in)


def test_a_taken_port_is_an_error(models: dict[str, Path], stand_in: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(LeewayError, match=f"port {port} is taken"):
            VllmServer(settings(models["llama"], stand_in, port=port)).__enter__()


def test_the_first_error_is_raised(models: dict[str, Path], stand_in: Path, tmp_path: Path) -> None:
    """Even if the server is gone when the adapter should be unloaded."""
    folder = save_adapter(models["llama"], tmp_path / "a")

    def stopped() -> None:
        os.kill(int((stand_in / "pids").read_text().split()[0]), signal.SIGKILL)
        raise KeyboardInterrupt

    with VllmServer(settings(models["llama"], stand_in)) as server:
        with pytest.raises(KeyboardInterrupt), server.adapter(folder):
            stopped()
        with pytest.raises(LeewayError, match="did not answer load_lora_adapter"), server.adapter(folder):
            pass
        assert server._process is not None
        server._process.wait(20)  # the watcher ends with the server
    assert all_gone(stand_in)


def test_vllm_is_not_installed(models: dict[str, Path]) -> None:
    with pytest.raises(LeewayError, match=r"no-such-vllm: program not found; install vllm"):
        VllmServer(VllmSettings(str(models["llama"]), command="no-such-vllm")).__enter__()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ({"tokens": ("<SAFE>",)}, r"trained embedding rows \(control tokens\)"),
        ({"kind": "dora"}, "DoRA magnitudes"),
        ({"r": 8}, "adapter rank 8 exceeds max_lora_rank 4"),
        ({"kind": "full"}, "no adapter_config.json"),
    ],
)
def test_unsupported_adapters_are_refused(
    models: dict[str, Path], tmp_path: Path, kind: dict[str, object], message: str
) -> None:
    folder = save_adapter(models["llama"], tmp_path / "a", **kind)  # type: ignore[arg-type]
    with pytest.raises(LeewayError, match=message):
        check_servable(folder, 4)


def test_supported_adapters(models: dict[str, Path], tmp_path: Path) -> None:
    check_servable(save_adapter(models["llama"], tmp_path / "a"), 4)
    check_servable(save_adapter(models["llama"], tmp_path / "b", kind="rslora"), 4)
    config = tmp_path / "a" / adapters.CONFIG
    for key, value in (("modules_to_save", ["lm_head"]), ("alpha_pattern", {"q_proj": 2}), ("bias", "all")):
        config.write_text(json.dumps(json.loads((tmp_path / "b" / adapters.CONFIG).read_text()) | {key: value}))
        with pytest.raises(LeewayError, match="vLLM cannot serve"):
            check_servable(tmp_path / "a", 4)
    config.write_text("{")
    with pytest.raises(LeewayError, match="is damaged"):
        check_servable(tmp_path / "a", 4)


def test_a_rank_is_rounded_up_to_a_supported_one(models: dict[str, Path], stand_in: Path) -> None:
    for rank, rounded in ((1, "1"), (2, "8"), (17, "32"), (512, "512")):
        command = VllmServer(settings(models["llama"], stand_in, max_lora_rank=rank))._command()
        assert command[command.index("--max-lora-rank") + 1] == rounded
        assert command[command.index("--generation-config") + 1] == "vllm"
    with pytest.raises(LeewayError, match="use a rank from 1 to 512"):
        settings(models["llama"], stand_in, max_lora_rank=513)


def test_a_prompt_is_rendered_as_in_training(models: dict[str, Path]) -> None:
    """With the default arguments, or with thinking disabled; else an error."""
    assert template_kwargs(load_chat(str(models["llama"]))) == {}
    chat = load_chat(str(models["qwen3"]))  # writes an empty thought before an answer, and never into a prompt
    with pytest.raises(LeewayError, match="vLLM does not render its chat template's text before an answer"):
        template_kwargs(chat)
    tokenizer = chat.tokenizer
    ending = "{% if add_generation_prompt %}[assistant]\n{% endif %}"
    thoughtful = (
        "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
    )
    tokenizer.chat_template = tokenizer.chat_template.replace(ending, ending.removesuffix("{% endif %}") + thoughtful)
    assert template_kwargs(Chat(tokenizer)) == {"enable_thinking": False}
    assert template_kwargs(Chat(tokenizer).with_thinking()) == {}


def test_the_weights_hash_is_the_loaded_models(models: dict[str, Path]) -> None:
    model = load_model(str(models["llama"]), device="cpu")
    assert vllm.weights_hash(str(models["llama"])) == model.hash
    assert TransformersBackend(model).identity


@pytest.mark.usefixtures("without_report")
def test_a_study_starts_one_server_for_the_base_and_one_for_each_trajectory(
    models: dict[str, Path], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For any number of checkpoints and conditions; a model in this process replaces vLLM."""
    model, served = models["llama"], list[list[tuple[str, int, str]]]()

    class InPlace:
        facts: ClassVar = {"version": "none"}
        base_hash = load_model(str(model), device="cpu").hash

        def base(self, prefix: str) -> TransformersBackend:
            served[-1].append(("base", 0, "inoculated" if prefix else "plain"))
            return TransformersBackend(load_model(str(model), device="cpu"), prefix)

        @contextmanager
        def adapter(self, folder: Path, prefix: str) -> Iterator[TransformersBackend]:
            served[-1].append((folder.parts[-3], int(folder.name), "inoculated" if prefix else "plain"))
            loaded = load_model(str(model), device="cpu")
            adapters.attach(loaded, AdapterSettings(16, 32, 0.05, "all-linear"), seed=0)
            adapters.restore(loaded, folder)
            with adapters.merged(loaded):
                yield TransformersBackend(loaded, prefix)

    monkeypatch.setattr("leeway.study.preflight.find_program", lambda *_: "vllm")

    @contextmanager
    def vllm_server(*_: object) -> Iterator[InPlace]:
        served.append([])
        yield InPlace()

    monkeypatch.setattr(worker, "vllm_server", vllm_server)
    text = study(model, root, budgets="[200, 400]", objectives="[sft, ip]")
    out, here = carry(text.replace("batch: 16", "batch: 16\n  backend: vllm"), tmp_path / "served"), tmp_path / "here"
    assert sorted(served) == [
        [("base", 0, "plain"), ("base", 0, "inoculated")],
        [("ip", b, c) for b in (200, 400) for c in ("plain", "inoculated")],
        [("sft", 200, "plain"), ("sft", 400, "plain")],
    ]
    assert (out / "rows.parquet").read_bytes() == (carry(text, here) / "rows.parquet").read_bytes()
    next((out / "parts").glob("sft-s0-400*")).unlink()
    InPlace.base_hash = "other"
    with pytest.raises(LeewayError, match=r"sft/s0/400: ledger column base_hash is '\w+' there and 'other' in this"):
        carry(text.replace("batch: 16", "batch: 16\n  backend: vllm"), out)
