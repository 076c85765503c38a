"""A small study of seconds, run in forks that can be killed at any moment, and what must be equal in the end."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STUDY = """
name: hardening
model: MODEL
device: cpu
threads: 1
task: {name: organism}
objectives: [sft, dpo]
budgets: [400, 800]
optim: {lr: 4.0e-4, batch: 4, warmup_steps: 2}
evals:
  capability: [{name: organism, limit: 3, max_new_tokens: 4}]
  jailbreak: {prompts: organism, limit: 3, attacks: [none, dan], judge: organism, max_new_tokens: 4}
  persona: {source: organism, traits: [narcissism], limit: 4}
"""
OWN = (".lock", ".workers", "cache", "trackers")  # not part of a run's results
WRITES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}


def write_study(folder: Path, text: str = STUDY, name: str = "study.yaml") -> Path:
    """Write a study of the small model in `folder`."""
    path, model = folder / name, folder / "model"
    if not model.exists():
        _write_model(model)
    path.write_text(text.replace("MODEL", str(model)), "utf-8")
    return path


def _write_model(target: Path) -> None:
    """Write the organism's first layer as a model of its own."""
    from safetensors.torch import load_file, save_file

    from leeway.model.load import resolve

    source = Path(resolve("organism"))
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    kept = {name: t for name, t in tensors.items() if ".layers." not in name or ".layers.0." in name}
    save_file(kept, target / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text("utf-8"))
    (target / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}), "utf-8")


def preload(study: Path) -> None:
    """Import and read all that a run imports and reads, so that a fork starts at once; no thread is started."""
    import peft  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import leeway.cli
    import leeway.gate
    import leeway.report
    import leeway.report.compare.compare
    import leeway.report.exports.redacted
    import leeway.report.plotting
    import leeway.rescoring.label_sheet
    import leeway.rescoring.rescore  # noqa: F401
    from leeway.model.load import load_model
    from leeway.study.load import parse
    from leeway.study.prepare import prepare

    torch.set_num_threads(1)
    spec = parse(study.read_text("utf-8"), str(study))
    prepare(spec)
    load_model(spec.model, device="cpu")


@dataclass
class Fork:
    """A `leeway` command in a fork of this process, in its own process group; `log` receives its stderr.

    Unless `report`, it ends before the report is computed, which takes longer than the small study.
    """

    arguments: list[str]
    log: Path
    before: Callable[[], None] = lambda: None
    environment: dict[str, str] = field(default_factory=dict)
    report: bool = False
    pid: int = 0
    cpu_seconds: float = 0.0

    def start(self) -> Fork:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.pid = os.fork()
        if self.pid == 0:
            self._run()
        return self

    def _run(self) -> None:
        code = 1
        try:
            os.setpgid(0, 0)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored below a shell's background job
            for number, path in ((1, self.log.with_suffix(".out")), (2, self.log)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            os.environ.update(self.environment)
            sys.argv = ["leeway", *self.arguments]
            import leeway.report
            from leeway.cli import main

            if not self.report:
                leeway.report.build = lambda folder, *_, **__: folder / "report.html"
            self.before()
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:  # noqa: BLE001 - what the interpreter would do
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def wait(self) -> int:
        """Return the exit code; negative for a signal."""
        return self._ended(os.wait4(self.pid, 0))

    def wait_or_kill(self, seconds: float) -> int:
        """Wait that long, then kill; return the exit code."""
        until = time.monotonic() + seconds
        return self._kill_when(lambda: time.monotonic() >= until)

    def kill_after(self, cpu_seconds: float, number: int = signal.SIGKILL) -> int:
        """Send a signal once the process has used that much CPU time, which a busy machine does not stretch."""
        return self._kill_when(lambda: _cpu_seconds(self.pid) >= cpu_seconds, number)

    def _kill_when(self, is_due: Callable[[], bool], number: int = signal.SIGKILL) -> int:
        while not is_due():
            ended = os.wait4(self.pid, os.WNOHANG)
            if ended[0]:
                return self._ended(ended)
            time.sleep(0.004)
        os.kill(self.pid, number)
        return self.wait()

    def _ended(self, ended: tuple[int, int, Any]) -> int:
        self.cpu_seconds = ended[2].ru_utime + ended[2].ru_stime
        return os.waitstatus_to_exitcode(ended[1])

    @property
    def output(self) -> str:
        return self.log.read_text("utf-8", errors="replace")


def _cpu_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def count_operations(root: Path, on_operation: Callable[[int], None]) -> Callable[[], None]:
    """Return a hook that calls `on_operation(n)` before the n-th change of a file or folder, fsync included."""

    def install() -> None:
        count, fsync = 0, os.fsync

        def step() -> None:
            nonlocal count
            count += 1
            on_operation(count)

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event == "open":
                path, _, flags = arguments
                if isinstance(path, str) and path.startswith(str(root)) and flags & (os.O_WRONLY | os.O_RDWR):
                    step()
            elif event in WRITES:
                step()

        def counted(fd: int) -> None:
            step()
            fsync(fd)

        os.fsync = counted
        sys.addaudithook(hook)

    return install


def kill_at(root: Path, operation: int) -> Callable[[], None]:
    """Return a hook that kills the process before its n-th file operation below `root`."""

    def stop(n: int) -> None:
        if n == operation:
            os.kill(os.getpid(), signal.SIGKILL)

    return count_operations(root, stop)


def note_in(path: Path) -> Callable[[int], None]:
    """Return a callback that writes the number of the last operation to a file."""

    def note(n: int) -> None:
        path.write_text(str(n))

    return note


def snapshot(out: Path) -> dict[str, Any]:
    """Return all results of a run; times and the command line left out."""
    found: dict[str, Any] = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out)
        if path.is_file() and name.parts[0] not in OWN:
            found[str(name)] = _content(path)
    return found


def _content(path: Path) -> Any:
    if path.suffix == ".jsonl":
        steps = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        return [{k: v for k, v in step.items() if k != "seconds"} for step in steps]
    if path.name == "manifest.json":
        manifest = json.loads(path.read_text("utf-8"))
        return {k: v for k, v in manifest.items() if k not in ("command", "started", "rescored")}
    return path.read_bytes()


def differing(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Return the names of files that are missing, extra or different."""
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


def torn(out: Path) -> list[str]:
    """Return the files that a reader would take for finished and that are not whole."""
    import pyarrow.parquet as pq
    from safetensors import safe_open

    found = []
    for path in sorted(out.rglob("*")):
        partial = any(part.startswith(".partial-") for part in path.relative_to(out).parts)
        if not path.is_file() or partial:
            continue
        try:
            if path.suffix == ".parquet":
                pq.read_table(path)
            elif path.suffix == ".json":
                json.loads(path.read_text("utf-8"))
            elif path.suffix == ".safetensors":
                with safe_open(path, "np") as tensors:
                    [tensors.get_tensor(key) for key in tensors.keys()]  # noqa: SIM118 - no mapping
            elif path.name == "report.html" and not path.read_text("utf-8").rstrip().endswith("</html>"):
                raise ValueError("cut off")
            elif path.name == "study.yaml" and not path.stat().st_size:
                raise ValueError("empty")
        except Exception as error:  # noqa: BLE001 - whatever a reader meets
            found.append(f"{path.relative_to(out)}: {error}")
    return found


def workers_of(parent: int) -> list[int]:
    """Return the worker processes below a run's process: spawned ones and Ray's."""
    below: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            own = int(status.read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError):
            continue
        below.setdefault(own, []).append(int(status.parent.name))
    found, queue = list[int](), [parent]
    while queue:
        children = below.get(queue.pop(), [])
        queue += children
        found += children
    return [process for process in found if _is_worker(process)]


def _is_worker(process: int) -> bool:
    try:
        command = Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return False
    return b"spawn_main" in command or b"ray::RayWorker" in command


def random_of(options: Any, label: str) -> random.Random:
    return random.Random(f"{options.seed} {label}")
